"""The lock of a run's folder: one command writes there, or any number only read."""

from __future__ import annotations

import fcntl
import os
import socket
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import TextIO

from eyas_host.support.errors import StageError
from eyas_host.support.files import try_flock

_streams: set[TextIO] = set()
"""Open lock files of this process."""


def _close_in_child() -> None:
    """A lock lasts until every copy of its file is closed: a loader's worker must not keep it."""
    while _streams:
        _streams.pop().close()


os.register_at_fork(after_in_child=_close_in_child)


class RunLock:
    """A context manager that opens a folder's `.lock`; the system releases the lock when the process ends.

    With `create` false the folder is left as it is: without a lock file nobody writes there. Raises `StageError` for a
    folder that cannot be written.
    """

    def __init__(self, root: Path, *, create: bool = True) -> None:
        self.root = root
        self._create = create
        self._stream: TextIO | None = None
        self._exclusive = False

    def __enter__(self) -> RunLock:
        path = self.root / ".lock"
        if not self._create:
            with suppress(OSError):
                self._keep(path.open(encoding="utf-8"))
            return self
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            self._keep(path.open("a+", encoding="utf-8"))
        except OSError as error:
            raise StageError(f"{self.root}: cannot be written ({error.strerror}); choose another --runs") from None
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._stream is not None:
            _streams.discard(self._stream)
            self._write_holder("")
            self._stream.close()

    def _keep(self, stream: TextIO) -> None:
        self._stream = stream
        _streams.add(stream)

    def acquire(self, *, shared: bool = False) -> bool:
        """Take the lock, or change to the other kind; False if other commands are in the way."""
        if self._stream is None:
            return True
        if not try_flock(self._stream, fcntl.LOCK_SH if shared else fcntl.LOCK_EX):
            return False
        self._exclusive = self._exclusive or not shared
        self._write_holder("" if shared else f"{os.getpid()} {datetime.now():%Y-%m-%d %H:%M} {socket.gethostname()}")
        self._exclusive = not shared
        return True

    def require(self, *, shared: bool = False) -> None:
        """Take the lock. Raises `StageError` if other commands are in the way."""
        if not self.acquire(shared=shared):
            raise self.busy()

    def busy(self, what: str = "") -> StageError:
        """The error that another command uses the folder."""
        return StageError(
            f"{self.root}: another eyas command uses this folder{what}; wait for it, or give this one another name"
            f"{self._holder()}"
        )

    def _write_holder(self, text: str) -> None:
        """Write who holds the lock into it, for those who wait; only its exclusive holder may."""
        if self._stream is not None and self._exclusive:
            with suppress(OSError):  # it is a help, no more
                os.ftruncate(self._stream.fileno(), 0)
                os.write(self._stream.fileno(), text.encode())  # unbuffered: a full disk must not show at the end

    def _holder(self) -> str:
        """Who holds the lock, in words; nothing if that is unknown, or who wrote it is gone."""
        try:
            pid, day, time, host = (self.root / ".lock").read_text(encoding="utf-8").split(maxsplit=3)
            if host == socket.gethostname():
                os.kill(int(pid), 0)
        except (OSError, ValueError):
            return ""
        return f" (it is process {pid} on {host}, since {day} {time})"
