"""Delivery of answers in a thread of its own: only the newest waits, failures are counted, reported and tried again."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Protocol

from eyas_device.errors import EyasError
from eyas_device.outputs.answer import Answer
from eyas_device.support.closing import Closing
from eyas_device.support.redact import redact
from eyas_device.support.supervised import SupervisedThread

logger = logging.getLogger(__name__)

_TURN_S = 5.0
_MAX_REASON = 200
_CLOSE_S = 6.0


class OutputError(EyasError, OSError):
    """An output could not deliver an answer."""


class Sink(Protocol):
    """Where answers go. `deliver` may block for seconds and raise anything."""

    max_attempts: int | None
    """Attempts for one answer; None: until it is delivered or a newer one comes."""

    def deliver(self, answer: Answer) -> None:
        """Deliver an answer; raises if that failed."""

    def close(self) -> None:
        """Free what was opened; after the last answer."""


class Delivery(Closing):
    """Newest-wins mailbox of one output: `put` never blocks."""

    def __init__(
        self,
        name: str,
        sink: Sink,
        *,
        on_change: Callable[[], None] = lambda: None,
        pauses_s: tuple[float, float] = (1.0, 60.0),
    ) -> None:
        """Create it; `start` starts the thread.

        Args:
            name: Name of the output, for people.
            sink: Where the answers go.
            on_change: Called when a fault begins or ends, in the output's thread.
            pauses_s: First and longest pause between attempts; each is twice the one before.

        """
        self.name = name
        self.errors = 0
        """Failed attempts."""
        self.delivered = 0
        self.fault = ""
        """Why the last attempt failed; empty if it did not."""
        self._sink, self._on_change, self._pauses_s = sink, on_change, pauses_s
        self._condition = threading.Condition()
        self._waiting: Answer | None = None
        self._closing = False
        self.thread = SupervisedThread(f"output {name}", self._run)

    def start(self) -> None:
        """Start the thread."""
        self.thread.start()

    def put(self, answer: Answer) -> None:
        """Deliver an answer soon, in place of one that waits."""
        with self._condition:
            self._waiting = answer
            self._condition.notify()

    def end(self) -> None:
        """Try to deliver the newest answer once more and end; returns at once."""
        with self._condition:
            self._closing = True
            self._condition.notify()

    def close(self) -> None:
        """End, and wait for that at most some seconds."""
        self.end()
        self.thread.join(_CLOSE_S)
        if not self.thread.alive:
            self._sink.close()

    def _run(self) -> None:
        pause_s = self._pauses_s[0]
        attempts = 0
        answer: Answer | None = None
        while True:
            self.thread.progress()
            newer = self._take(pause_s if answer is not None else _TURN_S)
            if newer is not None:
                answer, attempts = newer, 0
            if answer is not None and self._attempt(answer):
                answer, pause_s = None, self._pauses_s[0]
            elif answer is not None:
                attempts, pause_s = attempts + 1, min(2 * pause_s, self._pauses_s[1])
                if attempts == self._sink.max_attempts:
                    answer = None
            with self._condition:
                if self._closing and self._waiting is None:
                    return

    def _take(self, timeout_s: float) -> Answer | None:
        """The newest answer, or None after `timeout_s` without one."""
        until = time.monotonic() + timeout_s
        while True:
            with self._condition:
                self._condition.wait_for(
                    lambda: self._waiting is not None or self._closing, min(_TURN_S, max(0.0, until - time.monotonic()))
                )
                if self._waiting is not None or self._closing or time.monotonic() >= until:
                    answer, self._waiting = self._waiting, None
                    return answer
            self.thread.progress()

    def _attempt(self, answer: Answer) -> bool:
        try:
            self._sink.deliver(answer)
        except Exception as error:  # libraries of pins raise whatever they like; an output never ends the agent
            self.errors += 1
            text = str(error) if isinstance(error, EyasError) else f"{type(error).__name__}: {error}"
            self._set_fault(redact(" ".join(text.split()))[:_MAX_REASON])
            logger.warning("output %s: %s", self.name, self.fault)
            return False
        self.delivered += 1
        if self.fault:
            logger.info("output %s delivers again after %d failed attempts", self.name, self.errors)
        self._set_fault("")
        return True

    def _set_fault(self, fault: str) -> None:
        changed = bool(fault) != bool(self.fault)
        self.fault = fault
        if changed:
            self._on_change()
