"""Files that are either whole or not there."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from eyas_host.support.errors import StageError


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Write to a temporary neighbour that becomes `path` at the end, or vanishes if anything fails.

    Raises `StageError` for a full disk or a folder that cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        temporary.replace(path)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS):
            raise StageError(f"{path}: cannot be written ({error.strerror}); free some room and run again") from None
        raise
    finally:
        temporary.unlink(missing_ok=True)


def write_bytes(path: Path, data: bytes) -> None:
    """Write `data` to `path`, whole or not at all."""
    with atomic_write(path) as temporary:
        temporary.write_bytes(data)


@contextmanager
def exclusive_lock(path: Path) -> Iterator[None]:
    """Do what others must not do meanwhile: waits for those that hold `path`; a killed process holds it no longer."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield
