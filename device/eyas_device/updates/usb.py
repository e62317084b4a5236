"""A repository in a folder: a USB stick, a network share or a copy, with the same signatures as on a server."""

from __future__ import annotations

from pathlib import Path

from eyas_device.updates.refusals import MissingError

NAMES = (".", "eyas", "repository")
"""Where below a stick's folder the repository may be."""


def find_repository(folder: Path) -> str:
    """The absolute path of the repository in, or right below, a folder. Raises `MissingError` without one."""
    for name in NAMES:
        found = folder / name
        if (found / "metadata" / "timestamp.json").is_file():
            return str(found.resolve())
    where = folder if folder.is_dir() else f"{folder} (there is no such folder; is it mounted?)"
    raise MissingError(f"{where}: no repository; `eyas publish --to FOLDER` writes one, with metadata/timestamp.json")
