"""How crowded the processor is, and how much memory a process takes."""

from __future__ import annotations

import re
from pathlib import Path

import msgspec

from eyas_device.board.reading import ROOT, fields, text


class Pressure(msgspec.Struct, frozen=True, kw_only=True):
    """`/proc/pressure/cpu`: how long processes waited for a core. Source: Linux, Documentation/accounting/psi.rst."""

    avg10: float
    """Percent of the last 10 s."""
    avg60: float
    avg300: float
    total_us: int
    """Microseconds since the boot: the difference of two readings is the exact figure of the time between."""


class Memory(msgspec.Struct, frozen=True, kw_only=True):
    """Resident memory of a process, 10^6 bytes."""

    rss_mb: float
    peak_rss_mb: float


def read_pressure(root: Path = ROOT) -> Pressure | None:
    """The processor's pressure; None where the kernel does not tell it."""
    pattern = r"some avg10=(\d+\.\d+) avg60=(\d+\.\d+) avg300=(\d+\.\d+) total=(\d{1,18})"
    match = re.match(pattern, text(root / "proc/pressure/cpu") or "", re.ASCII)
    if match is None:
        return None
    avg10, avg60, avg300 = (float(part) for part in match.groups()[:3])
    return Pressure(avg10=avg10, avg60=avg60, avg300=avg300, total_us=int(match[4]))


def read_memory(pid: int | None = None, root: Path = ROOT) -> Memory | None:
    """Resident memory of the process `pid`, of this one without a number; None if the kernel does not tell it."""
    told = dict(fields(text(root / "proc" / ("self" if pid is None else str(pid)) / "status")))
    sizes = [re.fullmatch(r"(\d{1,15})\s+kB", told.get(name, ""), re.ASCII) for name in ("VmRSS", "VmHWM")]
    kib = [int(match[1]) for match in sizes if match is not None]
    if len(kib) != 2:
        return None
    return Memory(rss_mb=round(kib[0] * 1024 / 1e6, 1), peak_rss_mb=round(kib[1] * 1024 / 1e6, 1))
