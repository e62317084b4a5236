"""Peak memory of a stage: this process and all that it started, those that train along included."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import threading
import time
from collections import defaultdict
from pathlib import Path

from eyas_device.board.process import read_memory
from eyas_device.board.reading import fields, text

_PROC = Path("/proc")
_LOOK_S, _SHARE = 0.5, 0.01
"""Seconds between two looks at the processes, and the largest share of a core that looking may take."""
_MB_PER_KIB = 1024 / 1e6


def give_back_memory() -> None:
    """Return freed memory to the system, and count this process's peak from now on, where Linux allows it."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
        (_PROC / "self/clear_refs").write_text("5", encoding="ascii")


class PeakMemory:
    """Largest memory in use while the block runs, 10^6 bytes, looked at twice a second; a context manager.

    Memory of several processes: their own is added up, and pages of files, which they mostly share (libraries, cached
    views), count as those of the process that has most of them.
    """

    def __init__(self) -> None:
        self._peak_mb = 0.0
        self._ended = threading.Event()
        self._watching = threading.Thread(target=self._watch, name="peak-memory", daemon=True)

    def __enter__(self) -> PeakMemory:
        self._watching.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._watching.join()
        self._look()

    @property
    def mb(self) -> float:
        """The peak so far; this process's own counts in between, too."""
        own = read_memory()
        return max(self._peak_mb, own.peak_rss_mb if own is not None else 0.0)

    def _watch(self) -> None:
        pause = _LOOK_S
        while not self._ended.wait(pause):
            started = time.thread_time()
            self._look()
            pause = max(_LOOK_S, (time.thread_time() - started) / _SHARE)

    def _look(self) -> None:
        self._peak_mb = max(self._peak_mb, memory_mb(os.getpid()))


def memory_mb(process: int) -> float:
    """Memory in use by a process and all below it, as `PeakMemory` counts it; 0 where the system does not say."""
    own, files = 0, 0
    for member in _tree(process):
        status = dict(fields(text(_PROC / str(member) / "status")))  # empty once it has ended
        anonymous, shared, mapped = (
            int(status.get(f"Rss{kind}", "0").split()[0]) for kind in ("Anon", "Shmem", "File")
        )
        own += anonymous + shared
        files = max(files, mapped)
    return (own + files) * _MB_PER_KIB


def _tree(root: int) -> list[int]:
    """A process and all below it."""
    children: defaultdict[int, list[int]] = defaultdict(list)
    for entry in _PROC.glob("[0-9]*/stat"):
        if (stat := text(entry)) is not None:
            parent = stat.rpartition(")")[2].split()[1]  # a command's name before it may contain anything
            children[int(parent)].append(int(entry.parent.name))
    found = [root]
    for member in found:
        found += children[member]
    return found
