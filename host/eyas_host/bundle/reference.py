"""What the training images look like: the reference by which a device knows a camera that sees something else."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import msgspec
import numpy as np

from eyas_device.bundle import Floats, Reference
from eyas_device.ood import describe, distance
from eyas_device.preprocess import Pixels, Preprocessing, prepare

_DIRECTIONS = 32
_IMAGES_A_DIRECTION = 8
_KEPT_DISTANCES = 512


def fit_reference(train: Iterable[Pixels], validation: Iterable[Pixels], spec: Preprocessing) -> Reference:
    """Mean, spread and principal directions of the training images; distances of the validation images from them.

    Images are decoded ones, uint8 [h, w, 3] BGR; they are prepared as the device prepares them.
    """
    described = np.stack([describe(prepare(image, spec)) for image in train]).astype(np.float64)
    deviation = described.std(axis=0)
    scale = deviation + 0.05 * deviation.mean() + 1e-4  # what never varied in training must not decide alone
    standard = (described - described.mean(axis=0)) / scale
    count = max(1, min(_DIRECTIONS, len(standard) // _IMAGES_A_DIRECTION))
    _, singular, directions = np.linalg.svd(standard, full_matrices=False)
    components = directions[:count]
    outside = standard - (standard @ components.T) @ components
    reference = Reference(
        mean=described.mean(axis=0).astype(np.float32),
        scale=scale.astype(np.float32),
        components=components.astype(np.float32),
        spread=(singular[:count] / np.sqrt(len(standard)) + 1e-3).astype(np.float32),
        residual=float(np.square(outside).sum(axis=1).mean() + 1e-3),
        distances=np.zeros(0, dtype=np.float32),
    )
    measured = [distance(describe(prepare(image, spec)), reference) for image in validation]
    return msgspec.structs.replace(reference, distances=_thinned(np.sort(np.asarray(measured, dtype=np.float32))))


def write_reference(reference: Reference, path: Path) -> None:
    """Write `reference.npz`."""
    with path.open("wb") as stream:
        np.savez_compressed(stream, **msgspec.structs.asdict(reference))


def _thinned(distances: Floats) -> Floats:
    """At most `_KEPT_DISTANCES` of the ascending values, evenly by rank: enough for a quantile."""
    if len(distances) <= _KEPT_DISTANCES:
        return distances
    rows = np.linspace(0, len(distances) - 1, _KEPT_DISTANCES).round().astype(int)
    return np.asarray(distances[rows], dtype=np.float32)
