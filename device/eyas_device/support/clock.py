"""The clock as an interface, so that tests need not wait."""

from __future__ import annotations

import time
from threading import Event
from typing import Protocol

RELEASED = 1_767_225_600.0
"""1 January 2026, seconds since 1970: a wall clock before this version was written is wrong."""
_MAX_YEARS_S = 30 * 365 * 86400.0


class Clock(Protocol):
    """Reads the time and waits."""

    def monotonic(self) -> float:
        """Seconds on a clock that never jumps."""

    def time(self) -> float:
        """Seconds since 1970."""

    def wait(self, event: Event, seconds: float) -> bool:
        """Wait until `event` is set or `seconds` have passed; True if it is set."""


class SystemClock:
    """The machine's clock."""

    def monotonic(self) -> float:
        """`time.monotonic`."""
        return time.monotonic()

    def time(self) -> float:
        """`time.time`."""
        return time.time()

    def wait(self, event: Event, seconds: float) -> bool:
        """Wait in real time; 0 or less returns at once."""
        return event.wait(max(0.0, seconds))


def is_plausible(now: float) -> bool:
    """Whether a wall clock that reads `now` (seconds since 1970) can be right: at most 30 years after `RELEASED`."""
    return RELEASED <= now < RELEASED + _MAX_YEARS_S


SYSTEM = SystemClock()
