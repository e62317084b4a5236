"""What every compiler hands back."""

from __future__ import annotations

from pathlib import Path

import msgspec


class Compiled(msgspec.Struct, frozen=True):
    """A written artefact."""

    path: Path
    size_bytes: int
    notes: str = ""
