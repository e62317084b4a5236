"""Ctrl-C, SIGTERM and a closed terminal end a command in order; a second one ends it at once."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_WORDS = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated", signal.SIGHUP: "the terminal was closed"}
_DEFAULTS = (signal.SIG_DFL, signal.default_int_handler)


class Interrupted(KeyboardInterrupt):
    """A signal that ends the command."""

    def __init__(self, number: int = signal.SIGINT) -> None:
        super().__init__()
        self.number = number


@contextmanager
def interruptible() -> Iterator[None]:
    """Raise `Interrupted` at the first signal that ends a command; a second one ends the process at once.

    A signal that is ignored (nohup) or has a handler already is left alone, and so are threads other than the main one.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    process = os.getpid()
    received: list[int] = []

    def end(number: int, _: FrameType | None) -> None:
        if received and os.getpid() == process:
            os._exit(128 + number)
        received.append(number)
        raise Interrupted(number)

    before = {number: signal.getsignal(number) for number in _WORDS}
    ours = [number for number, handler in before.items() if handler in _DEFAULTS]
    for number in ours:
        signal.signal(number, end)
    try:
        yield
    finally:
        for number in ours:
            signal.signal(number, before[number])


@contextmanager
def resumable(note: str) -> Iterator[None]:
    """Add how the work goes on to whatever ends it from outside: a signal, a full disk, too little memory."""
    try:
        yield
    except (KeyboardInterrupt, OSError, MemoryError) as error:
        error.add_note(note)
        raise


def exit_code(error: KeyboardInterrupt) -> int:
    """128 and the signal's number, as shells count."""
    return 128 + getattr(error, "number", signal.SIGINT)


def describe(error: KeyboardInterrupt) -> str:
    """What ended the command, and what its notes say of going on."""
    word = _WORDS[getattr(error, "number", signal.SIGINT)]
    return "; ".join([word, *getattr(error, "__notes__", ())])
