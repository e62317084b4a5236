"""A clock for tests in which waiting takes no time."""

from __future__ import annotations

from threading import Event


class FakeClock:
    """A clock that moves only when somebody waits on it or moves it."""

    def __init__(self, start: float = 1000.0) -> None:
        self._now = start
        self.waits: list[float] = []
        """How long each wait was asked to be, seconds."""

    def monotonic(self) -> float:
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
