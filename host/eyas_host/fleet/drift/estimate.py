"""Accuracy without labels, from the confidences alone.

Three estimates, each right if nothing but the mix of easy and hard images moved:

- average confidence: the mean calibrated confidence (Guillory et al., "Predicting with confidence on unseen
  distributions", 2021);
- by bins: each prediction is as right as those of its label and bin of confidence were on the validation images (CBPE);
- by threshold: the share of confidences above the one that as many validation images exceed as are right (ATC; Garg et
  al., "Leveraging unlabeled data to predict out-of-distribution performance", 2022), interpolated within a bin.

None of them notices that labels changed their meaning, that a new kind of object is there, or confident mistakes.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import numpy as np

from eyas_host.fleet.drift.measures import BINS, MAX_LABELS, Floats, confidence_bins, frames_of, measure

CAVEAT = "if only the mix of images moved; blind to new objects, changed labels and confident mistakes"
_SMOOTHING = 5.0
"""Weight of a bin's own confidence beside the validation images in it, images."""
_MIDDLES = np.array([0.4, 0.6, 0.75, 0.85, 0.925, 0.965, 0.985, 0.9925, 0.997, 0.9995])


class ModelReference(msgspec.Struct, frozen=True, kw_only=True):
    """What a bundle recorded of the validation images."""

    labels: tuple[str, ...]
    bins: tuple[tuple[float, ...], ...]
    """Predictions of each label per bin of confidence."""
    right: tuple[tuple[float, ...], ...]
    """Those of them that are right."""
    confidence_sum: tuple[float, ...]
    """Sum of the confidences of the predictions of each label."""

    @property
    def images(self) -> float:
        """Number of validation images."""
        return float(np.sum(self.bins))

    @property
    def accuracy(self) -> float:
        """Accuracy on the validation images."""
        return float(np.sum(self.right)) / self.images

    @property
    def confidence(self) -> float:
        """Mean confidence on the validation images."""
        return sum(self.confidence_sum) / self.images


class Estimate(msgspec.Struct, frozen=True, kw_only=True):
    """Accuracy of about the last day, without labels: `CAVEAT`."""

    frames: int
    """Predictions that it is from."""
    average_confidence: float
    by_bins: float | None = None
    """None without the bundle's reference, as `by_threshold`."""
    by_threshold: float | None = None
    precision: dict[str, float] = {}
    """Label -> estimated share of its predictions that are right."""
    caveat: str = CAVEAT


def estimate(recent: Floats, labels: Sequence[str], reference: ModelReference | None) -> Estimate | None:
    """Estimate from the sums of one device, [SUMS]; None without predictions.

    Args:
        recent: Sums over its windows.
        labels: Labels that are followed, in the order of the sums.
        reference: What the bundle recorded.

    """
    rows = recent[np.newaxis]
    frames = float(frames_of(rows)[0])
    if frames < 1:
        return None
    found = Estimate(frames=round(frames), average_confidence=round(float(measure(rows)[0, 0]), 4))
    bins = confidence_bins(rows)[0]
    if reference is None or bins[-1].sum() < 1 or not reference.images:
        return found
    precision = _bin_accuracy(reference, labels)
    own = np.concatenate([bins[:-1], np.maximum(bins[-1:] - bins[:-1].sum(axis=0), 0.0)])
    by_label = (own * precision).sum(axis=1) / np.maximum(own.sum(axis=1), 1e-9)
    return msgspec.structs.replace(
        found,
        by_bins=round(float((own * precision).sum() / own.sum()), 4),
        by_threshold=round(_above(bins[-1], _threshold(reference)), 4),
        precision={
            label: round(float(by_label[number]), 4) for number, label in enumerate(labels) if own[number].sum() >= 1
        },
    )


def _bin_accuracy(reference: ModelReference, labels: Sequence[str]) -> Floats:
    """Accuracy of the validation images per label and bin, [MAX_LABELS + 1, BINS]; the last row is of other labels."""
    bins, right = np.array(reference.bins), np.array(reference.right)
    found = np.zeros((2, MAX_LABELS + 1, BINS))
    for number, label in enumerate(reference.labels):
        row = labels.index(label) if label in labels else MAX_LABELS
        found[0, row] += right[number]
        found[1, row] += bins[number]
    return np.asarray((found[0] + _SMOOTHING * _MIDDLES) / (found[1] + _SMOOTHING))


def _threshold(reference: ModelReference) -> float:
    """Position on the bins, 0..BINS, above which as many confidences lie as validation images are right."""
    counts = np.sum(reference.bins, axis=0)
    above = np.concatenate([np.cumsum(counts[::-1])[::-1], [0.0]]) / counts.sum()
    return float(np.interp(-reference.accuracy, -above, np.arange(BINS + 1)))


def _above(counts: Floats, position: float) -> float:
    """Share of the counts above a position on the bins."""
    above = np.concatenate([np.cumsum(counts[::-1])[::-1], [0.0]]) / counts.sum()
    return float(np.interp(position, np.arange(BINS + 1), above))
