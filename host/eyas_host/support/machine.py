"""The machine and package versions that a figure was measured with."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
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


def usable_cores() -> int:
    """Cores that this process may run on: fewer than the machine has under taskset, cpuset or a scheduler."""
    return len(os.sched_getaffinity(0))


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
