"""Reference of the training images, by which a device detects out-of-distribution (OOD) images."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from eyas_device.image_statistics import image_statistics
from eyas_device.ood import Values, all_statistics, describe, distance
from eyas_device.preprocess import Pixels, Preprocessing, prepare
from eyas_device.reference import Floats, PredictionStatistics, Reference, reference_arrays
from eyas_device.telemetry.messages import CONFIDENCE_EDGES
from eyas_host.bundle.ood_labels import fit_labels
from eyas_host.bundle.ood_thresholds import Measured, fit_table
from eyas_host.data.sources import LabelledImage

_MAX_COMPONENTS = 32
_IMAGES_PER_COMPONENT = 8
_MAX_DISTANCES = 512

Groups = tuple[Sequence[str], ...]
"""Ways to divide images into sub-populations, each with a name for every image."""


def fit_reference(
    train: Iterable[Pixels],
    validation: Iterable[Pixels],
    spec: Preprocessing,
    *,
    groups: tuple[Groups, Groups] | None = None,
    probabilities: npt.NDArray[np.floating[Any]] | None = None,
    labels: npt.NDArray[np.integer[Any]] | None = None,
    predictions: PredictionStatistics | None = None,
) -> Reference:
    """Fit what training images look like, and calibrate on the validation images how far a camera's may be from it.

    Args:
        train: Decoded images, uint8 [h, w, 3] BGR; they are prepared as on the device.
        validation: The same, of the validation set.
        spec: How the device prepares images.
        groups: Sub-populations of the training and of the validation images, in the order of the images; by default
            each set is one.
        probabilities: Calibrated probabilities, float [validation, classes], of the model that devices run; without
            them its certainty is not judged.
        labels: Label number of each training image, in the order of the columns of `probabilities`; with both, images
            are compared with the training images of the predicted label too.
        predictions: What the model predicted for the validation images, for a fleet's server.

    """
    of_train, of_validation = _measure(train, spec), _measure(validation, spec)
    reference = _fit_gaussian(of_train[1].astype(np.float64))
    if labels is not None and probabilities is not None:
        fitted = fit_labels(*of_train, np.asarray(labels), probabilities.shape[1], reference)
        reference = msgspec.structs.replace(reference, labels=fitted)
    distances = np.sort(np.asarray([distance(each, reference) for each in of_validation[1]], dtype=np.float32))
    table = fit_table(
        Measured(_values(of_train, reference, None), groups[0] if groups else ([""] * len(of_train[0]),)),
        Measured(
            _values(of_validation, reference, probabilities), groups[1] if groups else ([""] * len(of_validation[0]),)
        ),
    )
    return msgspec.structs.replace(reference, distances=_thin(distances), table=table, predictions=predictions)


def prediction_statistics(
    predicted: npt.NDArray[np.integer[Any]],
    targets: npt.NDArray[np.integer[Any]],
    probabilities: npt.NDArray[np.floating[Any]],
) -> PredictionStatistics:
    """Count predictions by label and confidence, as windows do.

    Args:
        predicted: Predicted label number of each validation image, [n].
        targets: True label number, [n].
        probabilities: Calibrated probabilities, [n, classes].

    """
    confidence = probabilities[np.arange(len(predicted)), predicted]
    bins = np.searchsorted(CONFIDENCE_EDGES, confidence, side="right")
    labels, count = probabilities.shape[1], len(CONFIDENCE_EDGES) + 1
    flat = predicted * count + bins
    everything, right = (
        np.bincount(flat, weights=weights, minlength=labels * count).reshape(labels, count).astype(np.float32)
        for weights in (None, (predicted == targets).astype(np.float64))
    )
    sums = np.bincount(predicted, weights=confidence, minlength=labels).astype(np.float32)
    return PredictionStatistics(bins=everything, right=right, confidence_sum=sums)


def _measure(images: Iterable[Pixels], spec: Preprocessing) -> tuple[Values, Floats]:
    """Statistics float64 [n, statistics] and descriptors float32 [n, d] of images, one image in memory at a time."""
    statistics, descriptors = [], []
    for image in images:
        prepared = prepare(image, spec)
        statistics.append(image_statistics(prepared))
        descriptors.append(describe(prepared))
    return np.stack(statistics), np.stack(descriptors)


def _values(
    measured: tuple[Values, Floats], reference: Reference, probabilities: npt.NDArray[np.floating[Any]] | None
) -> Values:
    given = [None] * len(measured[0]) if probabilities is None else list(probabilities)
    return np.stack(
        [
            all_statistics(of_pixels, descriptor, reference, each)
            for of_pixels, descriptor, each in zip(*measured, given, strict=True)
        ]
    )


def _fit_gaussian(features: npt.NDArray[np.float64]) -> Reference:
    """Mean, spread and principal components of descriptors [n, d]."""
    deviation = features.std(axis=0)
    scale = deviation + 0.05 * deviation.mean() + 1e-4  # features that never varied in training must not dominate
    standardized = (features - features.mean(axis=0)) / scale
    count = max(1, min(_MAX_COMPONENTS, len(standardized) // _IMAGES_PER_COMPONENT))
    _, singular, directions = np.linalg.svd(standardized, full_matrices=False)
    components = directions[:count]
    residual = standardized - (standardized @ components.T) @ components
    dimensions = features.shape[1] - count
    return Reference(
        mean=features.mean(axis=0).astype(np.float32),
        scale=scale.astype(np.float32),
        components=components.astype(np.float32),
        spread=(singular[:count] / np.sqrt(len(standardized)) + 1e-3).astype(np.float32),
        residual=float(np.square(residual).sum(axis=1).mean() / dimensions + 1e-5),
        distances=np.zeros(0, dtype=np.float32),
    )


def sub_populations(images: Sequence[LabelledImage]) -> Groups:
    """Each image's label and stratum, and its group."""
    return [f"{image.label}/{image.stratum}" for image in images], [image.group for image in images]


def write_reference(reference: Reference, path: Path) -> None:
    """Write `reference.npz`."""
    with path.open("wb") as stream:
        np.savez_compressed(stream, allow_pickle=False, **reference_arrays(reference))


def _thin(distances: Floats) -> Floats:
    """At most `_MAX_DISTANCES` of the ascending values, evenly by rank, which is enough for quantiles."""
    if len(distances) <= _MAX_DISTANCES:
        return distances
    rows = np.linspace(0, len(distances) - 1, _MAX_DISTANCES).round().astype(int)
    return np.asarray(distances[rows], dtype=np.float32)
