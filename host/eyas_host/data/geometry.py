"""Geometry of an augmented view: crop and rotation in one resampling, with the device's filter.

The device halves an image by means of 2 x 2 pixels while that still covers the model's input, then interpolates
linearly once. A rotated crop is made the same way: the image is halved as often as the device would halve the crop, and
one affine warp then rotates, crops and resizes it. Each time the device halves, it leaves out the last row or column of
an odd side; the warp ends where the device does.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import cv2
import numpy as np
import numpy.typing as npt

from eyas_device.preprocess import Pixels, Preprocessing, prepare

Affine = npt.NDArray[np.float64]
"""3 x 3: coordinates of an output pixel's centre -> those in the image."""
_GREY = 128
"""Padding, as in `eyas_device.preprocess.prepare`."""


class Crop(NamedTuple):
    """A crop of an image that was rotated about its centre, pixels and degrees (counter-clockwise)."""

    top: int
    left: int
    height: int
    width: int
    degrees: float = 0.0


def prepare_crop(image: Pixels, crop: Crop, spec: Preprocessing) -> Pixels:
    """The crop of `image` [h, w, 3] as the device would prepare it, uint8 [size, size, 3]."""
    if not crop.degrees:
        cropped = image[crop.top : crop.top + crop.height, crop.left : crop.left + crop.width]
        return prepare(np.ascontiguousarray(cropped), spec)
    kept_width, kept_height = crop.width, crop.height
    if spec.fit == "crop" or spec.crop_fraction < 1.0:
        shorter = min(crop.width, crop.height)
        sides = (shorter, shorter) if spec.fit == "crop" else (crop.width, crop.height)
        kept_width, kept_height = (max(1, round(side * spec.crop_fraction)) for side in sides)
    width = height = spec.size
    if spec.fit == "pad":
        scale = spec.size / max(kept_width, kept_height)
        width, height = max(1, round(kept_width * scale)), max(1, round(kept_height * scale))
    left, top = crop.left + (crop.width - kept_width) // 2, crop.top + (crop.height - kept_height) // 2
    halvings = 0
    if spec.interpolation == "area":
        halvings = max(1, min(kept_width // width, kept_height // height)).bit_length() - 1
        kept_width, kept_height = (side >> halvings << halvings for side in (kept_width, kept_height))
    mapping = _rotation(image, crop.degrees) @ _resize(kept_width / width, kept_height / height, left, top)
    if spec.interpolation == "area":
        image, mapping = _shrink(image, mapping, halvings, kept_width / width, kept_height / height)
    out = np.full((spec.size, spec.size, 3), _GREY, dtype=np.uint8)
    x, y = (spec.size - width) // 2, (spec.size - height) // 2
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    warped = cv2.warpAffine(image, mapping[:2], (width, height), flags=flags, borderMode=cv2.BORDER_REFLECT_101)
    out[y : y + height, x : x + width] = warped
    return out


def _shrink(image: Pixels, mapping: Affine, halvings: int, ratio_x: float, ratio_y: float) -> tuple[Pixels, Affine]:
    """Shrink `image` as the device would before it interpolates, when it resizes by these ratios."""
    for _ in range(halvings):
        height, width = image.shape[0] // 2, image.shape[1] // 2
        even = image[: 2 * height, : 2 * width]
        image = np.asarray(cv2.resize(even, (width, height), interpolation=cv2.INTER_AREA), dtype=np.uint8)
        mapping = _resize(0.5, 0.5) @ mapping
        ratio_x, ratio_y = ratio_x / 2, ratio_y / 2
    if ratio_x >= 2.0 or ratio_y >= 2.0:  # one side only: `stretch`
        height, width = image.shape[:2]
        size = (max(1, math.ceil(width / max(1.0, ratio_x))), max(1, math.ceil(height / max(1.0, ratio_y))))
        image = np.asarray(cv2.resize(image, size, interpolation=cv2.INTER_AREA), dtype=np.uint8)
        mapping = _resize(size[0] / width, size[1] / height) @ mapping
    return image, mapping


def _resize(scale_x: float, scale_y: float, left: float = 0.0, top: float = 0.0) -> Affine:
    """Scale coordinates of pixel centres, where (-0.5, -0.5) is the corner of the first pixel, then shift them."""
    return np.array(
        [[scale_x, 0.0, left + scale_x / 2 - 0.5], [0.0, scale_y, top + scale_y / 2 - 0.5], [0.0, 0.0, 1.0]]
    )


def _rotation(image: Pixels, degrees: float) -> Affine:
    """Coordinates in the rotated image -> coordinates in `image`."""
    height, width = image.shape[:2]
    forward = cv2.getRotationMatrix2D(((width - 1) / 2, (height - 1) / 2), degrees, 1.0)
    return np.linalg.inv(np.vstack([forward, [0.0, 0.0, 1.0]]))
