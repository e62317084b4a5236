"""Pieces of small test bundles."""

from __future__ import annotations

from pathlib import Path

from eyas_device.bundle import (
    File,
    sha256,
)

TEMPERATURE = 1.5


def entry(path: Path) -> File:
    return File(path=path.name, sha256=sha256(path), size_bytes=path.stat().st_size)
