"""Clocks: an interface so that tests need not wait, the uptime, the boot it belongs to, and who sets the wall clock."""

from __future__ import annotations

import ctypes
import os
import time
import uuid
from collections.abc import Callable
from functools import cache
from pathlib import Path
from threading import Event
from typing import Protocol

RELEASED = 1_767_225_600.0
"""1 January 2026, seconds since 1970: a wall clock before this version was written is wrong."""
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_TIMESYNCD = "/run/systemd/timesync"
"""There while systemd-timesyncd runs; with the file `synchronized` once it has set the clock since the boot."""
_TIME_ERROR = 5
"""`adjtimex`: the clock is not synchronised."""
_TIMEX_BYTES = 512
"""More than `struct timex` takes anywhere."""
_ONLY_READ = ctypes.create_string_buffer(_TIMEX_BYTES)
"""Its first field, zero and left so by the kernel, says that nothing is to be set; the rest is not looked at."""
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


def is_synchronised() -> bool | None:
    """Whether the wall clock was set from the network since the boot; None if that cannot be known.

    The kernel's answer counts if it says yes. If it says no, or a sandbox forbids the question, systemd-timesyncd's
    files are asked: other services (chrony without `rtcsync`, for one) set the clock and leave the kernel's flag alone.
    """
    if _kernel_says_synchronised():
        return True
    if os.access(f"{_TIMESYNCD}/synchronized", os.F_OK):  # asked for each message: cheaper than an exception
        return True
    return False if os.access(_TIMESYNCD, os.F_OK) else None


def _kernel_says_synchronised() -> bool:
    adjtimex = _adjtimex()
    state = -1 if adjtimex is None else adjtimex(_ONLY_READ)
    return 0 <= state < _TIME_ERROR


@cache
def _adjtimex() -> Callable[[object], int] | None:
    try:
        return ctypes.CDLL(None, use_errno=True).adjtimex
    except (OSError, AttributeError):  # not Linux
        return None
