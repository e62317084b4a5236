"""Accuracy of predictions on images whose label is known from their folder."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import numpy as np
import numpy.typing as npt


class Score(msgspec.Struct, frozen=True):
    """Accuracy on the images with a known label."""

    images: int
    accuracy: float
    balanced_accuracy: float
    """Mean recall of the classes that occurred."""


class Accuracy:
    """Confusion matrix of the predictions on images with a known label."""

    def __init__(self, labels: Sequence[str]) -> None:
        self._labels = tuple(labels)
        self._matrix: npt.NDArray[np.int64] = np.zeros((len(labels), len(labels)), dtype=np.int64)
        self.unlabelled = 0
        """Images in no folder that is named like a label."""

    def add(self, source: str, predicted: int) -> None:
        """Count the predicted class of the image at path `source`; its label is the nearest folder named like one."""
        for folder in reversed(source.split("/")[:-1]):
            if folder in self._labels:
                self._matrix[self._labels.index(folder), predicted] += 1
                return
        self.unlabelled += 1

    def score(self) -> Score | None:
        """Return plain and balanced accuracy; None if no image had a known label."""
        total = int(self._matrix.sum())
        if total == 0:
            return None
        support, correct = self._matrix.sum(axis=1), self._matrix.diagonal()
        occurred = support > 0
        return Score(
            images=total,
            accuracy=float(correct.sum() / total),
            balanced_accuracy=float((correct[occurred] / support[occurred]).mean()),
        )
