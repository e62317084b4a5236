"""Trouble of the system (disk, permissions, memory) in one line, whatever library met it."""

from __future__ import annotations

import errno
from concurrent.futures import BrokenExecutor

from eyas_device.support.trouble import FIXES, describe_os_error

_FREE_SPACE = FIXES[errno.ENOSPC]
_FIXES = {**FIXES, errno.ENAMETOOLONG: "choose a shorter path or [run] name"}
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
        return describe_os_error(error, _FIXES)
    text = str(error).lower()
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and _has(text, _MEMORY_WORDS)):
        return _MEMORY
    if isinstance(error, BrokenExecutor):
        return f"a process of this command was killed ({_MEMORY})"
    if isinstance(error, Exception) and (_has(text, _DISK_WORDS) or _has(text, _CUT_WORDS)):
        return f"the disk is full; {_FREE_SPACE}"
    return None


def _has(text: str, words: tuple[str, ...]) -> bool:
    return any(word in text for word in words)
