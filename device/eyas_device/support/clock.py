"""Clocks: an interface so that tests need not wait, the uptime, and the boot it belongs to."""

from __future__ import annotations

import time
import uuid
from pathlib import Path
from threading import Event
from typing import Protocol

RELEASED = 1_767_225_600.0
"""1 January 2026, seconds since 1970: a wall clock before this version was written is wrong."""
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
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


def uptime_s() -> float:
    """Seconds of a clock that never jumps and runs on while the machine sleeps."""
    return time.clock_gettime(time.CLOCK_BOOTTIME) if hasattr(time, "CLOCK_BOOTTIME") else time.monotonic()


def boot_id() -> str:
    """Return the kernel's boot id, or a random UUID if there is none."""
    try:
        return _BOOT_ID.read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError):
        return str(uuid.uuid4())
