"""Calibration images: which ones set the initial quantization ranges, and the ranges after training."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import msgspec
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from eyas_host.data.dataset import ImageDataset
from eyas_host.data.split import Split
from eyas_host.data.transforms import Batch, prepared
from eyas_host.evaluation.bootstrap import Floats, Ints
from eyas_host.evaluation.inference import pick_device, to_tensor
from eyas_host.models import checkpoints
from eyas_host.models.factory import PixelClassifier, move
from eyas_host.pipeline.runner import RunContext
from eyas_host.quant.quantizers import activation_quantizers, affine
from eyas_host.support.errors import CompressError

_COVERAGE = "as many of each class, far apart in the student's feature space"
_RANDOM = "drawn at random"
_BATCH, _CALIBRATION_BATCH = 64, 16
"""Images of a forward pass, and of one whose tensors are all observed."""


class Calibration(msgspec.Struct, frozen=True):
    """`qat/calibration.json`; sets worth keeping are copied to `calibration/`."""

    images: tuple[str, ...]
    """sha256 of each image, in calibration order."""
    why: str
    """How the images were chosen."""
    ranges: dict[str, tuple[float, float]]
    """Operation -> smallest and largest real value of its output's int8 grid, after training."""


def choose_images(context: RunContext, split: Split) -> tuple[list[int], str]:
    """Rows of the training split to calibrate with, and how they were chosen."""
    settings = context.recipe.quantize
    if settings.choose == "random":
        return random_images(len(split.train), settings.calibration, context.recipe.run.seed), _RANDOM
    student = checkpoints.load_pruned(context, len(split.labels))
    features = _pooled_features(student, split.train, pick_device(context.recipe.run.device))
    return covering_images(features, split.train.targets, settings.calibration), _COVERAGE


def random_images(total: int, count: int, seed: int) -> list[int]:
    """A seeded sample of `count` of `total` rows without replacement (all rows, if there are fewer)."""
    return [int(row) for row in np.random.default_rng((seed, 7)).permutation(total)[:count]]


def covering_images(features: Floats, targets: Ints, count: int) -> list[int]:
    """Rows of `features` [n, d] that cover every class equally, by farthest-point sampling within each class.

    A class starts with the image nearest to its mean; each further one is the farthest from those already chosen in
    its class (Gonzalez, "Clustering to minimize the maximum intercluster distance", 1985). Classes take turns; once a
    class runs out, the others fill up the set. `targets` are labels [n]; all rows are returned if `count` exceeds n.
    """
    queues = [_farthest_first(features, np.flatnonzero(targets == label), count) for label in np.unique(targets)]
    rounds = max(len(queue) for queue in queues)
    turns = [queue[index] for index in range(rounds) for queue in queues if index < len(queue)]
    return turns[:count]


def calibration_batches(dataset: ImageDataset, rows: Sequence[int]) -> list[Tensor]:
    """Images prepared as on the device, in batches: float pixels [n, 3, size, size], 0..255."""
    pixels = prepare_rows(dataset, rows)
    starts = range(0, len(pixels), _CALIBRATION_BATCH)
    return [to_tensor(pixels[i : i + _CALIBRATION_BATCH], torch.device("cpu")).float() for i in starts]


def prepare_rows(dataset: ImageDataset, rows: Iterable[int]) -> Batch:
    """Images of a dataset prepared as on the device: uint8 [n, size, size, 3]."""
    if dataset.spec is None:
        raise CompressError("the split was opened without the model's preprocessing")
    return prepared(dataset.pixels.rows(rows), dataset.spec)


def calibration_record(dataset: ImageDataset, rows: Sequence[int], model: nn.Module, why: str) -> Calibration:
    """The calibration images, how they were chosen, and the ranges that the quantized `model` has now."""
    return Calibration(
        images=tuple(dataset.images[row].sha256 for row in rows),
        why=f"{len(rows)} of {len(dataset)} training images, {why}: as the camera sees them",
        ranges={operation: affine(q).bounds for operation, q in activation_quantizers(model).items()},
    )


def _farthest_first(features: Floats, rows: Ints, count: int) -> list[int]:
    """At most `count` of `rows`, in farthest-first order."""
    points = np.asarray(features[rows], dtype=np.float64)
    index = int(np.linalg.norm(points - points.mean(axis=0), axis=1).argmin())
    nearest = np.full(len(rows), np.inf)
    chosen = []
    for _ in range(min(count, len(rows))):
        chosen.append(int(rows[index]))
        nearest = np.minimum(nearest, np.linalg.norm(points - points[index], axis=1))
        nearest[index] = -1.0  # never chosen again, even if an identical image follows
        index = int(nearest.argmax())
    return chosen


@torch.inference_mode()
def _pooled_features(model: PixelClassifier, dataset: ImageDataset, device: torch.device) -> npt.NDArray[np.float32]:
    """Pooled features float32 [n, channels]; images are read batch by batch, never all at once."""
    model = move(model, device)
    features = []
    for start in range(0, len(dataset), _BATCH):
        pixels = prepare_rows(dataset, range(start, min(start + _BATCH, len(dataset))))
        features.append(model.pooled(to_tensor(pixels, device)).float().cpu())
    return np.asarray(torch.cat(features).numpy())
