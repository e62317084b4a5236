"""What a captured frame is worth: its size, whether it is black, and how many of the recent frames are broken."""

from __future__ import annotations

from collections import deque

import cv2
import numpy as np

from eyas_device.camera import Frame
from eyas_device.errors import ImageError
from eyas_device.preprocess import Pixels, check_encoded, image_size, imdecode
from eyas_device.support.image_header import oversize

DEGRADED_SHARE = 0.05
"""A camera is degraded when more than this share of its recent frames is broken."""
RECOVERED_SHARE = 0.025
"""It is no longer degraded when the share is below this one: the gap bounds how often the state changes."""
RECENT_S = 30.0
"""Age up to which a frame counts as recent, seconds."""
_MIN_BROKEN = 3
_BUCKET_S = 0.5


class BrokenShare:
    """Share of broken frames among those of the last `RECENT_S`, with hysteresis; memory is bounded.

    A frame can be broken twice over: when it is captured (no image at all), or when the loop decodes it, which it does
    for some of the captured frames only. Both shares are measured on their own frames and then combined.
    """

    def __init__(self) -> None:
        self.degraded = False
        """Whether more frames are broken than a healthy camera delivers."""
        self._captured, self._decoded = _RecentCounts(), _RecentCounts()

    def captured(self, now: float, *, broken: bool) -> None:
        """Count a captured frame; `now` in monotonic seconds."""
        self._captured.add(now, broken)
        self._judge()

    def decoded(self, now: float, *, broken: bool) -> None:
        """Count a frame that was decoded, or could not be."""
        self._decoded.add(now, broken)
        self._judge()

    @property
    def share(self) -> float:
        """Share of broken frames, 0 to 1."""
        return 1.0 - (1.0 - self._captured.share) * (1.0 - self._decoded.share)

    def _judge(self) -> None:
        if self.degraded:
            self.degraded = self.share >= RECOVERED_SHARE
        else:
            broken = self._captured.broken + self._decoded.broken
            self.degraded = broken >= _MIN_BROKEN and self.share > DEGRADED_SHARE


class _RecentCounts:
    """Counts all and broken frames of the last `RECENT_S`, in buckets of `_BUCKET_S`."""

    def __init__(self) -> None:
        self.all = self.broken = 0
        self._buckets: deque[tuple[float, int, int]] = deque()
        """Start, all and broken frames of each bucket."""

    @property
    def share(self) -> float:
        return self.broken / self.all if self.all else 0.0

    def add(self, now: float, broken: bool) -> None:
        start, all_, bad = self._buckets.pop() if self._buckets else (now, 0, 0)
        if now - start >= _BUCKET_S:
            self._buckets.append((start, all_, bad))
            start, all_, bad = now, 0, 0
        self._buckets.append((start, all_ + 1, bad + broken))
        self.all += 1
        self.broken += broken
        while now - self._buckets[0][0] > RECENT_S:
            _, all_, bad = self._buckets.popleft()
            self.all -= all_
            self.broken -= bad


def frame_size(frame: Frame) -> tuple[int, int]:
    """Width and height, pixels. Raises `ImageError` for unsupported and for too large images."""
    image = frame.image
    if isinstance(image, bytes):
        if image_size(image) is None and (not image or image.startswith(b"\xff\xd8")):
            raise ImageError(f"{frame.source}: a damaged JPEG of {len(image)} bytes, without a frame header")
        return check_encoded(image, where=frame.source)
    plain = image.dtype == np.uint8 and image.ndim in (2, 3) and 0 not in image.shape
    if not plain or (image.ndim == 3 and image.shape[2] not in (1, 3, 4)):
        raise ImageError(
            f"{frame.source}: {image.dtype} pixels of shape {image.shape}; uint8 [h, w] or [h, w, 1|3|4] is allowed"
        )
    height, width = image.shape[:2]
    if problem := oversize(width, height):
        raise ImageError(f"{frame.source}: {problem}")
    return width, height


def is_black(frame: Frame, level: float) -> bool:
    """Whether all values of the image (a JPEG decoded at 1/8 scale) are at most `level`. Raises `ImageError`."""
    return int(_downscaled(frame).max()) <= level


def _downscaled(frame: Frame) -> Pixels:
    if not isinstance(frame.image, bytes):
        return frame.image
    return np.asarray(imdecode(frame.image, cv2.IMREAD_REDUCED_COLOR_8, frame.source), dtype=np.uint8)
