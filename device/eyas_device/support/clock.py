"""What time it is and how to wait: a real clock, and one for tests in which waiting takes no time."""

from __future__ import annotations

import time
from threading import Event
from typing import Protocol


class Clock(Protocol):
    """Tells the time and waits."""

    def monotonic(self) -> float:
        """Seconds on a clock that never jumps."""

    def time(self) -> float:
        """Seconds since 1970."""

    def wait(self, event: Event, seconds: float) -> bool:
        """Wait until `event` is set or `seconds` have passed; whether it is set."""


class SystemClock:
    """The machine's clock."""

    def monotonic(self) -> float:
        """`time.monotonic`."""
        return time.monotonic()

    def time(self) -> float:
        """`time.time`."""
        return time.time()

    def wait(self, event: Event, seconds: float) -> bool:
        """Wait for real; at once for no time or less."""
        return event.wait(max(0.0, seconds))


class FakeClock:
    """A clock that moves only when somebody waits on it or moves it."""

    def __init__(self, start: float = 1000.0) -> None:
        self._now = start
        self.waits: list[float] = []
        """How long each wait was asked to be, seconds."""

    def monotonic(self) -> float:
        """The moved time."""
        return self._now

    def time(self) -> float:
        """The moved time, as if it had begun in 2024."""
        return 1_704_067_200.0 + self._now

    def wait(self, event: Event, seconds: float) -> bool:
        """Move by `seconds` at once, unless `event` is set already."""
        self.waits.append(seconds)
        if not event.is_set():
            self.move(seconds)
        return event.is_set()

    def move(self, seconds: float) -> None:
        """Let `seconds` pass."""
        self._now += max(0.0, seconds)


SYSTEM = SystemClock()
