"""Which pictures set the first quantization ranges, why those, and what the ranges became."""

from __future__ import annotations

import msgspec
import numpy as np
from torch import nn

from eyas_host.compress.quantizers import activation_quantizers, affine
from eyas_host.data.split import Part


class Calibration(msgspec.Struct, frozen=True):
    """`qat/calibration.json`; those worth keeping are copied to `calibration/`."""

    pictures: tuple[str, ...]
    """sha256 of each, in the order they were shown."""
    why: str
    ranges: dict[str, tuple[float, float]]
    """Operation -> smallest and largest real value of its output's int8 grid, after training."""


def choose_pictures(part: Part, count: int, seed: int) -> list[int]:
    """Rows of `part`: a seeded sample without repetition, at most `count`."""
    order = np.random.default_rng((seed, 7)).permutation(len(part))[:count]
    return [int(row) for row in order]


def record(part: Part, rows: list[int], model: nn.Module) -> Calibration:
    """What was shown to `model`, a trained QAT model, and the ranges it has now."""
    return Calibration(
        pictures=tuple(part.pictures[row].sha256 for row in rows),
        why=f"{len(rows)} of {len(part)} training pictures, drawn at random: as the camera sees them",
        ranges={operation: affine(q).bounds for operation, q in activation_quantizers(model).items()},
    )
