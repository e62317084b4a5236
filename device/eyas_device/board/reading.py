"""Small files of the kernel, read leniently: None for whatever is missing or malformed."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

ROOT = Path("/")
NOT_MEASURED = "not measured"
"""Shown in place of a value that is None."""

CommandRunner = Callable[[Sequence[str], float], str | None]
"""`run(command, timeout_s)`: its standard output, or None if it is missing, failed or timed out."""

COMMAND_S = 2.0
_MAX_BYTES = 1 << 20


def text(path: Path) -> str | None:
    """The content of a small file, stripped of white space and NULs; None if it cannot be read or is empty."""
    try:
        if not path.is_file():  # a pipe would block
            return None
        with path.open("rb") as stream:
            data = stream.read(_MAX_BYTES)
    except (OSError, ValueError):  # a sensor that is switched off answers with an error
        return None
    return data.decode(errors="replace").strip("\0 \t\r\n") or None


def number(path: Path, *, scale: float = 1.0, minimum: float = -math.inf, maximum: float = math.inf) -> float | None:
    """The number in a file times `scale`; None unless the result is finite and from `minimum` to `maximum`."""
    return as_number(text(path), scale=scale, minimum=minimum, maximum=maximum)


def as_number(
    content: str | None, *, scale: float = 1.0, minimum: float = -math.inf, maximum: float = math.inf
) -> float | None:
    """Parse content that has been read already, like `number`."""
    try:
        value = float(content or "") * scale
    except ValueError:
        return None
    return value if math.isfinite(value) and minimum <= value <= maximum else None


def folders(parent: Path, pattern: str) -> list[Path]:
    """The folders in `parent` that match `pattern`, in numeric order: `cpu2` before `cpu10`."""
    try:
        matches = [path for path in parent.glob(pattern) if path.is_dir()]
    except OSError:
        return []
    return sorted(matches, key=lambda path: (len(path.name), path.name))


def fields(content: str | None) -> list[tuple[str, str]]:
    """The `name : value` pairs of a file such as `/proc/cpuinfo`, in order."""
    pairs = (line.partition(":") for line in (content or "").splitlines())
    return [(name.strip(), value.strip()) for name, colon, value in pairs if colon]
