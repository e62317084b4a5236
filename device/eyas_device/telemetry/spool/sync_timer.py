"""When a disk is to be synced, so that a power cut costs no more than a bounded time."""

from __future__ import annotations

from collections.abc import Callable

TURN_S = 1.0
"""Longest pause between two looks, seconds."""
_LEAST_S = 0.05
_DECAY = 0.9


class SyncTimer:
    """What was written is on the disk within `within_s` seconds, as far as the disk is as fast as of late.

    A sync begins earlier by as long as the slowest of the last ones ended after its moment, because the program was
    late or the disk slow; by half of `within_s` at most. Callers hold a lock around all methods.

    Args:
        within_s: Seconds.
        clock: Seconds that never jump.

    """

    def __init__(self, within_s: float, clock: Callable[[], float]) -> None:
        self._within_s, self._clock = within_s, clock
        self._since: float | None = None
        self._asked = 0.0
        self._lateness_s = 0.0

    @property
    def waiting(self) -> bool:
        """Whether something was written that no sync has begun for."""
        return self._since is not None

    def wrote(self) -> None:
        """Something was written that is not synced yet."""
        if self._since is None:
            self._since = self._clock()

    def due_in(self) -> float:
        """Seconds until the next look, at most `TURN_S`; 0: a sync is due."""
        look = min(TURN_S, max(self._pause(), _LEAST_S))  # what is written right after this look is not late either
        return look if self._since is None else max(0.0, min(look, self._since + self._pause() - self._clock()))

    def begin(self) -> None:
        """A sync begins: what is written from now on waits for the next one."""
        self._asked = self._clock() if self._since is None else self._since + self._pause()
        self._since = None

    def ended(self) -> None:
        """The sync has ended."""
        late = max(self._clock() - self._asked, _DECAY * self._lateness_s)
        self._lateness_s = min(max(late, 0.0), 0.5 * self._within_s)

    def _pause(self) -> float:
        return self._within_s - self._lateness_s
