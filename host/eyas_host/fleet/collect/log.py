"""The collector's log for people: a line when something changed, and one a minute."""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Callable
from typing import TextIO

from eyas_device.support.logs import clean, is_journal
from eyas_host.fleet.collect.settings import CollectorReport

_MINUTE_S = 60.0
_MAX_CHANGES = 5
"""Lines for changes in a minute; more wait for the line of the minute, which counts them."""


class CollectorLog:
    """Writes reports as lines with a time stamp (none in systemd's journal, which has its own)."""

    def __init__(self, stream: TextIO | None = None, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._stream, self._clock = stream or sys.stderr, clock
        self._stamped = not is_journal(self._stream)
        self._state: tuple[object, ...] = ()
        self._written_at = clock()
        self._written: CollectorReport | None = None
        self._changes: deque[float] = deque(maxlen=_MAX_CHANGES)
        self._held_back = 0
        self._lag_s = 0.0
        self._last: CollectorReport | None = None

    def say(self, text: str) -> None:
        """Write a line."""
        stamp = time.strftime("%Y-%m-%d %H:%M:%S ") if self._stamped else ""
        print(stamp + clean(text), file=self._stream, flush=True)

    def report(self, report: CollectorReport) -> None:
        """Write a report if something other than its figures changed, or a minute after the line before."""
        now = self._clock()
        self._last, self._lag_s = report, max(self._lag_s, report.lag_s)
        state = (report.state, report.detail, report.store_error, report.warning, report.quarantined)
        changed, self._state = state != self._state, state
        due = now - self._written_at >= _MINUTE_S
        if changed and not due and len(self._changes) == _MAX_CHANGES and now - self._changes[0] < _MINUTE_S:
            self._held_back += 1
        elif changed or due:
            if changed:
                self._changes.append(now)
            self._write(report, now)

    def close(self) -> None:
        """Write the last report, unless that was done."""
        if self._last is not None and self._last is not self._written:
            self._write(self._last, self._clock())

    def _write(self, report: CollectorReport, now: float) -> None:
        earlier = self._written.messages if self._written is not None else 0
        rate = (report.messages - earlier) / max(now - self._written_at, 1e-3)
        parts = [
            ": ".join(filter(None, (report.state.replace("_", " "), report.detail))),
            f"{report.messages} stored, {rate:.0f}/s, {report.duplicates} duplicates, "
            f"{report.quarantined} quarantined, {report.waiting} waiting, lag {self._lag_s:.2f} s",
        ]
        if report.store_error:
            parts.append(f"cannot write: {report.store_error}; nothing is acknowledged until it can")
        if report.warning:
            parts.append(f"warning: {report.warning}")
        if self._held_back:
            parts.append(f"{self._held_back} more changes before it")
        self.say("; ".join(parts))
        self._written, self._written_at, self._held_back, self._lag_s = report, now, 0, 0.0
