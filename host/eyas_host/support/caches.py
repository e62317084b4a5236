"""Where libraries keep what they can make again: below the user's cache folder, or in a private folder of TMPDIR."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from eyas_host.support.errors import StageError
from eyas_host.support.files import cache_folder, private_caches

_OWN, _HOME = "eyas", "home"


def place_caches() -> None:
    """Say where libraries cache, before one of them is imported; variables that the user has set stay.

    Matplotlib's list of fonts goes to `eyas/matplotlib` in the user's cache folder. A user without a usable home has
    all caches in a private folder of TMPDIR: weights from the hub, fonts, and what torch compiles; one without any (no
    HOME and no entry in the list of users) gets an empty home there, too.
    """
    usual = _usual()
    if usual is None:
        with suppress(StageError):  # it is reported by what needs a cache
            private = cache_folder(_OWN).parent
            os.environ["XDG_CACHE_HOME"] = str(private)
            if _home() is None:  # libraries ask for it at import, and fail
                os.environ["HOME"] = str(cache_folder(_HOME))
            os.environ.setdefault("TRITON_CACHE_DIR", str(private / "triton"))
            os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(private / "torchinductor"))
            usual = private
    if usual is not None:
        os.environ.setdefault("MPLCONFIGDIR", str(usual / _OWN / "matplotlib"))


def has_home() -> bool:
    """Whether the user has a home of their own that can be named, instead of a stand-in made by `place_caches`."""
    home = _home()
    return home is not None and home != private_caches() / _HOME


def _home() -> Path | None:
    try:
        return Path.home()
    except RuntimeError:
        return None


def _usual() -> Path | None:
    """The user's cache folder, None if it neither can be written nor made."""
    home, set_by_user = _home(), os.environ.get("XDG_CACHE_HOME")
    if not set_by_user and home is None:
        return None
    folder = Path(set_by_user) if set_by_user else Path(home or "/") / ".cache"
    try:
        nearest = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    except OSError:
        return None
    return folder if nearest.is_dir() and os.access(nearest, os.W_OK | os.X_OK) else None
