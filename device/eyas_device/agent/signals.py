"""SIGTERM, SIGINT and SIGHUP for the frame loop."""

from __future__ import annotations

import os
import select
import signal
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any

from eyas_device.agent.loop import Loop


class Signals:
    """Signal handlers within a `with` block: SIGINT and SIGTERM stop the loop, SIGUSR1 pauses and SIGUSR2 resumes it,
    SIGHUP calls `reload`. A second SIGINT or SIGTERM has its default effect. Main thread only.

    SIGHUP also comes when a terminal is closed. If one of the standard streams is a terminal that is gone, it stops the
    loop instead, unless the process was started with SIGHUP ignored, as `nohup` does.
    """

    def __init__(self, loop: Loop | None = None, *, reload: Callable[[], None] | None = None) -> None:
        self.loop = loop
        self.requested = False
        """Whether SIGINT or SIGTERM arrived, perhaps before there was a loop."""
        self._reload = reload
        self._previous: dict[int, Any] = {}
        self._terminals: tuple[int, ...] = ()

    def __enter__(self) -> Signals:
        self._terminals = tuple(number for number in (0, 1, 2) if os.isatty(number))
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP):
            previous = signal.signal(number, self._on_signal)
            # None: installed by other code than Python's, which Python cannot install again.
            self._previous[number] = signal.SIG_DFL if previous is None else previous
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def guard(self, loop: Loop, *, reload: Callable[[], None] | None = None) -> Loop:
        """Direct signals to `loop`; stop it at once if SIGINT or SIGTERM arrived before."""
        self.loop, self._reload = loop, reload
        if self.requested:
            loop.stop()
        return loop

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        hangup = number == signal.SIGHUP and self._is_hangup()
        if hangup and self._previous[number] == signal.SIG_IGN:
            return
        if hangup or number in (signal.SIGINT, signal.SIGTERM):
            self.requested = True
            ignored = self._previous[number] == signal.SIG_IGN
            signal.signal(number, signal.SIG_IGN if ignored else signal.SIG_DFL)  # ends it also while native code hangs
        loop = self.loop
        if loop is None:
            return
        if number == signal.SIGUSR1:
            loop.pause()
        elif number == signal.SIGUSR2:
            loop.resume()
        elif number == signal.SIGHUP and not hangup:
            if self._reload is not None:
                self._reload()
        else:
            loop.stop()

    def _is_hangup(self) -> bool:
        """Whether one of the terminals is gone."""
        if not self._terminals:
            return False
        poll = select.poll()
        for terminal in self._terminals:
            poll.register(terminal, 0)
        return any(event & select.POLLHUP for _, event in poll.poll(0))
