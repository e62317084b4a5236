"""Checks of configuration, system, Python and libraries."""

from __future__ import annotations

import os
import platform
import struct
import sys
from collections.abc import Iterator

from eyas_device.config import CONFIG, EXAMPLE
from eyas_device.doctor.finding import CheckStatus, Context, Finding, green, grey, red, yellow
from eyas_device.support.packages import install_line
from eyas_device.support.processes import JobError
from eyas_device.support.versions import version_numbers

OPENCV = ("opencv-python", "opencv-python-headless", "opencv-contrib-python", "opencv-contrib-python-headless")
ONNX = ("onnxruntime", "onnxruntime-gpu")
_PYTHON = ((3, 10), (3, 13))
"""Oldest and newest tested version."""
_GLIBC = (2, 28)
"""Oldest glibc of the wheels of OpenCV and the runtimes (manylinux_2_28)."""
_MACHINES = ("x86_64", "aarch64")
_IMPORT_S = 40.0


def configuration(context: Context) -> Finding:
    """Check the configuration file."""
    if context.config_error:
        lines = [line.strip() for line in context.config_error.splitlines()]
        return red(f"{lines[0]} {'; '.join(lines[1:])}".strip(), f"correct it; {EXAMPLE} explains every key")
    if context.config_path is None:
        return grey("no configuration file: the defaults", f"copy {EXAMPLE} to {CONFIG}")
    return green(str(context.config_path))


def operating_system(context: Context) -> Finding:
    """Check that the system is Linux."""
    uname = context.uname()
    release = context.read("etc/os-release") or ""
    name = next((line[12:].strip("\"' ") for line in release.splitlines() if line.startswith("PRETTY_NAME=")), "")
    text = f"{name or 'unknown distribution'}, {uname.sysname} {uname.release}"
    return green(text) if uname.sysname == "Linux" else red(text, "Linux is needed")


def python(context: Context) -> Finding:
    """Check that this Python version is tested."""
    return tested_python(*_PYTHON)


def tested_python(oldest: tuple[int, int], newest: tuple[int, int]) -> Finding:
    """Finding about this Python, tested from `oldest` to `newest` (major, minor)."""
    text = f"{platform.python_version()}, {sys.executable}"
    if oldest <= sys.version_info[:2] <= newest:
        return green(text)
    return yellow(f"{text}: not a tested version", f"use Python {oldest[0]}.{oldest[1]} to {newest[0]}.{newest[1]}")


def userland(context: Context) -> Finding:
    """Check that kernel and Python are 64-bit, on a processor for which there are wheels."""
    machine, bits = context.uname().machine, 8 * struct.calcsize("P")
    if bits != 64:
        return red(f"{bits}-bit Python, kernel for {machine}", "install a 64-bit system: 32-bit is not supported")
    if machine not in _MACHINES:
        return red(f"processor {machine}", f"the runtimes have wheels for {' and '.join(_MACHINES)}")
    return green(f"64-bit, {machine}")


def c_library(context: Context) -> Finding:
    """Check that the C library is a glibc on which the wheels run."""
    needed = f"glibc {'.'.join(map(str, _GLIBC))} or newer"
    try:
        libc = os.confstr("CS_GNU_LIBC_VERSION") or ""
    except (ValueError, OSError):
        libc = ""
    if not libc.startswith("glibc "):
        return red(f"not glibc ({libc or 'unknown'})", f"{needed} is needed; musl is not supported")
    return green(libc) if version_numbers(libc[6:]) >= _GLIBC else red(libc, f"{needed} is needed: update the system")


def libraries(context: Context) -> Finding:
    """Check that the libraries of the agent can be imported; names their versions."""
    try:
        versions = context.job("libraries", {}, _IMPORT_S)
    except JobError as error:
        return red(f"an import fails: {error}", f"{install_line()}, with -c and the constraints file of this board")
    return green(", ".join(f"{name} {version}".strip() for name, version in versions.items()))


def conflicts(context: Context) -> Finding:
    """Check that no packages are installed that conflict with each other."""
    conflicts = list(_conflicts(context))
    if not conflicts:
        return green("no known conflicts")
    worst: CheckStatus = "red" if any(status == "red" for status, _, _ in conflicts) else "yellow"
    fixes = dict.fromkeys(fix for _, _, fix in conflicts)
    return Finding(worst, "; ".join(text for _, text, _ in conflicts), "; ".join(fixes))


def _conflicts(context: Context) -> Iterator[tuple[CheckStatus, str, str]]:
    """Status, description and fix of each conflict."""

    def version(package: str) -> tuple[int, ...]:
        return version_numbers(context.version(package) or "")

    def has(package: str) -> bool:
        return context.version(package) is not None

    numpy = version("numpy")
    numpy2 = numpy >= (2,)
    shown = f"numpy {context.version('numpy')}"
    if has("tflite-runtime") and numpy2:  # built against numpy 1; its metadata does not say so
        text = f"tflite-runtime {context.version('tflite-runtime')} cannot be imported with {shown}"
        yield "red", text, "pip install 'numpy<2' 'opencv-python-headless<4.12', or remove tflite-runtime"
    opencvs = [package for package in OPENCV if has(package)]
    for package in opencvs:
        text = f"{package} {context.version(package)} does not work with {shown}"
        if version(package) >= (5,) and has("numpy") and not numpy2:
            yield "red", text, f"pip install '{package}<4.12' (it takes numpy 1), or numpy 2"
        if version(package) < (4, 10) and numpy2:
            yield "red", text, f"pip install '{package}>=4.10'"
        if version(package) >= (5,) and context.uname().machine == "aarch64":
            text = f"{package} {context.version(package)} for aarch64 resizes images differently from the workstation"
            yield "yellow", text, f"pip install '{package}>=4.10,<5'"
    if len(opencvs) > 1:
        text = f"{' and '.join(opencvs)} overwrite each other's files"
        yield "yellow", text, f"pip uninstall {' '.join(opencvs)}, then install one of them"
    if all(has(package) for package in ONNX):
        text = f"{' and '.join(ONNX)} overwrite each other's files"
        yield "yellow", text, f"pip uninstall {' '.join(ONNX)}, then install one of them"
    for package in ONNX:
        if has(package) and version(package) < (1, 19) and numpy2:
            text = f"{package} {context.version(package)} does not work with {shown}"
            yield "red", text, f"pip install '{package}>=1.19', or numpy 1"
