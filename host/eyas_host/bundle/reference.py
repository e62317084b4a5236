"""Reference of the training images, by which a device detects out-of-distribution (OOD) images."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import msgspec
import numpy as np

from eyas_device.bundle import Floats, Reference
from eyas_device.ood import describe, distance
from eyas_device.preprocess import Pixels, Preprocessing, prepare

_MAX_COMPONENTS = 32
_IMAGES_PER_COMPONENT = 8
_MAX_DISTANCES = 512


def fit_reference(train: Iterable[Pixels], validation: Iterable[Pixels], spec: Preprocessing) -> Reference:
    """Fit mean, spread and principal components to the training images, and measure the validation images' distances.

    Images are decoded, uint8 [h, w, 3] BGR; they are prepared as on the device.
    """
    features = np.stack([describe(prepare(image, spec)) for image in train]).astype(np.float64)
    deviation = features.std(axis=0)
    scale = deviation + 0.05 * deviation.mean() + 1e-4  # features that never varied in training must not dominate
    standardized = (features - features.mean(axis=0)) / scale
    count = max(1, min(_MAX_COMPONENTS, len(standardized) // _IMAGES_PER_COMPONENT))
    _, singular, directions = np.linalg.svd(standardized, full_matrices=False)
    components = directions[:count]
    residual = standardized - (standardized @ components.T) @ components
    reference = Reference(
        mean=features.mean(axis=0).astype(np.float32),
        scale=scale.astype(np.float32),
        components=components.astype(np.float32),
        spread=(singular[:count] / np.sqrt(len(standardized)) + 1e-3).astype(np.float32),
        residual=float(np.square(residual).sum(axis=1).mean() + 1e-3),
        distances=np.zeros(0, dtype=np.float32),
    )
    measured = [distance(describe(prepare(image, spec)), reference) for image in validation]
    return msgspec.structs.replace(reference, distances=_thin(np.sort(np.asarray(measured, dtype=np.float32))))


def write_reference(reference: Reference, path: Path) -> None:
    """Write `reference.npz`."""
    with path.open("wb") as stream:
        np.savez_compressed(stream, **msgspec.structs.asdict(reference))


def _thin(distances: Floats) -> Floats:
    """At most `_MAX_DISTANCES` of the ascending values, evenly by rank, which is enough for quantiles."""
    if len(distances) <= _MAX_DISTANCES:
        return distances
    rows = np.linspace(0, len(distances) - 1, _MAX_DISTANCES).round().astype(int)
    return np.asarray(distances[rows], dtype=np.float32)
