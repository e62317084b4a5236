"""Base class of the RTSP and GStreamer readers: `cv2.VideoCapture` in the child of `subprocess.py`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import cv2
import msgspec
import numpy as np
import numpy.typing as npt

from eyas_device.errors import CameraError, ImageError


class Settings(msgspec.Struct, frozen=True):
    """Source of a `cv2.VideoCapture`."""

    source: str
    """Address or pipeline."""
    timeout_s: float = 5.0


class OpenCVReader:
    """Reads with `cv2.VideoCapture`; subclasses set the backend and its properties, and explain failures."""

    backend: int

    def __init__(self, settings: dict[str, Any]) -> None:
        """Open the source. Raises `open_error()` if it does not open."""
        cv2.setNumThreads(1)
        self.settings = msgspec.convert(settings, Settings)
        self._buffer: npt.NDArray[np.uint8] | None = None
        self.check_source()
        try:
            self.video = cv2.VideoCapture(self.settings.source, self.backend, list(self.properties()))
        except cv2.error as error:
            raise CameraError(f"OpenCV cannot open it ({error.err})") from None
        if not self.video.isOpened():
            self.video.release()
            raise self.open_error()

    def check_source(self) -> None:
        """Check the source before OpenCV opens it. Raises `CameraError`."""

    def properties(self) -> Sequence[int]:
        """Flat pairs of property and value to open with."""
        return ()

    def open_error(self) -> CameraError:
        """Error that explains why the source did not open."""
        return CameraError("it does not open")

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
                return data
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
