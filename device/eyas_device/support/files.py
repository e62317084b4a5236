"""Durable files: replaced atomically, synced before they count."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable
from contextlib import suppress
from glob import escape
from pathlib import Path


def expand_home(path: str) -> str:
    """Replace a leading `~` by the home folder; unchanged where the system knows none."""
    return os.path.expanduser(path)  # noqa: PTH111 - Path.expanduser raises without a home


def atomic_write(path: Path, data: bytes, *, mode: int = 0o644) -> None:
    """Replace the content of `path`: a reader, also after a power cut, finds the old content or the new one.

    `mode` holds whatever the umask is. Raises `OSError`; nothing has changed then.
    """
    require_name(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    _remove_leftovers(path)
    try:
        write_new(temporary, [data], mode=mode)
        temporary.replace(path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise
    sync_folder(path.parent)


def require_name(path: Path) -> None:
    """Raise `IsADirectoryError` for a path that names no file: `.` or `/`."""
    if not path.name:
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))


def write_new(path: Path, chunks: Iterable[bytes], *, mode: int = 0o644) -> None:
    """Write a file that does not exist yet and wait until its content is on the disk."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, mode)
    with os.fdopen(descriptor, "wb") as stream:
        os.fchmod(descriptor, mode)
        for chunk in chunks:
            stream.write(chunk)
        stream.flush()
        os.fsync(descriptor)


def _remove_leftovers(path: Path) -> None:
    """Remove what processes that were killed while they wrote `path` have left beside it."""
    with suppress(OSError):
        for part in path.parent.glob(f".{escape(path.name)}.*.part"):
            owner = part.name.split(".")[-2]
            if owner.isdecimal() and (int(owner) == os.getpid() or not _is_alive(int(owner))):
                part.unlink(missing_ok=True)


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


def sync_folder(folder: Path) -> None:
    """Wait until the names in a folder are on the disk."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
