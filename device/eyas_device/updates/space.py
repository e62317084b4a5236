"""Free space of the disk that updates are written to, looked at before anything is written."""

from __future__ import annotations

import os
from pathlib import Path

MARGIN_BYTES = 1 << 20
"""Stays free beside what is written."""


def shortage(folder: Path, needed: int, *, reclaimed: int = 0) -> str:
    """What is missing for `needed` bytes below `folder`, for people; empty if they fit.

    Args:
        folder: An existing folder of the disk.
        needed: Size of what is to be written, bytes.
        reclaimed: Size of what is removed before that, bytes.

    """
    filesystem = os.statvfs(folder)
    free = filesystem.f_bavail * filesystem.f_frsize + reclaimed
    if free >= needed + MARGIN_BYTES:
        return ""
    return f"{folder}: {free / 1e6:.1f} MB free, {(needed + MARGIN_BYTES) / 1e6:.1f} MB needed; free some space"


def stored_bytes(folder: Path) -> int:
    """Size of everything below a folder, bytes; 0 for a link and for what is not there."""
    if folder.is_symlink() or not folder.is_dir():
        return 0
    return sum(path.lstat().st_size for path in folder.rglob("*"))
