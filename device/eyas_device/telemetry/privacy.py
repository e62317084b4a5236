"""Privacy rules: which images may leave a device, how many, and how they are processed first. By default none leave.

The device crops and scales an image and, if configured, makes it unrecognisable before encoding it. There is no face
detection: OpenCV 5 ships no detector, and one that finds only most faces would be a false promise. `blur = "whole"`
reduces the whole image to coarse blocks of colour.
"""

from __future__ import annotations

import base64
import math
import random
import time
from collections import deque
from collections.abc import Callable
from typing import Any

import cv2
import numpy as np

from eyas_device.bundle import Manifest
from eyas_device.config import PrivacySection
from eyas_device.errors import EyasError
from eyas_device.predict import Prediction
from eyas_device.preprocess import Pixels
from eyas_device.telemetry.messages import Why
from eyas_device.telemetry.spool.spool import Spool

MAX_JPEG = 150_000
"""Maximum bytes of an encoded image; the quality is lowered to keep it."""
_BLOCKS = 16
"""Blocks along the longer side of an unrecognisable image."""
_MAX_REQUESTS = 8
_QUALITIES = (85, 70, 50, 30)


class PrivacyError(EyasError):
    """The privacy rules do not allow what was requested."""


class Policy:
    """Applies the `[privacy]` rules; a bundle may forbid images altogether.

    `choose` is for the frame loop and never blocks; `image` is for another thread.
    """

    def __init__(
        self,
        rules: PrivacySection,
        *,
        clock: Callable[[], float] = time.monotonic,
        chance: Callable[[], float] = random.random,
    ) -> None:
        self._rules, self._clock, self._chance = rules, clock, chance
        self._next = self._next_random = 0.0
        self._forbidden = False
        self._requests: deque[tuple[str, float]] = deque()
        """Ids of the commands that wait for a prediction, and until when."""
        self.ood = False
        """Whether the camera is out of distribution, which is a reason for an event."""

    def use_model(self, manifest: Manifest) -> None:
        """Switch to another model, whose manifest may forbid images (`governance.images = "never"`)."""
        self._forbidden = not manifest.governance.images_allowed

    def request_event(self, command: str, seconds: float) -> str:
        """Make one more prediction an event, for the command with this id, if one comes within `seconds`.

        Returns: `included` if its image goes along, else why not.

        Raises `PrivacyError` if no event may leave the device, or too many requests wait for predictions.
        """
        if not (self._rules.events or self._rules.images):
            raise PrivacyError("privacy.events and privacy.images are off: no single prediction may leave this device")
        self._drop_expired()
        if len(self._requests) >= _MAX_REQUESTS:
            raise PrivacyError(f"{_MAX_REQUESTS} earlier requests wait for predictions")
        self._requests.append((command, self._clock() + seconds))
        return self._without_image() or "included"

    def _without_image(self) -> str:
        """Why no image leaves the device; empty if images do."""
        if not self._rules.images:
            return "none: privacy.images is off"
        return "none: the model's governance says never" if self._forbidden else ""

    def take_request(self) -> str:
        """Id of a command whose event the next prediction becomes; empty if none waits."""
        if self._requests:
            self._drop_expired()
        return self._requests.popleft()[0] if self._requests else ""

    def _drop_expired(self) -> None:
        """A camera that comes back hours later answers nobody."""
        now = self._clock()
        self._requests = deque(request for request in self._requests if request[1] > now)

    def choose(self, prediction: Prediction) -> Why | None:
        """Return why this prediction becomes an event of its own accord; at most one of each kind in `min_interval_s`.

        The dice are thrown first, without a look at the prediction and with an interval of their own: what is drawn at
        random tells the accuracy, and would not if uncertain predictions were left out of it or used up its time.
        """
        rules, now = self._rules, self._clock()
        if not self._sends:
            return None
        if rules.sample_rate > 0 and now >= self._next_random and self._chance() < rules.sample_rate:
            self._next_random = now + rules.min_interval_s
            return "sampled"
        if now < self._next:
            return None
        low, high = rules.band
        why: Why | None = None
        if low <= prediction.confidence < high:
            why = "uncertain"
        elif rules.ood and self.ood:
            why = "ood"
        if why is not None:
            self._next = now + rules.min_interval_s
        return why

    def choose_disagreement(self) -> bool:
        """Whether a prediction that the previous model disagrees with becomes an event; counts in `min_interval_s`."""
        now = self._clock()
        if not (self._rules.disagreements and self._sends and now >= self._next):
            return False
        self._next = now + self._rules.min_interval_s
        return True

    @property
    def _sends(self) -> bool:
        return self._rules.events or self._rules.images

    def _images_a_day(self, why: str) -> int:
        """Images of a day that events of this kind may use up to: a quarter is kept for those drawn at random."""
        most = self._rules.max_images_per_day
        if self._rules.sample_rate > 0 and why not in ("sampled", "command"):
            return most - math.ceil(most / 4)
        return most

    def image(self, pixels: Pixels | None, spool: Spool, why: str = "") -> tuple[str, dict[str, Any]]:
        """Return the processed image (JPEG in base64, "" for none) and how it was processed or why there is none.

        `why` is the event's reason.
        """
        rules = self._rules
        if reason := self._without_image():
            return "", {"image": reason}
        if pixels is None:
            return "", {"image": "none: the frame could not be decoded"}
        most = self._images_a_day(why)
        if not spool.take_quota(time.strftime("%Y-%m-%d", time.gmtime()), most):
            kept = "" if most == rules.max_images_per_day else f", {most} of them for others than random ones"
            return "", {"image": f"none: only {rules.max_images_per_day} a day are allowed{kept}"}
        processed = process(pixels, crop=rules.crop, max_side=rules.max_side, blur=rules.blur)
        data, quality = encode_jpeg(processed)
        if not data:
            return "", {"image": "none: it cannot be encoded in a small enough JPEG"}
        policy: dict[str, Any] = {
            "width": processed.shape[1],
            "height": processed.shape[0],
            "crop": list(rules.crop),
            "blur": rules.blur,
            "quality": quality,
            "retention_days": rules.retention_days,
            "training": rules.training,
        }
        return base64.b64encode(data).decode(), policy


def process(pixels: Pixels, *, crop: tuple[float, ...], max_side: int, blur: str) -> Pixels:
    """Crop, scale and blur a frame, uint8 [h, w, 3].

    `crop` is (left, top, width, height) as fractions of the image; the longer side becomes `max_side` pixels at most;
    blur `whole` leaves 16 blocks along the longer side.
    """
    height, width = pixels.shape[:2]
    if crop:
        left, top, wide, high = crop
        x, y = min(int(left * width), width - 1), min(int(top * height), height - 1)
        pixels = pixels[y : max(y + 1, int((top + high) * height)), x : max(x + 1, int((left + wide) * width))]
    pixels = _scale_down(pixels, max_side)
    if blur == "whole":
        size = (pixels.shape[1], pixels.shape[0])
        pixels = np.asarray(cv2.resize(_scale_down(pixels, _BLOCKS), size, interpolation=cv2.INTER_NEAREST))
    return pixels


def encode_jpeg(pixels: Pixels) -> tuple[bytes, int]:
    """Encode as JPEG of at most `MAX_JPEG` bytes; return it with its quality, empty if the lowest takes more."""
    for quality in _QUALITIES:
        good, data = cv2.imencode(".jpg", pixels, [cv2.IMWRITE_JPEG_QUALITY, quality])
        if good and data.size <= MAX_JPEG:
            return data.tobytes(), quality
    return b"", 0


def _scale_down(pixels: Pixels, side: int) -> Pixels:
    height, width = pixels.shape[:2]
    scale = side / max(height, width)
    if scale >= 1:
        return pixels
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    return np.asarray(cv2.resize(pixels, size, interpolation=cv2.INTER_AREA))
