"""Trouble of the system (disk, permissions, limits) in one line: what, where and what to do."""

from __future__ import annotations

import errno
import os
from collections.abc import Mapping

FULL = (errno.ENOSPC, errno.EDQUOT)
"""Errors of a disk without space."""
REFUSED = (errno.EACCES, errno.EPERM, errno.EROFS)
"""Errors of a file or folder that must not be changed."""
FIXES: Mapping[int, str] = {
    **dict.fromkeys(FULL, "free some space and run the same command again"),
    **dict.fromkeys(REFUSED, "see to its permissions, or choose another folder"),
    **dict.fromkeys((errno.EMFILE, errno.ENFILE), "raise the limit of open files (ulimit -n)"),
    errno.ENOMEM: "free some memory and run the same command again",
    errno.EAGAIN: "raise the limit of processes (ulimit -u)",
    errno.EFBIG: "raise the limit of a file's size (ulimit -f)",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.EIO: "the disk fails: copy what matters to another one",
    errno.ESTALE: "mount the network folder again",
}
"""Error number -> what to do."""


def describe_os_error(error: OSError, fixes: Mapping[int, str] = FIXES) -> str:
    """The path, the system's words, and what to do where there is something."""
    if error.errno is None or not error.strerror:
        return " ".join(str(error).split()) or type(error).__name__
    paths = [os.fsdecode(path) for path in (error.filename, error.filename2) if isinstance(path, str | bytes)]
    where = f"{' -> '.join(paths)}: " if paths else ""
    fix = fixes.get(error.errno)
    return f"{where}{error.strerror}" + (f"; {fix}" if fix else "")


def describe_trouble(error: Exception) -> str | None:
    """One line for an error of the system that no part of the agent expected; None for a defect."""
    if isinstance(error, MemoryError):
        return "out of memory; free some, or choose a smaller artefact"
    if isinstance(error, OSError) and error.errno in FIXES:
        return describe_os_error(error)
    return None
