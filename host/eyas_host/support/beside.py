"""Work in a process beside this one: what one core computes while another is busy with something else."""

from __future__ import annotations

import multiprocessing
import signal
import sys
from collections.abc import Callable, Iterator, MutableSequence
from concurrent.futures import Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import Generic, Protocol, TypeVar

from eyas_device.board.limits import usable_cores, usable_memory
from eyas_host.support.errors import StageError
from eyas_host.support.processes import end_with_parent
from eyas_host.support.progress import console, meter, relay
from eyas_host.support.quiet import quiet_libraries, quiet_warnings

_Result = TypeVar("_Result")
_Received = TypeVar("_Received", covariant=True)
_LOOK_S = 1.0
_MAIN = ("__file__", "__spec__")
"""Where a child process finds the main module."""


class Beside(Protocol[_Received]):
    """Work whose result comes later."""

    def result(self) -> _Received:
        """Wait for the result, and show the progress meanwhile; raises what the work raised."""


class _Here(Generic[_Result]):
    """Work of this process, done when its result is asked for."""

    def __init__(self, work: Callable[[], _Result]) -> None:
        self._work = work

    def result(self) -> _Result:
        return self._work()


class _Child(Generic[_Result]):
    """Work in a child process, and how far it is."""

    def __init__(self, future: Future[_Result], title: str, done_and_total: MutableSequence[int]) -> None:
        self._future = future
        self._title = title
        self._done_and_total = done_and_total

    def result(self) -> _Result:
        while not self._done_and_total[1] and not self._has_ended():
            pass  # it is starting
        done, total = self._done_and_total
        if not self._future.done():
            with meter(self._title, total, done=done) as bar:
                while not self._has_ended():
                    bar.reach(self._done_and_total[0])
        return self._future.result()

    def _has_ended(self) -> bool:
        return bool(wait([self._future], timeout=_LOOK_S).done)


def has_room_beside(memory: float) -> bool:
    """Whether another process has a core to itself here, and `memory` bytes."""
    return usable_cores() > 1 and usable_memory() >= memory


@contextmanager
def beside(
    title: str, work: Callable[..., _Result], *arguments: object, apart: bool = True
) -> Iterator[Beside[_Result]]:
    """Let a child process do `work` while the block runs; not `apart`: this one, when the result is asked for.

    The child shows nothing, ignores Ctrl-C, ends with this process, and is terminated if the block fails. `title` says
    what it does, to those who wait for it. Raises `StageError` if the child is killed.
    """
    if not apart:
        yield _Here(lambda: work(*arguments))
        return
    processes = multiprocessing.get_context("spawn")
    shared = processes.Array("q", 2)
    with ProcessPoolExecutor(1, mp_context=processes, initializer=_begin, initargs=(shared,)) as pool:  # type: ignore[arg-type]
        try:
            with _no_main_module():
                future = pool.submit(work, *arguments)  # which starts the process
            yield _Child(future, title, shared)  # type: ignore[arg-type]
        except BrokenProcessPool:
            raise StageError(f"{title}: its process was killed (out of memory?); run again to resume") from None
        except BaseException:
            for child in multiprocessing.active_children():
                child.terminate()
            raise


@contextmanager
def _no_main_module() -> Iterator[None]:
    """Let a child that starts meanwhile not run this process's main module, as it would to find functions there.

    That may be somebody's script, which calls Eyas without asking for its `__name__`.
    """
    main = sys.modules["__main__"]
    hidden: dict[str, object] = {name: vars(main).pop(name) for name in _MAIN if name in vars(main)}
    main.__spec__ = None
    try:
        yield
    finally:
        vars(main).update(hidden)


def _begin(done_and_total: MutableSequence[int]) -> None:
    """Set the child process up: its parent shows the time left and the warnings, and decides about an interrupt."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    quiet_libraries()
    quiet_warnings()
    console.quiet = True
    end_with_parent()
    relay(done_and_total)
