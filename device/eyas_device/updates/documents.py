"""Targets that were fetched before, by their hash: a look at an unchanged repository costs one small file."""

from __future__ import annotations

import re
from contextlib import suppress
from pathlib import Path

from tuf.api.exceptions import RepositoryError
from tuf.api.metadata import TargetFile

from eyas_device.support.files import atomic_write

_HASH = re.compile("[0-9a-f]{64}")
_KEPT = 16


class Documents:
    """A folder of targets' contents; what is in it counts only if it has the signed length and hashes.

    A disk that does not take a file costs a download, and nothing else.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def get(self, info: TargetFile) -> bytes | None:
        """A target's content; None if it is not here, or is not what was signed."""
        path = self._path(info)
        with suppress(OSError, RepositoryError):
            if path is not None and path.is_file() and path.stat().st_size == info.length:
                data = path.read_bytes()
                info.verify_length_and_hashes(data)
                return data
        return None

    def put(self, info: TargetFile, data: bytes) -> None:
        """Keep a target's verified content, and the newest others."""
        path = self._path(info)
        with suppress(OSError):
            if path is not None:
                self._folder.mkdir(exist_ok=True)
                atomic_write(path, data)
                found = sorted(self._folder.iterdir(), key=lambda one: one.stat().st_mtime, reverse=True)
                for old in found[_KEPT:]:
                    old.unlink()

    def _path(self, info: TargetFile) -> Path | None:
        digest = info.hashes.get("sha256", "")
        return self._folder / digest if _HASH.fullmatch(digest) else None
