"""Counting answers in memory that does not grow: for the status line, the summary and the telemetry windows."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence

import msgspec
import numpy as np
import numpy.typing as npt

from eyas_device.predict import Prediction
from eyas_device.support.histogram import Latencies


class LoopStats:
    """What was answered since it was made."""

    def __init__(self) -> None:
        self.started = time.monotonic()
        self.frames = 0
        self.uncertain = 0
        self.unreadable = 0
        """Images that could not be decoded."""
        self.counts: Counter[str] = Counter()
        self.confidence: dict[str, list[int]] = {}
        """Label -> answers per tenth of confidence."""
        self.latencies = Latencies()
        self.ages = Latencies()
        """From capture to answer."""

    def add(self, prediction: Prediction, latency_ms: float, age_ms: float = 0.0) -> None:
        """Count one answer, what it took, decoding included, and how old its frame then was."""
        self.frames += 1
        self.uncertain += prediction.uncertain
        self.counts[prediction.label] += 1
        tenths = self.confidence.setdefault(prediction.label, [0] * 10)
        tenths[min(int(prediction.confidence * 10), 9)] += 1
        self.latencies.add(latency_ms)
        self.ages.add(age_ms)

    def seconds(self) -> float:
        """Since it was made."""
        return time.monotonic() - self.started


class Score(msgspec.Struct, frozen=True):
    """Answers against known labels."""

    images: int
    accuracy: float
    balanced_accuracy: float
    """Mean of the recalls of the classes that were seen."""


class Accuracy:
    """Answers for images whose label is known, as a confusion matrix."""

    def __init__(self, labels: Sequence[str]) -> None:
        self._labels = tuple(labels)
        self._matrix: npt.NDArray[np.int64] = np.zeros((len(labels), len(labels)), dtype=np.int64)
        self.unlabelled = 0
        """Images that lie in no folder that is named as a label."""

    def add(self, source: str, answered: int) -> None:
        """Count the answer for the image at path `source`; the nearest folder named as a label says what is true."""
        for folder in reversed(source.split("/")[:-1]):
            if folder in self._labels:
                self._matrix[self._labels.index(folder), answered] += 1
                return
        self.unlabelled += 1

    def score(self) -> Score | None:
        """Plain and balanced accuracy; None if no image had a known label."""
        total = int(self._matrix.sum())
        if total == 0:
            return None
        truths, right = self._matrix.sum(axis=1), self._matrix.diagonal()
        seen = truths > 0
        return Score(
            images=total,
            accuracy=float(right.sum() / total),
            balanced_accuracy=float((right[seen] / truths[seen]).mean()),
        )
