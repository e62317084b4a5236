"""GPU, driver and torch: whether they fit each other."""

from __future__ import annotations

import re
from typing import Any

from eyas_device.doctor.finding import Finding, green, grey, red, yellow
from eyas_device.support.processes import JobError
from eyas_device.support.versions import version_numbers
from eyas_host.doctor.context import Context

LEAST_DRIVER = {11: (450, 80, 2), 12: (525, 60, 13), 13: (580, 65, 6)}
"""CUDA's major version -> oldest Linux driver that runs all of its minor versions.

Source: NVIDIA, "CUDA Toolkit Release Notes", minor version compatibility.
"""
_QUERY = ("nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader,nounits")
_QUERY_S, _TORCH_S = 10.0, 60.0
_SMALL_MB = 4000


def driver(context: Context) -> Finding:
    """Which NVIDIA GPUs and driver the system has."""
    gpus = _gpus(context)
    wanted = context.recipe.run.device == "cuda"
    if gpus:
        named = ", ".join(f"{name} ({memory} MB)" for name, _, memory in gpus)
        text = f"{named}, driver {gpus[0][1]}"
        if min(int(memory) for _, _, memory in gpus) < _SMALL_MB:
            return yellow(text, "little memory: take a smaller [teacher] batch with accumulate")
        return green(text)
    if context.which("nvidia-smi") or (context.root / "proc/driver/nvidia/version").exists():
        fix = (
            "the driver does not answer: restart after an update of it, else install it again (dmesg | grep -i nvidia)"
        )
        return red("an NVIDIA driver is installed, but nvidia-smi fails", fix)
    if wanted:
        return red(
            "no NVIDIA driver, and the recipe asks for [run] device = 'cuda'", "install the driver, or take 'auto'"
        )
    return grey("no NVIDIA GPU: training runs on the processor")


def torch_build(context: Context) -> Finding:
    """Whether torch is built for this GPU and driver, and can use them."""
    try:
        built = context.job("torch_build", {}, _TORCH_S)
    except JobError as error:
        fix = "make install; a kernel image or library that is missing: driver, torch and GPU do not fit"
        return red(f"torch fails: {error}", fix)
    gpus = _gpus(context)
    if built["hip"]:
        return yellow(f"torch {built['version']} for ROCm {built['hip']}", "it is not tested here: report what fails")
    if built["cuda"] is None:
        text = f"torch {built['version']} is built for processors alone"
        return yellow(f"{text}, and there is a GPU", "make install TORCH=cuda in a new .venv") if gpus else green(text)
    text = f"torch {built['version']}, built for CUDA {built['cuda']}"
    if not gpus and not built["available"]:
        return green(f"{text}; there is no GPU")
    least = LEAST_DRIVER.get(version_numbers(built["cuda"])[0])
    if gpus and least is not None and version_numbers(gpus[0][1]) < least:
        needed = ".".join(map(str, least))
        fix = f"update the driver to {needed} or newer, or install a torch for an older CUDA (its cu12x index)"
        return red(f"{text}, but driver {gpus[0][1]} is too old for it", fix)
    if not built["available"]:
        hidden = context.environment.get("CUDA_VISIBLE_DEVICES")
        if hidden is not None and hidden.strip() in ("", "-1"):
            return yellow(f"{text}; CUDA_VISIBLE_DEVICES = {hidden!r} hides the GPU", "unset CUDA_VISIBLE_DEVICES")
        return red(f"{text}, but it cannot use the GPU", "restart the machine; in a container start it with --gpus all")
    foreign = [gpu for gpu in built["gpus"] if not fits(gpu["capability"], built["built_for"])]
    if foreign:
        told = ", ".join(f"{gpu['name']} (sm_{_joined(gpu['capability'])})" for gpu in foreign)
        fix = "install a torch for this GPU: an older CUDA for an old one, a newer for a new one"
        return red(f"{text}, for {', '.join(built['built_for'])}: not for {told}", fix)
    return green(f"{text}, uses {', '.join(gpu['name'] for gpu in built['gpus'])}")


def fits(capability: list[int], built_for: list[str]) -> bool:
    """Whether code for `built_for` (sm_86, compute_90, ...) runs on a GPU of that compute capability [major, minor].

    Binaries run on the same major version from their minor one up, PTX on everything newer. Source: NVIDIA, "CUDA C++
    Programming Guide", binary and PTX compatibility.
    """
    major, minor = capability
    for name in built_for:
        match = re.fullmatch(r"(sm|compute)_(\d+)(\d)[a-z]?", name)
        if match is None:
            continue
        its = int(match[2]), int(match[3])
        if its <= (major, minor) and (match[1] == "compute" or its[0] == major):
            return True
    return False


def _gpus(context: Context) -> list[tuple[str, str, str]]:
    """Name, driver and memory in MB of each."""
    lines = (context.run(_QUERY, _QUERY_S) or "").splitlines()
    rows: list[Any] = [[part.strip() for part in line.split(",")] for line in lines]
    return [tuple(row) for row in rows if len(row) == 3 and row[2].isdigit()]


def _joined(capability: list[int]) -> str:
    return "".join(map(str, capability))
