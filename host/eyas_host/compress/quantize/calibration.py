"""Which images set the first quantization ranges, why those, and what the ranges became."""

from __future__ import annotations

import msgspec
import numpy as np
import numpy.typing as npt
from torch import nn

from eyas_host.data.dataset import ImageDataset
from eyas_host.quant.quantizers import activation_quantizers, affine

Features = npt.NDArray[np.floating]
Ints = npt.NDArray[np.int64]


class Calibration(msgspec.Struct, frozen=True):
    """`qat/calibration.json`; those worth keeping are copied to `calibration/`."""

    images: tuple[str, ...]
    """sha256 of each, in the order they were shown."""
    why: str
    ranges: dict[str, tuple[float, float]]
    """Operation -> smallest and largest real value of its output's int8 grid, after training."""


def random_images(total: int, count: int, seed: int) -> list[int]:
    """A seeded sample of `count` rows of `total` without repetition (all, if there are fewer)."""
    return [int(row) for row in np.random.default_rng((seed, 7)).permutation(total)[:count]]


def covering_images(features: Features, targets: Ints, count: int) -> list[int]:
    """Rows of `features` [n, d] that cover each class alike: class by class in turn, always the farthest image.

    A class begins with the image nearest to its mean; each further one is the farthest from those chosen of its class
    (farthest-point traversal: Gonzalez, "Clustering to minimize the maximum intercluster distance", 1985). A class that
    runs out leaves its places to the others. `targets` are labels [n]; fewer than `count` rows are all returned.
    """
    queues = [_farthest_first(features, np.flatnonzero(targets == label), count) for label in np.unique(targets)]
    rounds = max(len(queue) for queue in queues)
    turns = [queue[place] for place in range(rounds) for queue in queues if place < len(queue)]
    return turns[:count]


def _farthest_first(features: Features, rows: Ints, count: int) -> list[int]:
    """At most `count` of `rows`, in the order of the traversal."""
    points = np.asarray(features[rows], dtype=np.float64)
    place = int(np.linalg.norm(points - points.mean(axis=0), axis=1).argmin())
    nearest = np.full(len(rows), np.inf)
    chosen = []
    for _ in range(min(count, len(rows))):
        chosen.append(int(rows[place]))
        nearest = np.minimum(nearest, np.linalg.norm(points - points[place], axis=1))
        nearest[place] = -1.0  # of two equal images the second is still an image of its own
        place = int(nearest.argmax())
    return chosen


def record(part: ImageDataset, rows: list[int], model: nn.Module, why: str) -> Calibration:
    """What was shown to `model`, a quantized model, why that, and the ranges it has now."""
    return Calibration(
        images=tuple(part.images[row].sha256 for row in rows),
        why=f"{len(rows)} of {len(part)} training images, {why}: as the camera sees them",
        ranges={operation: affine(q).bounds for operation, q in activation_quantizers(model).items()},
    )
