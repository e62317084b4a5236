"""Peak memory of a stage: this process and all that it started, those that train along included."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import re
import threading
import time
from collections import defaultdict
from pathlib import Path

_PROC = Path("/proc")
_LOOK_S, _SHARE = 0.5, 0.01
"""Seconds between two looks at the processes, and the largest share of a core that looking may take."""
_RESIDENT = re.compile(r"^Rss(Anon|File|Shmem):\s+(\d+) kB", re.MULTILINE)
_PEAK = re.compile(r"^VmHWM:\s+(\d+) kB", re.MULTILINE)
_KB_PER_MB = 1024


def give_back_memory() -> None:
    """Return freed memory to the system, and count this process's peak from now on, where Linux allows it."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
        (_PROC / "self/clear_refs").write_text("5", encoding="ascii")


class PeakMemory:
    """Largest memory in use while the block runs, looked at twice a second; a context manager.

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
        return max(self._peak_mb, _own_peak_mb())

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
        with contextlib.suppress(OSError):  # it has ended
            text = (_PROC / str(member) / "status").read_text(encoding="utf-8", errors="replace")
            resident = {kind: int(size) for kind, size in _RESIDENT.findall(text)}
            own += resident.get("Anon", 0) + resident.get("Shmem", 0)
            files = max(files, resident.get("File", 0))
    return (own + files) / _KB_PER_MB


def _tree(root: int) -> list[int]:
    """A process and all below it."""
    children: defaultdict[int, list[int]] = defaultdict(list)
    for entry in _PROC.glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            children[_parent(entry.read_text(encoding="utf-8", errors="replace"))].append(int(entry.parent.name))
    found = [root]
    for member in found:
        found += children[member]
    return found


def _parent(stat: str) -> int:
    """The parent in `/proc/PID/stat`; a command's name there may contain anything."""
    return int(stat.rpartition(")")[2].split()[1])


def _own_peak_mb() -> float:
    with contextlib.suppress(OSError):
        found = _PEAK.search((_PROC / "self/status").read_text(encoding="utf-8", errors="replace"))
        return int(found[1]) / _KB_PER_MB if found else 0.0
    return 0.0
