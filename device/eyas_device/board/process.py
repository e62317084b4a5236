"""CPU pressure of the machine and resident memory of a process."""

from __future__ import annotations

import re
from pathlib import Path

import msgspec

from eyas_device.board.reading import ROOT, fields, text


class Pressure(msgspec.Struct, frozen=True, kw_only=True):
    """CPU pressure (`/proc/pressure/cpu`): how long processes waited for a core.

    Source: Linux, Documentation/accounting/psi.rst.
    """

    avg10: float
    """Percentage of the last 10 s; the next two of the last 60 s and 300 s."""
    avg60: float
    avg300: float
    total_us: int
    """Microseconds since boot: the difference between two readings is exact for the time between them."""


class Memory(msgspec.Struct, frozen=True, kw_only=True):
    """Resident memory of a process, 10^6 bytes."""

    rss_mb: float
    peak_rss_mb: float


def read_pressure(root: Path = ROOT) -> Pressure | None:
    """Read the CPU pressure; None if the kernel does not report it."""
    pattern = r"some avg10=(\d+\.\d+) avg60=(\d+\.\d+) avg300=(\d+\.\d+) total=(\d{1,18})"
    match = re.match(pattern, text(root / "proc/pressure/cpu") or "", re.ASCII)
    if match is None:
        return None
    avg10, avg60, avg300 = map(float, match.groups()[:3])
    return Pressure(avg10=avg10, avg60=avg60, avg300=avg300, total_us=int(match[4]))


def read_memory(pid: int | None = None, root: Path = ROOT) -> Memory | None:
    """Read the resident memory of process `pid` (default: this one); None if the kernel does not report it."""
    status = dict(fields(text(root / "proc" / ("self" if pid is None else str(pid)) / "status")))
    sizes = [re.fullmatch(r"(\d{1,15})\s+kB", status.get(name, ""), re.ASCII) for name in ("VmRSS", "VmHWM")]
    kib = [int(match[1]) for match in sizes if match is not None]
    if len(kib) != 2:
        return None
    return Memory(rss_mb=round(kib[0] * 1024 / 1e6, 1), peak_rss_mb=round(kib[1] * 1024 / 1e6, 1))
