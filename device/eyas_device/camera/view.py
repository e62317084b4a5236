"""Which part of a camera's image is looked at, and which way up."""

from __future__ import annotations

from typing import Literal

import cv2
import msgspec
import numpy as np

from eyas_device.preprocess import Pixels

_ROTATIONS = {90: cv2.ROTATE_90_CLOCKWISE, 180: cv2.ROTATE_180, 270: cv2.ROTATE_90_COUNTERCLOCKWISE}
_FLIPS = {"horizontal": 1, "vertical": 0, "both": -1}
"""Kind -> code of `cv2.flip`."""


class View(msgspec.Struct, frozen=True):
    """Turns, mirrors and crops an image, in this order; applied after the image's own EXIF orientation."""

    rotate: Literal[0, 90, 180, 270] = 0
    """Degrees by which the image is turned clockwise."""
    flip: Literal["none", "horizontal", "vertical", "both"] = "none"
    """`horizontal` exchanges left and right of the turned image, `vertical` top and bottom."""
    region: tuple[float, ...] = ()
    """Left, top, width and height of what is kept, as fractions of the turned and mirrored image; empty: all of it."""

    @property
    def is_plain(self) -> bool:
        """Whether the image stays as it is."""
        return self in (View(), View(region=(0.0, 0.0, 1.0, 1.0)))

    @property
    def kept(self) -> tuple[float, float]:
        """Fractions of the camera's width and height that are kept."""
        width, height = self.region[2:] or (1.0, 1.0)
        return (height, width) if self.rotate in (90, 270) else (width, height)

    def apply(self, image: Pixels) -> Pixels:
        """Return the view of `image`, uint8 [height, width, ...]; only what is kept is turned."""
        if self.region:
            left, top, right, bottom = self._box(*image.shape[1::-1])
            image = image[top:bottom, left:right]
        if self.rotate:
            image = np.asarray(cv2.rotate(image, _ROTATIONS[self.rotate]), dtype=np.uint8)
        if self.flip != "none":
            image = np.asarray(cv2.flip(image, _FLIPS[self.flip]), dtype=np.uint8)
        return image

    def _box(self, width: int, height: int) -> tuple[int, int, int, int]:
        """Left, top, right and bottom of the region in the camera's image of width x height pixels."""
        swapped = self.rotate in (90, 270)
        x, x_end = _interval(self.region[0], self.region[2], height if swapped else width)
        y, y_end = _interval(self.region[1], self.region[3], width if swapped else height)
        if self.flip in ("horizontal", "both"):
            x, x_end = _mirrored(x, x_end, height if swapped else width)
        if self.flip in ("vertical", "both"):
            y, y_end = _mirrored(y, y_end, width if swapped else height)
        if self.rotate == 90:  # the camera's (x, y) lies at (height - 1 - y, x)
            return y, height - x_end, y_end, height - x
        if self.rotate == 180:
            return width - x_end, height - y_end, width - x, height - y
        if self.rotate == 270:  # at (y, width - 1 - x)
            return width - y_end, x, width - y, x_end
        return x, y, x_end, y_end


def _interval(start: float, length: float, size: int) -> tuple[int, int]:
    """First pixel, and the one after the last: at least one pixel."""
    first = min(round(start * size), size - 1)
    return first, max(first + 1, min(size, round((start + length) * size)))


def _mirrored(start: int, end: int, size: int) -> tuple[int, int]:
    return size - end, size - start
