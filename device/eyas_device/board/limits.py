"""What this process may use of the machine: cores and memory within affinity, cpusets and the limits of containers.

Control groups are looked up in version 2 and version 1: this process's group and all above it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from math import ceil
from pathlib import Path

from eyas_device.board.reading import ROOT

_NO_LIMIT = 1 << 60
"""Version 1 writes a number near 2**63 for no limit."""


def usable_cores(root: Path = ROOT, cores: int | None = None) -> int:
    """Cores that this process may use: fewer than the machine has under taskset, a cpuset, or a container's quota.

    `cores` are those that it may use but for the quota, by default those of its affinity.
    """
    if cores is None:
        cores = len(os.sched_getaffinity(0))
    return max(1, min([cores, *(ceil(quota) for quota in _cpu_quotas(root))]))


def usable_memory(root: Path = ROOT) -> float:
    """Bytes that this process may still take: what the machine has available, and what its containers leave."""
    match = re.search(r"^MemAvailable:\s+(\d+) kB", _read(root / "proc/meminfo"), re.MULTILINE)
    available = int(match[1]) * 1024 if match else _NO_LIMIT
    return max(0, min([available, *_memory_left(root)]))


def _cpu_quotas(root: Path) -> Iterator[float]:
    """Cores that each control group may use."""
    for folder in _groups(root, ""):
        match = re.match(r"(\d+) (\d+)", _read(folder / "cpu.max"))
        if match:
            yield int(match[1]) / int(match[2])
    for folder in _groups(root, "cpu"):
        quota, period = (_number(folder / f"cpu.cfs_{name}_us") for name in ("quota", "period"))
        if quota and period:
            yield quota / period


def _memory_left(root: Path) -> Iterator[int]:
    """Bytes below the limit of each control group; what the page cache holds can be freed."""
    for controller, limit, used, cached in (
        ("", "memory.max", "memory.current", "inactive_file"),
        ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ):
        for folder in _groups(root, controller):
            most = _number(folder / limit)
            if most is not None and most < _NO_LIMIT:
                match = re.search(rf"^{cached} (\d+)$", _read(folder / "memory.stat"), re.MULTILINE)
                yield most - (_number(folder / used) or 0) + (int(match[1]) if match else 0)


def _groups(root: Path, controller: str) -> Iterator[Path]:
    """Folders of this process's control group and of those above, of version 2 or of a controller of version 1."""
    top = root / "sys/fs/cgroup"
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, names, path = [*line.split(":", 2), "", ""][:3]
        if controller in names.split(","):
            tops = [top] if not controller else [top / names, top / controller]
            for base in dict.fromkeys(place for place in tops if place.is_dir()):
                inner = base / path.lstrip("/")
                yield from (folder for folder in (inner, *inner.parents) if folder.is_relative_to(base))


def _number(path: Path) -> int | None:
    text = _read(path).strip()
    return int(text) if text.isdigit() else None


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
