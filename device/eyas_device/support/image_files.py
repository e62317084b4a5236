"""Image files below a folder: which are taken, and which are left out and why."""

from __future__ import annotations

import contextlib
import os
import re
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

SUFFIXES = frozenset({".bmp", ".jfif", ".jpe", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"})
"""Of image files, in lower case."""

LITTER = frozenset(
    {
        *("$recycle.bin", "recycler", "system volume information", "config.msi", "desktop.ini", "picasa.ini"),
        *("thumbs.db", "ehthumbs.db", "ehthumbs_vista.db", "zbthumbnail.info"),
        *("__macosx", "icon\r", "network trash folder", "temporary items", "thevolumesettingsfolder"),
        *("lost+found", "__pycache__", "node_modules", "captureone"),
        *("@eadir", "@recycle", "@recently-snapshot", "@sharebin", "@tmp", "#recycle", "#snapshot", "~snapshot"),
    }
)
"""Files and folders that operating systems, network storage and tools leave behind, in lower case."""
_LITTER_PATTERN = re.compile(r"found\.\d{3}|.*\.lrdata|~\$.*", re.DOTALL)
"""What a disk check finds, previews of a photo program, locks of an office program."""
_USUAL_SUFFIX = re.compile(r"\.(?=.*[a-z])[a-z0-9_+~-]{1,10}")
_MAX_KINDS = 6
OWN_FOLDER = ".eyas"
"""Folder of Eyas' own beside images; it is not even counted."""

HIDDEN = "hidden"
TOOLS = "left behind by a system or a tool"
BROKEN = "broken link"
LISTED = "link to a folder that is listed already"
AROUND = "link to a folder that it lies in"
NO_SUFFIX = "without a usual suffix"
NO_TEXT = "with a name that is not UTF-8"
SPECIAL = "no regular file"
"""Reasons to leave a file out; the others are suffixes that are not in `SUFFIXES`."""


class Listing(NamedTuple):
    """The files below a folder."""

    images: tuple[Path, ...]
    """Image files, sorted by path; links to files and to folders are followed."""
    left_out: Mapping[str, int]
    """Reason (a suffix such as `.heic`, or one of the constants here) -> files, or links to folders."""
    misnamed: tuple[Path, ...] = ()
    """Image files among them whose names are not UTF-8, so that no message and no table can hold them."""


def list_image_files(root: Path, *, on_error: Callable[[OSError], None] | None = None) -> Listing:
    """List all files below `root`, each folder once, however it is linked.

    A folder keeps its own place, if it has one below `root`: links to folders are followed last. Hidden files and
    folders, and what systems and tools leave behind, are left out and counted. `on_error` is called for a folder that
    cannot be listed; by default the error is raised.
    """
    images: list[Path] = []
    misnamed: list[Path] = []
    left_out: Counter[str] = Counter()
    for path, reason in _walk(root, on_error):
        if reason:
            left_out[reason] += 1
        else:
            images.append(path)
        if reason == NO_TEXT:
            misnamed.append(path)
    return Listing(tuple(sorted(images)), dict(sorted(left_out.items())), tuple(sorted(misnamed)))


def is_litter(name: str) -> bool:
    """Whether a file or folder of this name is hidden, or left behind by a system or a tool."""
    return bool(_name_reason(name))


def describe_left_out(left_out: Mapping[str, int]) -> str:
    """`14 files left out: 10 .heic, 3 hidden, 1 broken link`; empty if there is none."""
    if not left_out:
        return ""
    total = sum(left_out.values())
    kinds = sorted(left_out.items(), key=lambda item: (-item[1], item[0]))
    shown = [f"{count:,} {reason}" for reason, count in kinds[:_MAX_KINDS]]
    if len(kinds) > _MAX_KINDS:
        shown.append(f"{sum(count for _, count in kinds[_MAX_KINDS:]):,} of other kinds")
    return f"{total:,} file{'s' * (total > 1)} left out: {', '.join(shown)}"


_Key = tuple[int, int] | str


def _walk(root: Path, on_error: Callable[[OSError], None] | None) -> Iterator[tuple[Path, str]]:
    """Every file below `root` with the reason to leave it out; an empty one if it is an image."""
    around = _around(root)
    seen: set[_Key] = set()
    folders, links = [(root, "")], deque[Path]()
    while folders or links:
        folder, outer = folders.pop() if folders else (links.popleft(), "")
        try:
            key = _key(folder)
            if not outer and (key in seen or key in around):
                yield folder, AROUND if key in around else LISTED
                continue
            with os.scandir(folder) as entries:
                found = sorted(entries, key=lambda entry: entry.name, reverse=True)
        except OSError as error:
            if outer:
                yield folder, outer  # a trash of other users, for example
            elif on_error is None:
                raise
            else:
                on_error(error)
            continue
        if not outer:
            seen.add(key)
        followed = []
        for entry in found:
            if entry.name == OWN_FOLDER:
                continue
            path, reason = folder / entry.name, outer or _name_reason(entry.name)
            if not _is_folder(entry):
                yield path, reason or _file_reason(path)
            elif not entry.is_symlink():
                folders.append((path, reason))
            elif reason:
                yield path, reason  # of a link to a folder that is left out, the link alone
            else:
                followed.append(path)
        links.extend(reversed(followed))


def _around(root: Path) -> set[_Key]:
    """The folders that `root` lies in, by its name and by where it really is."""
    keys: set[_Key] = set()
    for parent in {*root.absolute().parents, *Path(os.path.realpath(root)).parents}:
        with contextlib.suppress(OSError):
            keys.add(_key(parent))
    return keys


def _key(folder: Path) -> _Key:
    """What is the same for one folder under several names; not every file system has numbers for it."""
    status = folder.stat()
    return (status.st_dev, status.st_ino) if status.st_ino else os.path.realpath(folder)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _name_reason(name: str) -> str:
    if name.startswith("."):
        return HIDDEN
    name = name.lower()
    return TOOLS if name in LITTER or _LITTER_PATTERN.fullmatch(name) else ""


def _file_reason(path: Path) -> str:
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        return suffix if _USUAL_SUFFIX.fullmatch(suffix) else NO_SUFFIX
    try:
        os.fsencode(path).decode()
    except UnicodeDecodeError:
        return NO_TEXT
    try:
        if path.is_file():
            return ""
        return SPECIAL if path.exists() else BROKEN
    except OSError:
        return BROKEN
