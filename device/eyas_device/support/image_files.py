"""Image files below a folder: which are taken, and which are left out and why."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

SUFFIXES = frozenset({".bmp", ".jfif", ".jpe", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"})
"""Of image files, in lower case."""

LITTER = frozenset(
    {
        "$recycle.bin",
        "#recycle",
        "@eadir",
        "__macosx",
        "__pycache__",
        "desktop.ini",
        "ehthumbs.db",
        "lost+found",
        "recycler",
        "system volume information",
        "thumbs.db",
    }
)
"""Files and folders that operating systems, network storage and tools leave behind, in lower case."""
_MAX_KINDS = 6

HIDDEN = "hidden"
TOOLS = "left behind by a system or a tool"
BROKEN = "broken link"
LISTED = "in a folder that is linked twice"
NO_SUFFIX = "without a suffix"
NO_TEXT = "with a name that is not UTF-8"
SPECIAL = "no regular file"
"""Reasons to leave a file out; the others are suffixes that are not in `SUFFIXES`."""


class Listing(NamedTuple):
    """The files below a folder."""

    images: tuple[Path, ...]
    """Image files, sorted by path; links to files and to folders are followed."""
    left_out: Mapping[str, int]
    """Reason (a suffix such as `.heic`, or one of the constants here) -> files."""


def list_image_files(root: Path, *, on_error: Callable[[OSError], None] | None = None) -> Listing:
    """List all files below `root`, each folder once, however it is linked.

    Hidden files and folders, and what systems and tools leave behind, are left out and counted. `on_error` is called
    for a folder that cannot be listed; by default the error is raised.
    """
    images: list[Path] = []
    left_out: Counter[str] = Counter()
    for path, reason in _walk(root, on_error):
        if reason:
            left_out[reason] += 1
        else:
            images.append(path)
    return Listing(tuple(sorted(images)), dict(sorted(left_out.items())))


def is_litter(name: str) -> bool:
    """Whether a file or folder of this name is hidden, or left behind by a system or a tool."""
    return name.startswith(".") or name.lower() in LITTER


def describe_left_out(left_out: Mapping[str, int]) -> str:
    """`14 files left out: 10 .heic, 3 hidden, 1 broken link`; empty if there is none."""
    if not left_out:
        return ""
    total = sum(left_out.values())
    kinds = sorted(left_out.items(), key=lambda item: (-item[1], item[0]))
    shown = [f"{count} {reason}" for reason, count in kinds[:_MAX_KINDS]]
    if len(kinds) > _MAX_KINDS:
        shown.append(f"{sum(count for _, count in kinds[_MAX_KINDS:])} of other kinds")
    return f"{total:,} file{'s' * (total > 1)} left out: {', '.join(shown)}"


def _walk(root: Path, on_error: Callable[[OSError], None] | None) -> Iterator[tuple[Path, str]]:
    """Every file below `root` with the reason to leave it out; an empty one if it is an image."""
    seen: set[tuple[int, int]] = set()
    waiting = [(root, "")]
    while waiting:
        folder, outer = waiting.pop()
        try:
            status = folder.stat()
            key = status.st_dev, status.st_ino
            if key in seen:
                if folder.is_symlink():
                    yield folder, LISTED
                continue
            seen.add(key)
            with os.scandir(folder) as entries:
                found = sorted(entries, key=lambda entry: entry.name)
        except OSError as error:
            if on_error is None:
                raise
            on_error(error)
            continue
        folders = []
        for entry in found:
            path, reason = folder / entry.name, outer or _name_reason(entry.name)
            if _is_folder(entry) and not (reason and entry.is_symlink()):
                folders.append((path, reason))
            else:
                yield path, reason or _file_reason(path)  # of a link to a folder that is left out, the link alone
        # real folders before links to them, so that a link does not take a folder's name away
        waiting += sorted(folders, key=lambda item: (not item[0].is_symlink(), item[0].name), reverse=True)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _name_reason(name: str) -> str:
    if name.startswith("."):
        return HIDDEN
    return TOOLS if name.lower() in LITTER else ""


def _file_reason(path: Path) -> str:
    try:
        os.fsencode(path).decode()
    except UnicodeDecodeError:
        return NO_TEXT
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        return suffix or NO_SUFFIX
    try:
        if path.is_file():
            return ""
        return SPECIAL if path.exists() else BROKEN
    except OSError:
        return BROKEN
