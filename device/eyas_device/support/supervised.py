"""A thread that starts again after an error, counts its errors, and shows whether it makes progress."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import suppress

OnError = Callable[[str, BaseException], None]
"""Called with the thread's name and the error, in that thread; must not block."""

STALL_S = 300.0
"""A thread without progress for this time is stuck: longer than any time limit of a network or a slow disk."""
_PAUSE_S = (1.0, 60.0)
_STABLE_S = 60.0


class SupervisedThread:
    """Runs `target` in a daemon thread until it returns; after an error it is called again, with growing pauses.

    `target` calls `progress` in each of its turns.
    """

    def __init__(self, name: str, target: Callable[[], None], *, pauses_s: tuple[float, float] = _PAUSE_S) -> None:
        self.name = name
        self.errors = 0
        """Errors after which the target was called again."""
        self.on_error: OnError = lambda name, error: None
        self._target, self._pauses_s = target, pauses_s
        self._ending = threading.Event()
        self._progress = time.monotonic()
        self._thread = threading.Thread(target=self._run, name=f"eyas-{name}", daemon=True)

    @property
    def started(self) -> bool:
        """Whether `start` was called."""
        return self._thread.ident is not None

    @property
    def alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive()

    def start(self) -> None:
        """Start the thread."""
        self._progress = time.monotonic()
        self._thread.start()

    def progress(self) -> None:
        """Note that the target makes progress."""
        self._progress = time.monotonic()

    def stalled(self, max_s: float = STALL_S) -> bool:
        """Whether the thread runs, or has died, and made no progress for `max_s`."""
        return self.started and not self._ending.is_set() and time.monotonic() - self._progress > max_s

    def join(self, timeout_s: float) -> None:
        """Wait for the end of the target, which is not called again."""
        self._ending.set()
        if self.started:
            self._thread.join(timeout_s)

    def _run(self) -> None:
        pause = self._pauses_s[0]
        while True:
            started = time.monotonic()
            try:
                self._target()
                return
            except Exception as error:  # whatever it is: telemetry must not end for good, and silently
                self.errors += 1
                with suppress(Exception):
                    self.on_error(self.name, error)
            pause = self._pauses_s[0] if time.monotonic() - started > _STABLE_S else pause
            until = time.monotonic() + pause
            pause = min(2 * pause, self._pauses_s[1])
            while (left := until - time.monotonic()) > 0:
                self.progress()
                if self._ending.wait(min(left, 1.0)):
                    return
