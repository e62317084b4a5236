"""The machine and package versions that a figure was measured with, and how many threads suit it."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from eyas_device.board.limits import usable_cores, usable_memory
from eyas_device.board.reading import ROOT

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

_THREAD_BYTES = 500e6
"""Memory for each thread that decodes images: one of 36 megapixels takes 108 MB, and as much again for a while."""


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
