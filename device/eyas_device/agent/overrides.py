"""Temporary changes by command: a pause of the loop and another threshold. Both end by themselves."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import msgspec

from eyas_device.agent.loop import Listener, Loop
from eyas_device.predict import Classifier


class _End(msgspec.Struct, frozen=True):
    """When a change ends."""

    monotonic: float
    wall: float
    """Seconds since 1970, for people; a clock that is corrected meanwhile does not move the end."""


class _Threshold(msgspec.Struct, frozen=True):
    """A classifier whose threshold was changed."""

    classifier: Classifier
    before: float
    value: float
    end: _End


class Overrides(Listener):
    """Pauses the loop and changes its classifier's threshold, each for a limited time.

    Nothing is kept on the disk: a restarted agent runs, with its model's own threshold. Any thread may call it.
    """

    def __init__(
        self,
        loop: Loop,
        *,
        on_change: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self.on_change = on_change
        """Called when a change begins or ends."""
        self._loop, self._clock, self._wall = loop, clock, wall
        self._lock = threading.Lock()
        self._pause: _End | None = None
        self._threshold: _Threshold | None = None

    def pause(self, seconds: float) -> float:
        """Pause the loop; return the time at which it resumes, seconds since 1970. A later call replaces the end."""
        with self._lock:
            self._pause = self._end(seconds)
            self._loop.pause()
            end = self._pause.wall
        self.on_change()
        return end

    def resume(self) -> None:
        """Resume the loop now."""
        with self._lock:
            self._pause = None
            self._loop.resume()
        self.on_change()

    def set_threshold(self, classifier: Classifier, value: float, seconds: float) -> tuple[float, float]:
        """Change a classifier's threshold; return the threshold before and the time of the end, seconds since 1970."""
        with self._lock:
            changed = self._threshold
            own = changed.before if changed is not None and changed.classifier is classifier else classifier.threshold
            before, classifier.threshold = classifier.threshold, value
            self._threshold = _Threshold(classifier, own, value, self._end(seconds))
            end = self._threshold.end.wall
        self.on_change()
        return before, end

    @property
    def paused_until(self) -> float | None:
        """When a pause by command ends, seconds since 1970; None without one."""
        pause = self._pause
        return pause.wall if pause is not None and self._loop.paused else None

    @property
    def fault(self) -> str:
        """The changed threshold, for people; empty without one."""
        changed = self._threshold
        if changed is None:
            return ""
        until = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(changed.end.wall))
        return f"a command set the threshold to {changed.value:g} instead of {changed.before:g}, until {until}"

    def on_tick(self) -> None:
        """End what is due."""
        if self._pause is None and self._threshold is None:
            return
        now, ended = self._clock(), False
        with self._lock:
            if self._pause is not None and now >= self._pause.monotonic:
                self._pause, ended = None, True
                self._loop.resume()
            if self._threshold is not None and now >= self._threshold.end.monotonic:
                self._threshold.classifier.threshold = self._threshold.before
                self._threshold, ended = None, True
        if ended:
            self.on_change()

    def on_model(self, classifier: Classifier) -> None:
        """Give the previous model its own threshold again, with which it may come back; a new one has another."""
        with self._lock:
            changed = self._threshold
            ended = changed is not None and changed.classifier is not classifier
            if changed is not None and ended:
                changed.classifier.threshold, self._threshold = changed.before, None
        if ended:
            self.on_change()

    def _end(self, seconds: float) -> _End:
        return _End(self._clock() + seconds, self._wall() + seconds)
