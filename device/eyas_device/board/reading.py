"""Reading what a kernel tells in small files, and what a board's own command prints: None for whatever is not there."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

ROOT = Path("/")
NOT_MEASURED = "not measured"
"""What a table says in place of a figure that is None."""

Runner = Callable[[Sequence[str], float], str | None]
"""Runs a command for at most so many seconds; what it printed, or None if it is not there, failed or took longer."""

COMMAND_S = 2.0
_MOST_BYTES = 1 << 20


def text(path: Path) -> str | None:
    """The text of a small file, without white space and NULs at its ends; None if it cannot be read or is empty."""
    try:
        if not path.is_file():  # a pipe would block
            return None
        with path.open("rb") as stream:
            data = stream.read(_MOST_BYTES)
    except (OSError, ValueError):  # a sensor that is switched off answers with an error
        return None
    return data.decode(errors="replace").strip("\0 \t\r\n") or None


def number(path: Path, *, scale: float = 1.0, least: float = -math.inf, most: float = math.inf) -> float | None:
    """The number in a file times `scale`; None unless it is a finite number from `least` to `most`."""
    return as_number(text(path), scale=scale, least=least, most=most)


def as_number(
    told: str | None, *, scale: float = 1.0, least: float = -math.inf, most: float = math.inf
) -> float | None:
    """`number` of a text that was read already."""
    try:
        value = float(told or "") * scale
    except ValueError:
        return None
    return value if math.isfinite(value) and least <= value <= most else None


def folders(parent: Path, pattern: str) -> list[Path]:
    """The folders in `parent` that match, in the order of their numbers: `cpu2` comes before `cpu10`."""
    try:
        found = [path for path in parent.glob(pattern) if path.is_dir()]
    except OSError:
        return []
    return sorted(found, key=lambda path: (len(path.name), path.name))


def fields(told: str | None) -> list[tuple[str, str]]:
    """The `name : value` lines of files such as `/proc/cpuinfo`, in order."""
    pairs = (line.partition(":") for line in (told or "").splitlines())
    return [(name.strip(), value.strip()) for name, colon, value in pairs if colon]
