"""Video files as frames."""

from __future__ import annotations

import time
from pathlib import Path

import cv2
import numpy as np

from eyas_device.camera import TIMEOUT_S, Frame
from eyas_device.errors import CameraError, CameraSpecError
from eyas_device.support.closing import Closing
from eyas_device.support.files import expand_home


class VideoCamera(Closing):
    """Every frame of a video file, in order."""

    live = False

    def __init__(self, path: Path) -> None:
        if not path.is_file():
            raise CameraError(f"camera video:{path}: no such file")
        self._path = path
        self._number = 0
        self._video = cv2.VideoCapture(str(path))
        if not self._video.isOpened():
            self.close()
            raise CameraError(f"camera video:{path}: not a video that can be decoded here")

    @classmethod
    def open(cls, rest: str, *, timeout_s: float = TIMEOUT_S) -> VideoCamera:
        """Open `video:PATH`. Raises `CameraError` if the file is missing or not a video."""
        return cls(cls.parse(rest))

    @staticmethod
    def parse(rest: str) -> Path:
        """Path of a specification. Raises `CameraSpecError` for an empty one."""
        if not rest:
            raise CameraSpecError("camera video: no file given; write video:PATH")
        return Path(expand_home(rest))

    def capture(self) -> Frame | None:
        """Return the next frame; None after the last. Raises `CameraError` if not even the first can be decoded."""
        good, pixels = self._video.read()
        if not good:
            if self._number == 0:
                raise CameraError(f"camera video:{self._path}: no frame can be decoded")
            return None
        source = f"{self._path}#{self._number}"
        self._number += 1
        return Frame(image=np.asarray(pixels, dtype=np.uint8), time=time.time(), source=source)

    def close(self) -> None:
        self._video.release()
