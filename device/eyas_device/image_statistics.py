"""Named statistics of a prepared image, so that a camera that went wrong can be described in words.

Each is one number for one image as the model gets it: how bright, how sharp, how coloured, where the light is.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import cv2
import numpy as np
import numpy.typing as npt

from eyas_device.preprocess import Pixels

Values = npt.NDArray[np.float64]


class Statistic(NamedTuple):
    """A statistic's name and the smallest standard deviation that it is given."""

    name: str
    resolution: float
    """However alike the training images are: smaller differences are rounding, compression and the sensor."""


STATISTICS = (
    Statistic("brightness", 4.0),
    Statistic("contrast", 2.0),
    Statistic("black", 0.03),
    Statistic("white", 0.03),
    Statistic("skewness", 0.1),
    Statistic("sharpness", 0.1),
    Statistic("detail", 0.1),
    Statistic("noise", 0.15),
    Statistic("blue", 0.05),
    Statistic("red", 0.05),
    Statistic("colour", 0.15),
    Statistic("direction", 0.1),
    Statistic("edges", 0.02),
    Statistic("light_x", 0.01),
    Statistic("light_y", 0.01),
    Statistic("edges_x", 0.01),
    Statistic("edges_y", 0.01),
)
"""In the order of `image_statistics`."""
_SMALL = 32
_GRID = 64
_HIGH_PASS = np.array([[1, -2, 1], [-2, 4, -2], [1, -2, 1]], dtype=np.float32)
_LEVELS = np.arange(256.0)
_BLACK, _WHITE = 6, 250
_GREY = np.array([0.114, 0.587, 0.299], dtype=np.float32)


def image_statistics(image: Pixels) -> Values:
    """The values of `STATISTICS` for one prepared image, uint8 [size, size, 3] BGR: float64 [statistics].

    The constants in the logarithms are a few grey levels, so that an image without light or edges has finite values
    and the last levels before that do not count.
    """
    grey = cv2.cvtColor(image, cv2.COLOR_BGR2GRAY)
    fraction = cv2.calcHist([grey], [0], None, [256], [0, 256]).ravel().astype(np.float64) / grey.size
    brightness = float(fraction @ _LEVELS)
    centred = _LEVELS - brightness
    contrast = math.sqrt(float(fraction @ (centred * centred)))
    small = cv2.resize(image, (_SMALL, _SMALL), interpolation=cv2.INTER_AREA).astype(np.float32)
    light = small @ _GREY
    blue, green, red = small.reshape(-1, 3).mean(axis=0).tolist()
    colour = np.abs(small[:, :, ::2] - small[:, :, 1:2]).mean()
    grid = cv2.resize(grey, (_GRID, _GRID), interpolation=cv2.INTER_AREA)
    across = np.abs(cv2.Sobel(grid, cv2.CV_32F, 1, 0))
    down = np.abs(cv2.Sobel(grid, cv2.CV_32F, 0, 1))
    strength = across + down
    return np.array(
        [
            brightness,
            contrast,
            math.sqrt(float(fraction[:_BLACK].sum())),
            math.sqrt(float(fraction[_WHITE:].sum())),
            float(fraction @ centred**3) / (contrast + 2.0) ** 3,
            math.log((_mean_magnitude(cv2.Laplacian(grey, cv2.CV_16S)) + 0.3) / (contrast + 2.0)),
            math.log((_mean_magnitude(cv2.Laplacian(light, cv2.CV_32F)) + 0.3) / (contrast + 2.0)),
            math.log(_noise(grey) + 0.5),
            math.log((blue + 4.0) / (green + 4.0)),
            math.log((red + 4.0) / (green + 4.0)),
            math.log(float(colour) + 1.0),
            math.log((float(across.mean()) + 2.0) / (float(down.mean()) + 2.0)),
            float((strength > 2.0 * float(strength.mean()) + 4.0).mean()),
            *_centre(light, floor=1.0),
            *_centre(strength, floor=4.0),
        ]
    )


def _mean_magnitude(values: npt.NDArray[np.generic]) -> float:
    return float(cv2.norm(values, cv2.NORM_L1) / values.size)


def _noise(grey: Pixels) -> float:
    """Median magnitude of what a smooth image does not have; edges are too few to move the median.

    Source: Immerkaer, "Fast Noise Variance Estimation", 1996 (the operator; a mean there).
    """
    magnitude = np.abs(cv2.filter2D(grey[::2], cv2.CV_16S, _HIGH_PASS)).astype(np.uint16)
    counts = cv2.calcHist([magnitude], [0], None, [256], [0, 256]).ravel()
    below = np.cumsum(counts)
    half = magnitude.size / 2
    level = int(np.searchsorted(below, half))
    if level >= len(counts):
        return float(level)
    before = float(below[level - 1]) if level else 0.0
    within = (half - before) / max(1.0, float(counts[level]))
    return max(0.0, float(level - 0.5 + within))


def _centre(mass: npt.NDArray[np.float32], *, floor: float) -> tuple[float, float]:
    """Centre of mass from the middle, in sides of the image, to the right and down; `floor` is added everywhere."""
    side = len(mass)
    ramp = (np.arange(side, dtype=np.float32) + 0.5) / side - 0.5
    total = float(mass.sum()) + floor * side * side
    return float(mass.sum(axis=0) @ ramp) / total, float(mass.sum(axis=1) @ ramp) / total
