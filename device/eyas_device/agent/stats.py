"""Counting answers in memory that does not grow: for the status line, the summary and the telemetry windows."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Sequence

import msgspec
import numpy as np
import numpy.typing as npt

from eyas_device.predict import Prediction

_FINEST_MS = 0.01
_STEP = 1.01
"""Neighbouring bins of the latency histogram differ by 1 %: the error of a quantile."""
QUANTILES = {"p50": 0.5, "p90": 0.9, "p99": 0.99}


class Latencies:
    """A logarithmic histogram of durations in milliseconds: quantiles within 1 %, the maximum exact."""

    def __init__(self) -> None:
        self._bins: Counter[int] = Counter()
        self._count = 0
        self._max = 0.0

    def add(self, milliseconds: float) -> None:
        """Count one duration."""
        self._bins[round(math.log(max(milliseconds, _FINEST_MS) / _FINEST_MS, _STEP))] += 1
        self._count += 1
        self._max = max(self._max, milliseconds)

    def quantile(self, part: float) -> float:
        """The smallest duration that `part` (0..1) of all do not exceed, milliseconds; 0 if nothing was counted."""
        seen = 0
        for number, count in sorted(self._bins.items()):
            seen += count
            if seen >= part * self._count:
                return min(_FINEST_MS * _STEP**number, self._max)
        return 0.0

    def summary(self) -> dict[str, float]:
        """p50, p90, p99 and max, milliseconds; empty if nothing was counted."""
        if not self._count:
            return {}
        quantiles = {name: round(self.quantile(part), 3) for name, part in QUANTILES.items()}
        return quantiles | {"max": round(self._max, 3)}


class Tally:
    """What was answered since it was made."""

    def __init__(self) -> None:
        self.started = time.monotonic()
        self.frames = 0
        self.unsure = 0
        self.unreadable = 0
        """Pictures that could not be decoded."""
        self.counts: Counter[str] = Counter()
        self.confidence: dict[str, list[int]] = {}
        """Label -> answers per tenth of confidence."""
        self.latencies = Latencies()
        self.ages = Latencies()
        """From capture to answer."""

    def add(self, prediction: Prediction, latency_ms: float, age_ms: float = 0.0) -> None:
        """Count one answer, what it took, decoding included, and how old its frame then was."""
        self.frames += 1
        self.unsure += prediction.unsure
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

    pictures: int
    accuracy: float
    balanced_accuracy: float
    """Mean of the recalls of the classes that were seen."""


class Accuracy:
    """Answers for pictures whose label is known, as a confusion matrix."""

    def __init__(self, labels: Sequence[str]) -> None:
        self._labels = tuple(labels)
        self._matrix: npt.NDArray[np.int64] = np.zeros((len(labels), len(labels)), dtype=np.int64)
        self.unlabelled = 0
        """Pictures that lie in no folder that is named as a label."""

    def add(self, source: str, answered: int) -> None:
        """Count the answer for the picture at path `source`; the nearest folder named as a label says what is true."""
        for folder in reversed(source.split("/")[:-1]):
            if folder in self._labels:
                self._matrix[self._labels.index(folder), answered] += 1
                return
        self.unlabelled += 1

    def score(self) -> Score | None:
        """Plain and balanced accuracy; None if no picture had a known label."""
        total = int(self._matrix.sum())
        if total == 0:
            return None
        truths, right = self._matrix.sum(axis=1), self._matrix.diagonal()
        seen = truths > 0
        return Score(
            pictures=total,
            accuracy=float(right.sum() / total),
            balanced_accuracy=float((right[seen] / truths[seen]).mean()),
        )
