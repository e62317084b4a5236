"""Accuracy of predictions on images whose label is known from their folder."""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Sequence
from pathlib import PurePosixPath

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
    """Confusion matrix of the predictions on images with a known label.

    Args:
        labels: The bundle's labels.
        root: The folder that holds the class folders.

    """

    def __init__(self, labels: Sequence[str], root: str = "") -> None:
        self._labels = {label: index for index, label in enumerate(labels)}
        self._depth = len(PurePosixPath(root).parts)
        self._matrix: npt.NDArray[np.int64] = np.zeros((len(labels), len(labels)), dtype=np.int64)
        self.unlabelled = 0
        """Images in no folder that is named like a label."""

    def add(self, source: str, predicted: int) -> None:
        """Count the predicted class of the image at path `source`.

        Its label is the first folder below the root that is named like one, as on the host; if there is none, the root
        itself or the nearest folder around it.
        """
        folders = PurePosixPath(source).parts[:-1]
        for folder in (*folders[self._depth :], *reversed(folders[: self._depth])):
            label = self._labels.get(_label(folder))
            if label is not None:
                self._matrix[label, predicted] += 1
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


def _label(folder: str) -> str:
    """The label that a folder's name is: UTF-8 whatever the system's character set is, in Unicode's NFC form."""
    return unicodedata.normalize("NFC", os.fsencode(folder).decode(errors="replace"))
