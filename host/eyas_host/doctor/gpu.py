"""Checks of GPU, driver and torch against each other."""

from __future__ import annotations

import re
from typing import Any

from eyas_device.doctor.finding import Finding, green, grey, red, yellow
from eyas_device.support.processes import JobError
from eyas_device.support.versions import version_numbers
from eyas_host.doctor.context import Context

MIN_DRIVER = {11: (450, 80, 2), 12: (525, 60, 13), 13: (580, 65, 6)}
"""CUDA major version -> oldest Linux driver that supports all its minor versions.

Source: NVIDIA, "CUDA Toolkit Release Notes", minor version compatibility.
"""
_QUERY = ("nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader,nounits")
_QUERY_S, _TORCH_S = 10.0, 60.0
_MIN_MEMORY_MB = 4000


def driver(context: Context) -> Finding:
    """Check NVIDIA GPUs and their driver."""
    gpus = _gpus(context)
    required = context.recipe.run.device == "cuda"
    if gpus:
        names = ", ".join(f"{name} ({memory} MB)" for name, _, memory in gpus)
        text = f"{names}, driver {gpus[0][1]}"
        if min(int(memory) for _, _, memory in gpus) < _MIN_MEMORY_MB:
            return yellow(text, "little memory: use a smaller [teacher] batch with accumulate")
        return green(text)
    if context.which("nvidia-smi") or (context.root / "proc/driver/nvidia/version").exists():
        fix = "restart after a driver update; otherwise reinstall the driver (see dmesg | grep -i nvidia)"
        return red("an NVIDIA driver is installed, but nvidia-smi fails", fix)
    if required:
        return red(
            "no NVIDIA driver, and the recipe asks for [run] device = 'cuda'", "install the driver, or use 'auto'"
        )
    return grey("no NVIDIA GPU: training runs on the CPU")


def torch_build(context: Context) -> Finding:
    """Check that torch is built for this GPU and driver, and can use them."""
    try:
        built = context.job("torch_build", {}, _TORCH_S)
    except JobError as error:
        fix = "make install; if a kernel image or library is missing: driver, torch and GPU do not match"
        return red(f"torch fails: {error}", fix)
    gpus = _gpus(context)
    if built["hip"]:
        return yellow(f"torch {built['version']} for ROCm {built['hip']}", "ROCm is untested: report what fails")
    if built["cuda"] is None:
        text = f"torch {built['version']} is built for CPUs only"
        return yellow(f"{text}, and there is a GPU", "make install TORCH=cuda in a new .venv") if gpus else green(text)
    text = f"torch {built['version']}, built for CUDA {built['cuda']}"
    if not gpus and not built["available"]:
        return green(f"{text}; there is no GPU")
    oldest = MIN_DRIVER.get(version_numbers(built["cuda"])[0])
    if gpus and oldest is not None and version_numbers(gpus[0][1]) < oldest:
        needed = ".".join(map(str, oldest))
        fix = f"update the driver to {needed} or newer, or install torch for an older CUDA (cu12x)"
        return red(f"{text}, but driver {gpus[0][1]} is too old for it", fix)
    if not built["available"]:
        hidden = context.environment.get("CUDA_VISIBLE_DEVICES")
        if hidden is not None and hidden.strip() in ("", "-1"):
            return yellow(f"{text}; CUDA_VISIBLE_DEVICES = {hidden!r} hides the GPU", "unset CUDA_VISIBLE_DEVICES")
        return red(f"{text}, but it cannot use the GPU", "restart the machine; start a container with --gpus all")
    unsupported = [gpu for gpu in built["gpus"] if not runs_on(gpu["capability"], built["built_for"])]
    if unsupported:
        names = ", ".join(f"{gpu['name']} (sm_{_joined(gpu['capability'])})" for gpu in unsupported)
        fix = "install torch for this GPU: built for an older CUDA if it is old, for a newer one if it is new"
        return red(f"{text}, for {', '.join(built['built_for'])}, not for {names}", fix)
    return green(f"{text}, uses {', '.join(gpu['name'] for gpu in built['gpus'])}")


def gpu_names(context: Context) -> list[str]:
    """Names of the NVIDIA GPUs that the driver finds."""
    return [name for name, _, _ in _gpus(context)]


def runs_on(capability: list[int], built_for: list[str]) -> bool:
    """Whether code built for `built_for` (sm_86, compute_90, ...) runs on a GPU of compute capability [major, minor].

    Binaries run on the same major version from their minor version on, PTX on anything newer. Source: NVIDIA, "CUDA C++
    Programming Guide", binary and PTX compatibility.
    """
    major, minor = capability
    for name in built_for:
        match = re.fullmatch(r"(sm|compute)_(\d+)(\d)[a-z]?", name)
        if match is None:
            continue
        target = int(match[2]), int(match[3])
        if target <= (major, minor) and (match[1] == "compute" or target[0] == major):
            return True
    return False


def _gpus(context: Context) -> list[tuple[str, str, str]]:
    """Name, driver version and memory (MB) of each GPU."""
    lines = (context.run(_QUERY, _QUERY_S) or "").splitlines()
    rows: list[Any] = [[field.strip() for field in line.split(",")] for line in lines]
    return [tuple(row) for row in rows if len(row) == 3 and row[2].isdigit()]


def _joined(capability: list[int]) -> str:
    return "".join(map(str, capability))
