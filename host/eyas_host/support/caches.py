"""Where libraries keep what they can make again: below the user's cache folder, or in a private folder of TMPDIR."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from eyas_host.support.errors import StageError
from eyas_host.support.files import cache_folder

_OWN = "eyas"


def place_caches() -> None:
    """Say where libraries cache, before one of them is imported; variables that the user has set stay.

    Matplotlib's list of fonts goes to `eyas/matplotlib` in the user's cache folder. A user without a usable home has
    all caches in a private folder of TMPDIR: weights from the hub, fonts, and what torch compiles.
    """
    usual = _usual()
    if usual is None:
        with suppress(StageError):  # it is reported by what needs a cache
            private = cache_folder(_OWN).parent
            os.environ["XDG_CACHE_HOME"] = str(private)
            os.environ.setdefault("TRITON_CACHE_DIR", str(private / "triton"))
            os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(private / "torchinductor"))
            usual = private
    if usual is not None:
        os.environ.setdefault("MPLCONFIGDIR", str(usual / _OWN / "matplotlib"))


def _usual() -> Path | None:
    """The user's cache folder, None if it neither can be written nor made."""
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        nearest = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    except (OSError, RuntimeError):  # RuntimeError: a user without a home
        return None
    return folder if nearest.is_dir() and os.access(nearest, os.W_OK | os.X_OK) else None
