"""What the training images of each label look like, for out-of-distribution detection.

With very different labels hardly an image is unusual among all training images. It is among those of the label that
the model predicts for it.

Source: class means with one covariance within classes, Lee et al., "A Simple Unified Framework for Detecting
Out-of-Distribution Samples and Adversarial Attacks", 2018; there of a network's features, and of the nearest class.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from eyas_device.image_statistics import STATISTICS
from eyas_device.reference import Floats, LabelStatistics, Reference

Values = npt.NDArray[np.float64]

_PRIOR = 10.0
"""Images that the variance within all labels counts as, so that a label of few images has one."""
_SHRINKAGE = 0.1
_MAX_COMPONENTS = 32
_IMAGES_PER_COMPONENT = 8
_RESOLUTION = np.array([statistic.resolution for statistic in STATISTICS])


def fit_labels(
    statistics: Values, descriptors: Floats, labels: npt.NDArray[np.integer[Any]], count: int, reference: Reference
) -> LabelStatistics:
    """Fit to training images: statistics [n, m], descriptors [n, d], label numbers [n] below `count`."""
    mean, variance = _moments(statistics, labels, count)
    scale = np.sqrt(variance + np.square(_RESOLUTION))
    differences = (statistics - mean[labels]) / scale[labels]
    correlation = np.cov(differences.T, bias=True)
    correlation = (1 - _SHRINKAGE) * correlation + _SHRINKAGE * np.eye(len(correlation))
    values, vectors = np.linalg.eigh(correlation)
    standardized = (descriptors.astype(np.float64) - reference.mean) / reference.scale
    centre, _ = _moments(standardized, labels, count)
    centred = standardized - centre[labels]
    k = max(1, min(_MAX_COMPONENTS, len(centred) // _IMAGES_PER_COMPONENT))
    _, singular, directions = np.linalg.svd(centred, full_matrices=False)
    components = directions[:k]
    outside = centred - (centred @ components.T) @ components
    _, residual = _moments(np.sqrt(np.square(outside).sum(axis=1, keepdims=True)), labels, count, about_zero=True)
    return LabelStatistics(
        mean=mean.astype(np.float32),
        scale=scale.astype(np.float32),
        whitening=(vectors / np.sqrt(values)).T.astype(np.float32),
        centre=centre.astype(np.float32),
        components=components.astype(np.float32),
        spread=(singular[:k] / np.sqrt(len(centred)) + 1e-3).astype(np.float32),
        residual=(residual[:, 0] / max(1, centred.shape[1] - k) + 1e-5).astype(np.float32),
    )


def _moments(
    values: Values, labels: npt.NDArray[np.integer[Any]], count: int, *, about_zero: bool = False
) -> tuple[Values, Values]:
    """Mean and variance [count, m] of values [n, m] by label; a label without images gets those of all images."""
    members = np.bincount(labels, minlength=count).astype(np.float64)[:, None]
    mean = np.tile(values.mean(axis=0), (count, 1))
    for label in np.flatnonzero(members[:, 0]):
        mean[label] = values[labels == label].mean(axis=0)
    if about_zero:
        mean = np.zeros_like(mean)
    squared = np.square(values - mean[labels])
    within = squared.mean(axis=0)
    total = np.zeros_like(mean)
    np.add.at(total, labels, squared)
    variance = (total + _PRIOR * within) / (members + _PRIOR) * (1.0 + 1.0 / np.maximum(members, 1.0))
    everything = values.var(axis=0) if not about_zero else within
    return mean, np.where(members > 0, variance, everything)
