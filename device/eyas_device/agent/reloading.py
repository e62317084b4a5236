"""Reloads and other jobs of the models: one after the other, in a thread beside the loop; signals only request them."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable

from eyas_device.agent.loop import Listener
from eyas_device.agent.output import error_with_place
from eyas_device.support.closing import Closing

logger = logging.getLogger(__name__)

_JOIN_S = 5.0
_RETRY_S = (10.0, 300.0)
"""First and longest pause between two attempts to get a model, while there is none."""


class Reloader(Closing, Listener):
    """Loop listener that calls `reload` in its own thread, never twice at a time.

    Requests that arrive during a reload become one more reload after it. Without a model it tries again by itself.
    Other jobs run in the same thread, before a reload.
    """

    def __init__(self, reload: Callable[[], object], *, has_model: Callable[[], bool]) -> None:
        self._reload, self._has_model = reload, has_model
        self._requested = False  # a plain flag: a signal handler must not touch locks
        self._closed = self._due = False
        self._jobs: deque[Callable[[], object]] = deque()
        self._wake = threading.Event()
        self._retry_s = _RETRY_S[0]
        self._retry_at = time.monotonic() + self._retry_s
        self._thread = threading.Thread(target=self._run, name="reload", daemon=True)

    def request(self) -> None:
        """Request a reload; for signal handlers."""
        self._requested = True

    def submit(self, job: Callable[[], object]) -> None:
        """Run `job` in the thread, soon; for any thread, not for signal handlers. Its errors are logged."""
        self._jobs.append(job)
        self._wake.set()

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def on_tick(self) -> None:
        """Pass a request on to the thread."""
        if self._requested:
            self._requested = False
            self._retry_s = _RETRY_S[0]
            self._due = True
            self._wake.set()
        elif not self._has_model() and time.monotonic() >= self._retry_at:
            self._retry_at = time.monotonic() + self._retry_s
            self._retry_s = min(2 * self._retry_s, _RETRY_S[1])
            self._due = True
            self._wake.set()

    def close(self) -> None:
        """Start no other reload; wait a few seconds for the one that runs."""
        self._closed = True
        self._wake.set()
        if self._thread.ident is not None:
            self._thread.join(_JOIN_S)

    def _run(self) -> None:
        while True:
            self._wake.wait()
            self._wake.clear()
            while not self._closed and (self._jobs or self._due):
                try:
                    if self._jobs:
                        self._jobs.popleft()()
                    else:
                        self._due = False
                        self._reload()
                except Exception as error:  # whatever it is, the next one must be possible
                    logger.error("a job of the models failed: %s", error_with_place(error))
            if self._closed:
                return
