"""Image files below a folder as frames: for a first try, to replay an incident, to check accuracy on site."""

from __future__ import annotations

import os
import time
from pathlib import Path

from eyas_device.camera import TIMEOUT_S, Frame
from eyas_device.errors import CameraError, ImageError
from eyas_device.support.closing import Closing

SUFFIXES = frozenset({".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"})


class FolderCamera(Closing):
    """Every image file below `root`, sorted by path, each once and still encoded."""

    live = False

    def __init__(self, root: Path) -> None:
        if not root.is_dir():
            raise CameraError(f"camera folder:{root}: no such folder")
        self._paths = iter(_images(root))

    @classmethod
    def open(cls, rest: str, *, timeout_s: float = TIMEOUT_S) -> FolderCamera:
        """Open `folder:PATH`. Raises `CameraError` if the folder is missing, unreadable or has no image file."""
        if not rest:
            raise CameraError("camera folder: no folder given; write folder:PATH")
        return cls(Path(rest))

    def capture(self) -> Frame | None:
        """Return the next image file; None after the last. Raises `ImageError` if it cannot be read."""
        path = next(self._paths, None)
        if path is None:
            return None
        try:
            return Frame(image=path.read_bytes(), time=time.time(), source=str(path))
        except OSError as error:
            raise ImageError(f"{path}: cannot be read ({error.strerror})") from None


def _images(root: Path) -> list[Path]:
    def fail(error: OSError) -> None:
        raise CameraError(f"camera folder:{root}: {error.filename} cannot be listed ({error.strerror})") from None

    paths = sorted(
        Path(folder) / name
        for folder, _, names in os.walk(root, onerror=fail)
        for name in names
        if Path(name).suffix.lower() in SUFFIXES and not name.startswith(".")
    )
    if not paths:
        raise CameraError(f"camera folder:{root}: no image files; looked for {', '.join(sorted(SUFFIXES))}")
    return paths
