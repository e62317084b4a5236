"""The time against which signed metadata expires, on a device that may have no clock.

The floor is the newest of: when this version was written, the newest time that a repository signed, and the time of the
last successful refresh. A clock below the floor is wrong; the floor counts instead, so that a board that boots in 1970
still refuses old metadata and takes new ones. A clock far ahead makes everything look expired: nothing is installed
until it is right, and nothing is remembered of it, because only a refresh that succeeded moves the floor, and that ends
where the metadata expire.

What was remembered counts as long as the keys that vouched for it do: whoever stole the key of `timestamp` could sign a
time of tomorrow's century, and the owner's new key ends that, as it ends counted-up versions.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from datetime import datetime, timezone
from pathlib import Path

import msgspec

from eyas_device.support.clock import RELEASED
from eyas_device.support.files import atomic_write

CLOCK = "clock.json"
_MAX_BYTES = 4096
_STEP_S = 3600.0
"""The floor is written again after this time only: a card wears out."""


class _Stored(msgspec.Struct, frozen=True):
    """`clock.json`."""

    newest: float = 0.0
    """Seconds since 1970."""
    signer: str = ""
    """Keys that vouched for it."""


class Reading(msgspec.Struct, frozen=True):
    """The time, as far as it can be trusted."""

    now: float
    """Seconds since 1970: the system's clock, or the floor if that is newer."""
    system: float
    """What the system's clock says."""
    floor: float
    """It cannot be earlier than this."""
    doubt: str = ""
    """Why the system's clock is not trusted; empty if nothing speaks against it."""


class TrustedClock:
    """The system's clock with a floor that survives a restart.

    Args:
        path: Where the floor is kept; None keeps it in memory.
        released: When this version was written, seconds since 1970.
        now: The system's clock.

    """

    def __init__(self, path: Path | None, *, released: float = RELEASED, now: Callable[[], float] = time.time) -> None:
        self._path, self._released, self._now = path, released, now
        self._known = self._stored = _load(path)

    def read(self, signer: str = "") -> Reading:
        """The time now, with what the keys `signer` have vouched for."""
        system = self._now()
        floor = max(self._known.newest, self._released) if self._known.signer == signer else self._released
        if system >= floor:
            return Reading(system, system, floor)
        doubt = f"the clock reads {day(system)}, but it is {day(floor)} or later: expiry cannot be judged"
        return Reading(floor, system, floor, doubt)

    def advance(self, newest: float, signer: str = "") -> None:
        """Remember that it is at least `newest`, a time that metadata signed by the keys `signer` vouch for.

        Raises `OSError` if it cannot be kept.
        """
        if signer == self._known.signer and newest <= self._known.newest:
            return
        self._known = _Stored(newest, signer)
        if self._path is not None and (signer != self._stored.signer or newest >= self._stored.newest + _STEP_S):
            atomic_write(self._path, msgspec.json.encode(self._known) + b"\n")
            self._stored = self._known


def _load(path: Path | None) -> _Stored:
    """The stored floor; none if it is missing or damaged: the other floors hold."""
    if path is not None:
        with suppress(OSError, msgspec.DecodeError, UnicodeDecodeError):
            if path.is_file():  # a pipe would block
                with path.open("rb") as stream:
                    return msgspec.json.decode(stream.read(_MAX_BYTES), type=_Stored)
    return _Stored()


def day(seconds: float) -> str:
    """A time as its UTC date, e.g. `2026-11-29`; `never` for one that no calendar has."""
    try:
        return datetime.fromtimestamp(seconds, timezone.utc).strftime("%Y-%m-%d")
    except (OverflowError, ValueError, OSError):
        return "never"
