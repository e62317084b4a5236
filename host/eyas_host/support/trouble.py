"""Trouble of the system (disk, permissions, memory) in one line, whatever library met it."""

from __future__ import annotations

import errno
import os
from concurrent.futures import BrokenExecutor

FULL = (errno.ENOSPC, errno.EDQUOT)
"""Errors of a disk without space."""
REFUSED = (errno.EACCES, errno.EPERM, errno.EROFS)
"""Errors of a file or folder that must not be changed."""

_FREE_SPACE = "free some space and run the same command again"
_FIXES = {
    **dict.fromkeys(FULL, _FREE_SPACE),
    **dict.fromkeys(REFUSED, "see to its permissions, or choose another folder"),
    **dict.fromkeys((errno.EMFILE, errno.ENFILE), "raise the limit of open files (ulimit -n)"),
    errno.ENOMEM: "free some memory and run the same command again",
    errno.EAGAIN: "raise the limit of processes (ulimit -u)",
    errno.EFBIG: "raise the limit of a file's size (ulimit -f)",
    errno.ENAMETOOLONG: "choose a shorter path or [run] name",
    errno.EIO: "the disk fails: copy what matters to another one",
    errno.ESTALE: "mount the network folder again",
}
"""Error number -> what to do."""
_DISK_WORDS = ("no space left on device", "database or disk is full", "disk quota exceeded")
_MEMORY_WORDS = ("can't allocate memory", "cannot allocate memory", "out of memory", "std::bad_alloc", "bad allocation")
_CUT_WORDS = ("file write failed", "failed writing file", "unexpected pos")
"""What torch says of a disk that fills while it writes."""
_MEMORY = "out of memory; set a smaller batch or [run] workers = 0, or give it more memory"


def describe_trouble(error: BaseException) -> str | None:
    """One line for trouble of the system: what, where and what to do. None for a defect.

    Notes that were added to the error follow.
    """
    line = _line(error)
    return None if line is None else "; ".join([line, *getattr(error, "__notes__", ())])


def _line(error: BaseException) -> str | None:
    if isinstance(error, OSError):
        return _os_error(error)
    text = str(error).lower()
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and _has(text, _MEMORY_WORDS)):
        return _MEMORY
    if isinstance(error, BrokenExecutor):
        return f"a process of this command was killed ({_MEMORY})"
    if isinstance(error, Exception) and (_has(text, _DISK_WORDS) or _has(text, _CUT_WORDS)):
        return f"the disk is full; {_FREE_SPACE}"
    return None


def _os_error(error: OSError) -> str:
    """The path, the system's words, and what to do where there is something."""
    if error.errno is None or not error.strerror:
        return " ".join(str(error).split()) or type(error).__name__
    paths = [os.fsdecode(path) for path in (error.filename, error.filename2) if isinstance(path, str | bytes)]
    where = f"{' -> '.join(paths)}: " if paths else ""
    fix = _FIXES.get(error.errno)
    return f"{where}{error.strerror}" + (f"; {fix}" if fix else "")


def _has(text: str, words: tuple[str, ...]) -> bool:
    return any(word in text for word in words)
