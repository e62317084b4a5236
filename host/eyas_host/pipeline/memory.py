"""Peak memory of a stage."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import resource
from pathlib import Path


def reset_peak_rss() -> None:
    """Return freed memory to the system and reset the peak memory, where Linux allows it."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def peak_rss_mb() -> float:
    """Peak resident memory of this process since the reset, plus that of its largest child, MB."""
    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with contextlib.suppress(OSError):
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        own = next((int(line.split()[1]) for line in lines if line.startswith("VmHWM:")), own)
    return (own + resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss) / 1024
