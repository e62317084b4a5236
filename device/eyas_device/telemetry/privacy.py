"""Which single images may leave a device, how many, and what is taken out of them first. By default: none.

An image is cropped, scaled down and, if wanted, made unrecognisable before it is encoded, on the device. Faces are not
looked for: OpenCV 5 ships no detector for them, and one that finds most faces would promise what it does not keep.
`blur = "whole"` leaves coarse blocks of colour of the whole image, and `crop` leaves out what is not asked for.
"""

from __future__ import annotations

import base64
import random
import time
from collections.abc import Callable
from typing import Any, Literal

import cv2
import numpy as np

from eyas_device.bundle import Manifest
from eyas_device.config import PrivacySection
from eyas_device.predict import Prediction
from eyas_device.preprocess import Pixels
from eyas_device.telemetry.spool.spool import Spool

Why = Literal["uncertain", "sampled", "ood", "command"]
MOST_JPEG = 150_000
"""Bytes: an image is encoded more coarsely until it takes no more."""
_BLOCKS = 16
"""Of an image that was made unrecognisable, along its longer side."""
_QUALITIES = (85, 70, 50, 30)


class Policy:
    """The configuration's rules, with a model that may forbid images altogether.

    `choose` is for the frame loop and waits for nothing; the rest is for another thread.
    """

    def __init__(
        self,
        rules: PrivacySection,
        *,
        clock: Callable[[], float] = time.monotonic,
        chance: Callable[[], float] = random.random,
    ) -> None:
        self._rules, self._clock, self._chance = rules, clock, chance
        self._next = 0.0
        self._forbidden = False
        self._asked = False
        self.ood = False
        """Whether the camera sees what the model was not trained on: a reason for an image."""

    def swapped(self, manifest: Manifest) -> None:
        """Another model answers: it may forbid images (`governance.images = "never"` in its manifest)."""
        self._forbidden = manifest.governance.images == "never"

    def ask(self) -> None:
        """Somebody wants the next answer as an event."""
        self._asked = True

    def choose(self, prediction: Prediction) -> Why | None:
        """Whether this answer is worth an event, and why; at most one every `every_s` seconds unless asked for."""
        rules = self._rules
        if self._asked:
            self._asked = False
            return "command"
        if not (rules.events or rules.images) or self._clock() < self._next:
            return None
        low, high = rules.band
        why: Why | None = None
        if low <= prediction.confidence < high:
            why = "uncertain"
        elif rules.unfamiliar and self.ood:
            why = "ood"
        elif rules.sample_rate > 0 and self._chance() < rules.sample_rate:
            why = "sampled"
        if why is not None:
            self._next = self._clock() + rules.every_s
        return why

    def image(self, pixels: Pixels | None, spool: Spool) -> tuple[str, dict[str, Any]]:
        """An image as it may leave, JPEG in base64 ("" for none), and what was done to it or why there is none."""
        rules = self._rules
        if not rules.images:
            return "", {"image": "none: privacy.images is off"}
        if self._forbidden:
            return "", {"image": "none: the model's governance says never"}
        if pixels is None:
            return "", {"image": "none: the frame could not be decoded"}
        if not spool.take_quota(time.strftime("%Y-%m-%d", time.gmtime()), rules.per_day):
            return "", {"image": f"none: {rules.per_day} a day are allowed"}
        seen = shown(pixels, crop=rules.crop, max_side=rules.max_side, blur=rules.blur)
        data, quality = encoded(seen)
        if not data:
            return "", {"image": "none: it cannot be encoded small enough"}
        policy: dict[str, Any] = {
            "width": seen.shape[1],
            "height": seen.shape[0],
            "crop": list(rules.crop),
            "blur": rules.blur,
            "quality": quality,
            "retention_days": rules.retention_days,
        }
        return base64.b64encode(data).decode(), policy


def shown(pixels: Pixels, *, crop: tuple[float, ...], max_side: int, blur: str) -> Pixels:
    """What is left of a frame, uint8 [h, w, 3]: cropped to (left, top, width, height) as parts of the image, scaled
    down to `max_side` pixels, and with blur `whole` in blocks of which 16 make the longer side.
    """
    height, width = pixels.shape[:2]
    if crop:
        left, top, wide, high = crop
        x, y = min(int(left * width), width - 1), min(int(top * height), height - 1)
        pixels = pixels[y : max(y + 1, int((top + high) * height)), x : max(x + 1, int((left + wide) * width))]
    pixels = _shrunk(pixels, max_side)
    if blur == "whole":
        size = (pixels.shape[1], pixels.shape[0])
        pixels = np.asarray(cv2.resize(_shrunk(pixels, _BLOCKS), size, interpolation=cv2.INTER_NEAREST))
    return pixels


def encoded(pixels: Pixels) -> tuple[bytes, int]:
    """JPEG of at most `MOST_JPEG` bytes and its quality; empty if even the lowest quality takes more."""
    for quality in _QUALITIES:
        good, data = cv2.imencode(".jpg", pixels, [cv2.IMWRITE_JPEG_QUALITY, quality])
        if good and data.size <= MOST_JPEG:
            return data.tobytes(), quality
    return b"", 0


def _shrunk(pixels: Pixels, side: int) -> Pixels:
    height, width = pixels.shape[:2]
    scale = side / max(height, width)
    if scale >= 1:
        return pixels
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    return np.asarray(cv2.resize(pixels, size, interpolation=cv2.INTER_AREA))
