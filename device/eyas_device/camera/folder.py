"""Image files below a folder as frames: for a first try, to replay an incident, to check accuracy on site."""

from __future__ import annotations

import logging
import os
import stat
import time
from pathlib import Path

from eyas_device.camera import TIMEOUT_S, Frame
from eyas_device.errors import CameraError, CameraSpecError, ImageError
from eyas_device.support.closing import Closing
from eyas_device.support.files import expand_home
from eyas_device.support.image_files import SUFFIXES, describe_left_out, list_image_files

_logger = logging.getLogger(__name__)


class FolderCamera(Closing):
    """Every image file below `root`, sorted by path, each once and still encoded; others are counted in the log."""

    live = False

    def __init__(self, root: Path) -> None:
        try:
            is_folder = stat.S_ISDIR(root.stat().st_mode)
        except (OSError, ValueError) as error:
            why = "no such folder" if isinstance(error, FileNotFoundError) else getattr(error, "strerror", error)
            raise CameraError(f"camera folder:{root}: {why}") from None
        if not is_folder:
            raise CameraError(f"camera folder:{root}: is a file; give the folder that it lies in, {root.parent}")
        self._paths = iter(_images(root))

    @classmethod
    def open(cls, rest: str, *, timeout_s: float = TIMEOUT_S) -> FolderCamera:
        """Open `folder:PATH`. Raises `CameraError` if the folder is missing, unreadable or has no image file."""
        return cls(cls.parse(rest))

    @staticmethod
    def parse(rest: str) -> Path:
        """Path of a specification. Raises `CameraSpecError` for an empty one."""
        if not rest:
            raise CameraSpecError("camera folder: no folder given; write folder:PATH")
        return Path(expand_home(rest))

    def capture(self) -> Frame | None:
        """Return the next image file; None after the last. Raises `ImageError` if it cannot be read."""
        path = next(self._paths, None)
        if path is None:
            return None
        try:
            return Frame(image=path.read_bytes(), time=time.time(), source=str(path))
        except OSError as error:
            raise ImageError(f"{path}: cannot be read ({error.strerror})") from None


def _images(root: Path) -> tuple[Path, ...]:
    def fail(error: OSError) -> None:
        raise CameraError(f"camera folder:{root}: {error.filename} cannot be listed ({error.strerror})") from None

    images, left_out, misnamed = list_image_files(root, on_error=fail)
    said = describe_left_out(left_out) + (f" ({os.fsencode(misnamed[0])!r})" if misnamed else "")
    if not images:
        raise CameraError(
            f"camera folder:{root}: no image files; looked for {', '.join(sorted(SUFFIXES))}" + f"; {said}" * bool(said)
        )
    if said:
        _logger.info("camera folder:%s: %s", root, said)
    return images
