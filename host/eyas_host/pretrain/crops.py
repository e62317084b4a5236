"""Strong random crops of a few images in position, size, rotation and colour; crop i is the same in every run."""

from __future__ import annotations

import math
from collections.abc import Sequence

import cv2
import numpy as np
import numpy.typing as npt
from torch.utils.data import Dataset

from eyas_device.preprocess import Pixels

SCALE = (0.02, 1.0)
"""Area of a crop as a fraction of the image's."""
_ASPECT = 4 / 3
_DEGREES = 30.0
_LIGHT = 0.4
_GREY = 0.1
"""Fraction of the crops without colour."""


class Crops(Dataset[Pixels]):
    """Crop number i of images (each at least two pixels high and wide), uint8 [size, size, 3]."""

    def __init__(self, images: Sequence[Pixels], *, size: int, count: int, seed: int = 0) -> None:
        self._levels = [_pyramid(image, size) for image in images]
        # A large image has more content than a small one, but not in proportion to its area.
        weights = np.array([math.sqrt(math.prod(levels[0].shape[:2])) for levels in self._levels])
        self._until = np.cumsum(weights / weights.sum())
        self._size, self._count, self._seed = size, count, seed

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, number: int) -> Pixels:
        if not 0 <= number < self._count:
            raise IndexError(number)
        rng = np.random.default_rng((self._seed, number))
        index = min(int(np.searchsorted(self._until, rng.random(), side="right")), len(self._levels) - 1)
        return _colour(_geometry(self._levels[index], self._size, rng), rng)


def _pyramid(image: Pixels, size: int) -> list[Pixels]:
    """The image at halved scales down to a crop's size: large crops are read from small levels."""
    levels = [image]
    while min(levels[-1].shape[:2]) >= 2 * size:
        height, width = levels[-1].shape[:2]
        levels.append(np.asarray(cv2.resize(levels[-1], (width // 2, height // 2), interpolation=cv2.INTER_AREA)))
    return levels


def _geometry(levels: Sequence[Pixels], size: int, rng: np.random.Generator) -> Pixels:
    """A rotated, possibly mirrored rectangle of the image, resampled to a square."""
    height, width = levels[0].shape[:2]
    area = rng.uniform(*np.log(SCALE))
    stretch = rng.uniform(-math.log(_ASPECT), math.log(_ASPECT)) / 2
    side = math.sqrt(math.exp(area) * height * width)
    wide, high = min(side * math.exp(stretch), width), min(side * math.exp(-stretch), height)
    left, top = rng.uniform(0, width - wide), rng.uniform(0, height - high)
    level = min(max(0, int(math.log2(max(1.0, min(wide, high) / size)))), len(levels) - 1)
    source = levels[level]
    shrunk = source.shape[1] / width
    angle = math.radians(rng.uniform(-_DEGREES, _DEGREES))
    mirror = -1.0 if rng.random() < 0.5 else 1.0
    step_x, step_y = wide * shrunk / size, high * shrunk / size
    # From the crop's pixels to the image's: scale, mirror and rotate about the centre.
    rotation = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    linear = rotation @ np.diag([mirror * step_x, step_y])
    centre = np.array([(left + wide / 2) * shrunk, (top + high / 2) * shrunk])
    shift = centre - linear @ np.array([size / 2, size / 2])
    crop = cv2.warpAffine(
        source,
        np.column_stack([linear, shift]),
        (size, size),
        flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP,
        borderMode=cv2.BORDER_REFLECT_101,
    )
    return np.asarray(crop, dtype=np.uint8)


def _colour(crop: Pixels, rng: np.random.Generator) -> Pixels:
    """Random brightness, contrast and saturation."""
    bright, contrast, saturation = 1.0 + rng.uniform(-_LIGHT, _LIGHT, size=3)
    if rng.random() < _GREY:
        saturation = 0.0
    grey = np.full((3, 3), 1 / 3) * (1 - saturation) + np.eye(3) * saturation
    matrix: npt.NDArray[np.float64] = bright * contrast * grey
    offset = np.full((3, 1), 128 * bright * (1 - contrast))
    return np.asarray(cv2.transform(crop, np.hstack([matrix, offset])), dtype=np.uint8)
