"""Settings of OpenCV that have to be in the environment before it is imported."""

from __future__ import annotations

import os

from eyas_device.support.image_header import MAX_PIXELS

LIMITS = {"OPENCV_IO_MAX_IMAGE_PIXELS": str(MAX_PIXELS)}
"""A second bound beside the one on an image's header: OpenCV refuses what it would decode to more pixels."""
QUIET = {"OPENCV_LOG_LEVEL": "SILENT", "OPENCV_FFMPEG_LOGLEVEL": "-8"}  # AV_LOG_QUIET
"""Environment variables that silence OpenCV and its FFmpeg; the function for it differs between OpenCV 4 and 5."""


def silence_opencv() -> None:
    """Keep OpenCV and its FFmpeg from writing to standard error, and bound images. Call it before `import cv2`."""
    for name, value in (QUIET | LIMITS).items():
        os.environ.setdefault(name, value)
