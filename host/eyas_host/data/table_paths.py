"""Paths that a table names: found as they are written, or as Windows, browsers and shells write them."""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Literal
from urllib.parse import unquote, urlsplit

_DRIVE = re.compile(r"[A-Za-z]:[\\/]")
_WEB = re.compile(r"(?:https?|s3|gs|ftp|az)://", re.IGNORECASE)
_FORMULA = re.compile(r"=\w*[(\"]")
_MAX_NAMES = 100_000
"""Files of a folder among which a similar name is looked for."""


def is_formula(cell: str) -> bool:
    """Whether a cell is a spreadsheet's formula instead of its value."""
    return _FORMULA.match(cell) is not None


def find_file(text: str, base: Path) -> tuple[str, str]:
    """Absolute path of the file that a cell names, relative to `base`, and how it had to be read (empty: as it is).

    If there is no such file: where it would lie, as it is written.
    """
    literal = _normal(base, text)
    if is_file(literal):
        return literal, ""
    for other, how in _readings(text):
        path = _normal(base, other)
        if is_file(path):
            return path, how
    return literal, ""


def explain_missing(text: str, base: Path) -> str:
    """What may be wrong with a path that leads to no file, as a hint; empty if nothing is known."""
    if is_formula(text):
        return "is a formula: paste the column as values"
    if _WEB.match(text):
        return "is a web address: download the images and name the files"
    if len(text) > 2 and text[0] == text[-1] and text[0] in "'`" and is_file(_normal(base, text[1:-1])):
        return 'has single quotes, which count as part of the name: write double quotes (") or none'
    path = Path(_normal(base, text))
    if _is_folder(path):
        return "is a folder"
    if "\\" in text or _DRIVE.match(text):
        where = "a Windows path of another machine" if _DRIVE.match(text) or text[:2] == "\\\\" else "with backslashes"
        return f"is {where}: write the paths relative to the table"
    if is_file(_normal(Path.cwd(), text)):
        return (
            f"lies below the current folder: move the table to {Path.cwd()}, or write the paths relative to the table"
        )
    similar = _similar(path)
    if similar:
        return f"did you mean {similar}?"
    if text.startswith("#"):
        return "begins with #: a comment? remove the line"
    return ""


def is_file(path: str) -> bool:
    """Whether there is such a file; names that no system allows are none."""
    try:
        return Path(path).is_file()
    except (OSError, ValueError):
        return False


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except (OSError, ValueError):
        return False


def _normal(base: Path, text: str) -> str:
    return os.path.normpath(base / text)


def _readings(text: str) -> Iterator[tuple[str, str]]:
    """Other readings of a path, each with its name."""
    if text.lower().startswith("file:"):
        url = urlsplit(text)
        yield unquote(url.path), "as file:// addresses"
        return
    if "\\" in text:
        yield text.replace("\\", "/"), "with backslashes for slashes"
    if "%" in text:
        yield unquote(text), "with %20 and the like for characters"
    if text.startswith("~"):
        yield os.path.expanduser(text), "with ~ for the home folder"  # noqa: PTH111 - without a home it stays
    if not text.isascii():
        forms: tuple[Literal["NFC", "NFD"], ...] = ("NFC", "NFD")
        for form in forms:
            yield unicodedata.normalize(form, text), "in another form of Unicode"


def _similar(path: Path) -> str:
    """The file beside `path` of the same name in another case, or with a suffix; a folder's case counts too."""
    folder = path.parent
    if not _is_folder(folder):
        twin = _similar_folder(folder)
        if twin is None:
            return ""
        folder = twin
    names = _names(folder)
    wanted = path.name.lower()
    for name in names:
        if name.lower() == wanted or name.lower().rpartition(".")[0] == wanted:
            return str(folder / name)
    stem = wanted.rpartition(".")[0]
    return next((str(folder / name) for name in names if stem and name.lower().rpartition(".")[0] == stem), "")


def _similar_folder(folder: Path) -> Path | None:
    outer = folder.parent
    if outer == folder:
        return None
    if not _is_folder(outer):
        twin = _similar_folder(outer)
        if twin is None:
            return None
        outer = twin
    return next((outer / n for n in _names(outer) if n.lower() == folder.name.lower() and _is_folder(outer / n)), None)


def _names(folder: Path) -> list[str]:
    try:
        with os.scandir(folder) as entries:
            return sorted(entry.name for entry, _ in zip(entries, range(_MAX_NAMES), strict=False))
    except OSError:
        return []
