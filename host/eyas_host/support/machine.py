"""The machine and package versions that a figure was measured with, and what this process may use of the machine.

Cores and memory are those within affinity, cpusets and the limits of containers. Control groups are looked up in
version 2 and version 1: this process's group and all above it.
"""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from math import ceil
from pathlib import Path

PACKAGES = (
    "torch",
    "timm",
    "nncf",
    "openvino",
    "onnx",
    "onnxruntime",
    "ai-edge-litert",
    "litert-torch",
    "ai-edge-quantizer",
    "torch-pruning",
    "numpy",
    "opencv-python-headless",
)

ROOT = Path("/")
_THREAD_BYTES = 500e6
"""Memory for each thread that decodes images: one of 36 megapixels takes 108 MB, and as much again for a while."""
_NO_LIMIT = 1 << 60
"""Version 1 writes a number near 2**63 for no limit."""


def machine() -> dict[str, str]:
    """Processor, GPUs if any, cores, operating system and Python version."""
    gpus = ", ".join(_gpus())
    return {
        "processor": _processor(),
        **({"gpu": gpus} if gpus else {}),
        "cores": str(os.cpu_count()),
        "system": platform.platform(),
        "python": platform.python_version(),
    }


def versions() -> dict[str, str]:
    """Versions of the packages that affect figures."""
    installed = {}
    for package in PACKAGES:
        try:
            installed[package] = version(package)
        except PackageNotFoundError:
            installed[package] = "not installed"
    return installed


def cpu_pressure() -> str:
    """First line of `/proc/pressure/cpu`: fractions of time with a process waiting for a core."""
    try:
        return Path("/proc/pressure/cpu").read_text(encoding="utf-8").splitlines()[0]
    except OSError:
        return "not measured"


def cuda_compiler(environment: Mapping[str, str], which: Callable[[str], str | None]) -> str | None:
    """Path of nvcc where torch looks for it: CUDA_HOME or CUDA_PATH, else PATH, else /usr/local/cuda.

    `which` returns the path of an executable (by name or path), None if there is none.
    """
    home = environment.get("CUDA_HOME") or environment.get("CUDA_PATH")
    if home:
        return which(f"{home}/bin/nvcc")
    return which("nvcc") or which("/usr/local/cuda/bin/nvcc")


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or "unknown"
    names = [line.partition(":")[2].strip() for line in lines if line.startswith(("model name", "Model"))]
    return names[0] if names else platform.machine()


def _gpus() -> list[str]:
    """Names of the NVIDIA GPUs, by the driver; nothing is loaded for it."""
    texts = [
        path.read_text(encoding="utf-8") for path in sorted(Path("/proc/driver/nvidia/gpus").glob("*/information"))
    ]
    lines = [line for text in texts for line in text.splitlines() if line.startswith("Model:")]
    return [line.partition(":")[2].strip() for line in lines]


def usable_cores(root: Path = ROOT) -> int:
    """Cores that this process may use: fewer than the machine has under taskset, a cpuset, or a container's quota."""
    cores = len(os.sched_getaffinity(0))
    return max(1, min([cores, *(ceil(quota) for quota in _cpu_quotas(root))]))


def usable_memory(root: Path = ROOT) -> float:
    """Bytes that this process may still take: what the machine has available, and what its containers leave."""
    match = re.search(r"^MemAvailable:\s+(\d+) kB", _read(root / "proc/meminfo"), re.MULTILINE)
    available = int(match[1]) * 1024 if match else _NO_LIMIT
    return max(0, min([available, *_memory_left(root)]))


def decoding_threads(root: Path = ROOT) -> int:
    """Threads that decode full images: one per usable core, fewer where there is little memory."""
    return max(1, min(usable_cores(root), int(usable_memory(root) / _THREAD_BYTES)))


def limit_threads() -> None:
    """Keep libraries from starting a thread for each core of the machine where a container may use fewer.

    They look at the machine or at the affinity, not at the quota. Call it before they are imported.
    """
    cores = usable_cores()
    if cores < len(os.sched_getaffinity(0)):
        os.environ.setdefault("OMP_NUM_THREADS", str(cores))


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
