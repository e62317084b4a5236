"""Base class of the V4L2, RTSP and GStreamer readers: `cv2.VideoCapture` in the child of `subprocess.py`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import cv2
import msgspec
import numpy as np
import numpy.typing as npt

from eyas_device.errors import CameraError, ImageError

_JPEG_TRIES = 3
"""Frames without a JPEG after which a device that promised JPEG is asked for pixels instead."""


class Settings(msgspec.Struct, frozen=True):
    """Source and requested format of a `cv2.VideoCapture`."""

    source: str
    """Device path, address or pipeline."""
    timeout_s: float = 5.0
    size: tuple[int, int] | None = None
    """Requested width and height, pixels."""
    fps: float | None = None
    """Requested frame rate, frames per second."""
    format: str = ""
    """`mjpg`, `yuyv`, or empty: mjpg if the device supports it."""
    controls: dict[str, float | str] = {}
    """Control -> value or `auto`."""


class OpenCVReader:
    """Reads with `cv2.VideoCapture`; subclasses set the backend and properties, and explain failures."""

    backend: int

    def __init__(self, settings: dict[str, Any]) -> None:
        """Open the source. Raises `open_error()` if it does not open."""
        cv2.setNumThreads(1)
        self.settings = msgspec.convert(settings, Settings)
        self.note = ""
        """How the source differs from the request."""
        self.problems: list[str] = []
        """Controls that could not be set."""
        self._undecoded = False
        self._tries_left = 0
        self._buffer: npt.NDArray[np.uint8] | None = None
        self.check_source()
        try:
            self.video = cv2.VideoCapture(self.settings.source, self.backend, list(self.properties()))
        except cv2.error as error:
            raise CameraError(f"OpenCV cannot open it ({error.err})") from None
        if not self.video.isOpened():
            self.video.release()
            raise self.open_error()
        self.configure()

    def check_source(self) -> None:
        """Check the source before OpenCV opens it. Raises `CameraError`."""

    def properties(self) -> Sequence[int]:
        """Flat pairs of property and value to open with."""
        return ()

    def configure(self) -> None:
        """Set properties of the open source."""

    def open_error(self) -> CameraError:
        """Error that explains why the source did not open."""
        return CameraError("it does not open")

    def take_undecoded(self) -> None:
        """Keep the device's JPEG bytes undecoded, as long as they are JPEG."""
        self._undecoded = bool(self.video.set(cv2.CAP_PROP_CONVERT_RGB, 0))
        self._tries_left = _JPEG_TRIES

    def grab(self) -> bool:
        """Wait for the next frame; False at the end of the stream."""
        return bool(self.video.grab())

    def retrieve(self, buffer: npt.NDArray[np.uint8]) -> npt.NDArray[Any] | bytes:
        """The grabbed frame, as JPEG bytes or BGR pixels; decoded into `buffer` if OpenCV can."""
        try:
            good, image = self.video.retrieve() if self._buffer is None else self.video.retrieve(self._buffer)
        except cv2.error as error:
            raise ImageError(f"cannot be decoded ({error.err})") from None
        if not good or image is None:
            raise ImageError("cannot be decoded")
        if 1 in image.shape[:2] and image.dtype == np.uint8:
            data = trim_jpeg(image.tobytes())
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
        if self._buffer is None or self._buffer.shape != image.shape:
            fits = image.dtype == np.uint8 and image.ndim == 3 and 0 < image.nbytes <= len(buffer)
            self._buffer = buffer[: image.nbytes].reshape(image.shape) if fits else None
        return np.asarray(image)

    def close(self) -> None:
        """Release the device."""
        self._buffer = None
        self.video.release()


def trim_jpeg(data: bytes) -> bytes | None:
    """Cut `data` after the JPEG that it starts with, for drivers that return their whole buffer; None without a JPEG.

    Source: ITU-T T.81, B.1.1 (markers; in entropy-coded data, FF is followed by 00).
    """
    if data[:3] != b"\xff\xd8\xff":
        return None
    position = 2
    while data[position : position + 1] == b"\xff":
        marker = data[position + 1 : position + 2]
        if marker == b"\xff":  # fill
            position += 1
            continue
        if marker == b"\xda":  # the scan; a thumbnail would end in an earlier segment
            end = data.find(b"\xff\xd9", position)
            return data if end < 0 else data[: end + 2]
        position += 2 + int.from_bytes(data[position + 2 : position + 4], "big")
    return None
