"""OpenCV's video capture as a `Reader`: what V4L2, RTSP and GStreamer share. It runs in the child of `isolated.py`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import cv2
import msgspec
import numpy as np
import numpy.typing as npt

from eyas_device.errors import CameraError, ImageError

_TRIES = 3
"""Frames that may be no JPEG before a device that promised JPEG is asked for pixels instead."""


class Settings(msgspec.Struct, frozen=True):
    """What `cv2.VideoCapture` is opened on."""

    source: str
    """Device path, address or pipeline."""
    timeout_s: float = 5.0
    size: tuple[int, int] | None = None
    """Width and height to ask for, pixels."""
    fps: float | None = None
    """Rate to ask for, frames per second."""
    format: str = ""
    """`mjpg`, `yuyv`, or empty: mjpg where the device has it."""


class OpenCVReader:
    """Reads with `cv2.VideoCapture`; a subclass says which backend, with which properties, and explains failures."""

    backend: int

    def __init__(self, settings: dict[str, Any]) -> None:
        """Open the source. Raises `CameraError` with what `explain` says if it does not open."""
        cv2.setNumThreads(1)
        self.settings = msgspec.convert(settings, Settings)
        self.note = ""
        """How the source differs from what was asked for."""
        self._undecoded = False
        self._tries_left = 0
        self._place: npt.NDArray[np.uint8] | None = None
        self.before()
        try:
            self.video = cv2.VideoCapture(self.settings.source, self.backend, list(self.properties()))
        except cv2.error as error:
            raise CameraError(f"OpenCV cannot open it ({error.err})") from None
        if not self.video.isOpened():
            self.video.release()
            raise self.explain()
        self.arrange()

    def before(self) -> None:
        """Check what can be checked before OpenCV opens the source. Raises `CameraError`."""

    def properties(self) -> Sequence[int]:
        """Pairs of property and value to open with."""
        return ()

    def arrange(self) -> None:
        """Set what is set on an open source."""

    def explain(self) -> CameraError:
        """Why the source did not open."""
        return CameraError("it does not open")

    def take_undecoded(self) -> None:
        """Take the device's JPEG bytes as they are, for as long as they turn out to be JPEG."""
        self._undecoded = bool(self.video.set(cv2.CAP_PROP_CONVERT_RGB, 0))
        self._tries_left = _TRIES

    def grab(self) -> bool:
        """Wait for the next frame; False when there is none any more."""
        return bool(self.video.grab())

    def retrieve(self, room: npt.NDArray[np.uint8]) -> npt.NDArray[Any] | bytes:
        """The grabbed frame, as its JPEG bytes or in BGR; decoded into `room` if OpenCV agrees."""
        try:
            good, image = self.video.retrieve() if self._place is None else self.video.retrieve(self._place)
        except cv2.error as error:
            raise ImageError(f"cannot be decoded ({error.err})") from None
        if not good or image is None:
            raise ImageError("cannot be decoded")
        if 1 in image.shape[:2] and image.dtype == np.uint8:
            data = jpeg(image.tobytes())
            if data is not None:
                self._tries_left = -1
                return data
        if self._undecoded:
            if self._tries_left > 0:
                self._tries_left -= 1
                if self._tries_left == 0:
                    self.video.set(cv2.CAP_PROP_CONVERT_RGB, 1)
                    self._undecoded = False
            raise ImageError("not a JPEG, though the device promised one")
        if self._place is None or self._place.shape != image.shape:
            fits = image.dtype == np.uint8 and image.ndim == 3 and 0 < image.nbytes <= len(room)
            self._place = room[: image.nbytes].reshape(image.shape) if fits else None
        return np.asarray(image)

    def close(self) -> None:
        """Give the device back."""
        self._place = None
        self.video.release()


def jpeg(data: bytes) -> bytes | None:
    """`data` up to the end of the JPEG that it begins with, for drivers that give their whole buffer; None if none.

    Source: ITU-T T.81, B.1.1 (markers; in entropy-coded data, FF is followed by 00).
    """
    if data[:3] != b"\xff\xd8\xff":
        return None
    place = 2
    while data[place : place + 1] == b"\xff":
        marker = data[place + 1 : place + 2]
        if marker == b"\xff":  # fill
            place += 1
            continue
        if marker == b"\xda":  # the scan; a thumbnail's end lies in a segment before it
            end = data.find(b"\xff\xd9", place)
            return data if end < 0 else data[: end + 2]
        place += 2 + int.from_bytes(data[place + 2 : place + 4], "big")
    return None
