"""CutMix and mixup of augmented views, and the soft labels of mixed views.

How a view is mixed depends only on its (seed, row), so that labels can be computed without the views.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from eyas_device.preprocess import Pixels
from eyas_host.recipe.augment import AugmentSection

_MIX_SEED = 1
"""Last component of the seed of a view's mixing; the view itself is drawn from (seed, row)."""


class Mix(NamedTuple):
    """How the views of other images enter a view."""

    box: tuple[int, int, int, int] | None = None
    """CutMix: top, left, height and width of the pasted patch, pixels."""
    pasted: int = 0
    """CutMix: row of the image that the patch is from."""
    weight: float = 1.0
    """Mixup: weight of the view itself, patch included."""
    blended: int = 0
    """Mixup: row of the other image."""

    def apply(self, view: Pixels, other: Callable[[int], Pixels]) -> Pixels:
        """Mix a view uint8 [size, size, 3] with `other(row)`, the views of other images."""
        if self.box is not None:
            top, left, height, width = self.box
            patch = other(self.pasted)[top : top + height, left : left + width]
            view[top : top + height, left : left + width] = patch
        if self.weight < 1.0:
            view = np.rint(self.weight * view.astype(np.float32) + (1 - self.weight) * other(self.blended)).astype(
                np.uint8
            )
        return view

    def fractions(self, row: int, size: int) -> list[tuple[int, float]]:
        """Rows of the images in view `row`, and the fraction of the view that each one makes; they sum to 1."""
        patch = 0.0 if self.box is None else self.box[2] * self.box[3] / size**2
        return [
            (row, self.weight * (1 - patch)),
            (self.pasted, self.weight * patch),
            (self.blended, 1 - self.weight),
        ]


def draw_mix(settings: AugmentSection, size: int, seed: Sequence[int], row: int, count: int) -> Mix:
    """How view `row` of `count` is mixed: with CutMix, then with mixup, each with its probability."""
    mix = Mix()
    if not settings.cutmix and not settings.mixup:
        return mix
    rng = np.random.default_rng((*seed, row, _MIX_SEED))
    if rng.random() < settings.cutmix:
        mix = mix._replace(box=_box(size, rng), pasted=int(rng.integers(count)))
    if rng.random() < settings.mixup:
        weight = float(rng.uniform())  # Beta(1, 1): Zhang et al., "mixup", 2018
        mix = mix._replace(weight=weight, blended=int(rng.integers(count)))
    return mix


def soft_labels(
    settings: AugmentSection,
    size: int,
    seed: Sequence[int],
    rows: Iterable[int],
    targets: npt.NDArray[np.int64],
    classes: int,
) -> npt.NDArray[np.float32]:
    """Labels [rows, classes] of the views at `rows`: each class's fraction of the view."""
    wanted = [int(row) for row in rows]
    labels = np.zeros((len(wanted), classes), dtype=np.float32)
    for index, row in enumerate(wanted):
        for source, fraction in draw_mix(settings, size, seed, row, len(targets)).fractions(row, size):
            labels[index, targets[source]] += fraction
    return labels


def _box(size: int, rng: np.random.Generator) -> tuple[int, int, int, int]:
    """Top, left, height and width of a pasted patch; its area is uniform (Yun et al., "CutMix", 2019)."""
    side = float(rng.uniform()) ** 0.5
    height = width = max(1, round(size * side))
    return int(rng.integers(size - height + 1)), int(rng.integers(size - width + 1)), height, width
