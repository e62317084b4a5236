"""Atomic, durable writes, locks and cache folders."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from itertools import count
from pathlib import Path
from typing import IO, Any

from eyas_device.support.files import require_name
from eyas_device.support.trouble import FULL, REFUSED
from eyas_host.support.errors import StageError
from eyas_host.support.progress import warn

_NO_FSYNC = (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS)
"""Errors of file systems that cannot sync a file or folder."""


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a temporary path that replaces `path` at the end, or is removed on an error.

    Content, then name are synced: even after a power cut there is the old file or the new one, and the new one once
    this has returned. Raises `StageError` if the disk is full or the folder is not writable.
    """
    require_name(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        _make_folder(path.parent)
        yield temporary
        _sync(temporary)
        temporary.replace(path)
        _sync(path.parent)
    except OSError as error:
        if error.errno in FULL + REFUSED:
            fix = "free some space" if error.errno in FULL else "see to its permissions"
            raise StageError(f"{path}: cannot be written ({error.strerror}); {fix} and run again") from None
        raise
    finally:
        temporary.unlink(missing_ok=True)


def write_bytes(path: Path, data: bytes) -> None:
    """Write `data` to `path` atomically."""
    with atomic_write(path) as temporary:
        temporary.write_bytes(data)


def sync_files(paths: Iterable[Path], root: Path) -> None:
    """Wait until these files below `root`, which something else wrote, are on the disk, and so are their names."""
    files = list(paths)
    folders = {parent for file in files for parent in file.parents if parent.is_relative_to(root)}
    for path in (*files, *sorted(folders, reverse=True)):
        _sync(path)


def remove_partial_files(folder: Path) -> None:
    """Remove what killed processes left of atomic writes in a folder that no other process writes to."""
    for path in folder.glob(".*.part"):
        path.unlink(missing_ok=True)


def free_name(path: Path) -> Path:
    """A path beside `path` that does not exist: `name-2`, `name-3`, ..."""
    names = (path.with_name(f"{path.name}-{number}") for number in count(2))
    return next(name for name in names if not name.exists())


def cache_folder(name: str) -> Path:
    """Create and return the cache folder `name`, in a private folder of TMPDIR if the home is not writable.

    Raises `StageError` if neither is usable, or the one in TMPDIR belongs to another user.
    """
    with suppress(OSError, RuntimeError):  # RuntimeError: a user without a home
        usual = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / name
        usual.mkdir(parents=True, exist_ok=True)
        if os.access(usual, os.W_OK | os.X_OK):
            return usual
    private = private_caches()
    with suppress(FileExistsError):
        private.mkdir(mode=0o700)
    info = private.lstat()
    if not stat.S_ISDIR(info.st_mode) or info.st_uid != os.getuid() or info.st_mode & 0o077:
        raise StageError(f"{private}: not a private folder of this user; remove it, or set XDG_CACHE_HOME")
    (private / name).mkdir(exist_ok=True)
    return private / name


def private_caches() -> Path:
    """The folder of TMPDIR that has the caches of a user whose home cannot be written to."""
    return Path(tempfile.gettempdir()) / f"eyas-cache-{os.getuid()}"


@contextmanager
def exclusive_lock(path: Path) -> Iterator[None]:
    """Hold an exclusive inter-process lock (flock) on `path`; a killed process releases it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as stream:
        try_flock(stream, fcntl.LOCK_EX, wait=True)
        yield


def try_flock(stream: IO[Any], operation: int, *, wait: bool = False) -> bool:
    """Lock an open file, `LOCK_EX` or `LOCK_SH`; False if another process holds it.

    A file system without locks (some network ones) is reported once, and the work goes on unlocked.
    """
    try:
        fcntl.flock(stream, operation if wait else operation | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        _report_missing_locks(Path(stream.name).parent, error.strerror)
    return True


@cache
def _report_missing_locks(folder: Path, why: str) -> None:
    warn(f"{folder}: this file system has no locks ({why}); do not start two commands that write there")


def _make_folder(folder: Path) -> None:
    """Create a folder and those above it, and sync the names of the new ones."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for path in missing:
        _sync(path.parent)


def _sync(path: Path) -> None:
    """Wait until a file's content, or the names in a folder, are on the disk, if the file system can do that."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NO_FSYNC:
            raise
    finally:
        os.close(descriptor)
