"""The pinned sets: for each board, Python and processor that they are for, they resolve to wheels and are complete."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from tests.support.paths import ROOT
from tests.support.system_parts import unavailable

_BESIDE = Path(sys.executable).with_name("uv")
UV = str(_BESIDE) if _BESIDE.is_file() else shutil.which("uv")

PROFILES = [
    # profile, Python, machine and glibc, first digit of numpy, extras
    pytest.param("device-jetpack6", "3.10", "aarch64-manylinux_2_35", "1", "onnx openvino tflite", id="jetpack-6"),
    pytest.param("device-numpy1", "3.11", "aarch64-manylinux_2_36", "1", "onnx openvino tflite", id="bookworm"),
    pytest.param("device-numpy2", "3.11", "x86_64-manylinux_2_36", "2", "onnx openvino", id="debian-12"),
    pytest.param("device-numpy2", "3.12", "x86_64-manylinux_2_39", "2", "onnx openvino", id="ubuntu-24.04"),
    pytest.param("device-numpy2", "3.13", "aarch64-manylinux_2_40", "2", "onnx openvino", id="trixie"),
    pytest.param("device-numpy1", "3.11", "x86_64-manylinux_2_36", "1", "onnx openvino tflite", id="tflite-runtime"),
    pytest.param("tensorflow", "3.11", "x86_64-manylinux_2_36", "2", "tensorflow", id="tensorflow"),
    pytest.param("tensorflow", "3.13", "aarch64-manylinux_2_40", "2", "tensorflow", id="tensorflow-trixie"),
]
BOARD = "aarch64-manylinux_2_36"
NEWEST = ("3.14", "x86_64-manylinux_2_39")


def pinned(profile: str, extras: str = "") -> tuple[str, ...]:
    """Options of a resolution with a pinned set."""
    return ("--constraint", f"constraints/{profile}.txt", *(f"--extra={name}" for name in extras.split()))


def questions() -> Iterator[tuple[str, str, tuple[str, ...]]]:
    """Python, platform and options of the resolutions below."""
    for profile, python, platform, _, extras in (one.values for one in PROFILES):
        yield python, platform, pinned(profile)
        yield python, platform, pinned(profile, extras)
    for python in ("3.11", "3.13"):
        yield python, BOARD, ("--extra=tensorflow",)
        yield python, BOARD, ("--extra=tflite",)
    yield *NEWEST, ("--extra=tensorflow",)


@pytest.fixture(scope="module", autouse=True)
def _asked_at_once() -> None:
    """Each resolution waits for the registry most of the time: all of them wait side by side."""
    if UV is not None:
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda question: compiled(*question), questions()))


@cache
def compiled(python: str, platform: str, options: tuple[str, ...]) -> subprocess.CompletedProcess[str]:
    """Run `uv pip compile` for `eyas-device`, wheels only."""
    command = [str(UV), "pip", "compile", "--quiet", "--no-header", "--no-annotate", "--only-binary", ":all:"]
    command += ["--python-version", python, "--python-platform", platform, *options, "device/pyproject.toml"]
    if not os.access(Path.home(), os.W_OK):
        command.append("--no-cache")
    # what uv has seen before is enough, and takes no time; the registry is asked for the rest
    for more in (["--offline"], []):
        done = subprocess.run([*command, *more], cwd=ROOT, capture_output=True, text=True, timeout=240, check=False)
        if done.returncode == 0:
            break
    return done


def resolve(*options: str, python: str, platform: str) -> dict[str, str]:
    """Package -> version that `eyas-device` and these requirements need on that machine, wheels only."""
    if UV is None:
        unavailable("uv is not installed (pip install uv)")
    done = compiled(python, platform, options)
    if done.returncode and any(word in done.stderr.lower() for word in ("error sending request", "failed to fetch")):
        unavailable(f"the package registry cannot be reached: {done.stderr.strip()}")
    assert done.returncode == 0, done.stderr
    found = [Requirement(line) for line in done.stdout.splitlines()]
    return {requirement.name: str(requirement.specifier).removeprefix("==") for requirement in found}


def pins(profile: str, *, python: str, machine: str) -> dict[str, str]:
    """Package -> version of a constraints file, on that machine."""
    lines = (ROOT / "constraints" / f"{profile}.txt").read_text(encoding="utf-8").splitlines()
    there = {"python_version": python, "platform_machine": machine}
    parsed = [Requirement(line) for line in lines if line and not line.startswith("#")]
    kept = [pin for pin in parsed if pin.marker is None or pin.marker.evaluate(there)]
    assert len({pin.name for pin in kept}) == len(kept) > 10
    return {pin.name: str(pin.specifier).removeprefix("==") for pin in kept}


@pytest.mark.parametrize(("profile", "python", "platform", "numpy", "extras"), PROFILES)
def test_a_profile_resolves_to_its_own_pins(profile: str, python: str, platform: str, numpy: str, extras: str) -> None:
    expected = pins(profile, python=python, machine=platform.partition("-")[0])
    base = resolve(*pinned(profile), python=python, platform=platform)
    assert {"ai-edge-litert", "msgspec", "numpy", "opencv-python-headless", "paho-mqtt"} <= set(base)
    assert not {"torch", "timm", "nncf", "litert-torch"} & set(base)
    assert base["numpy"].split(".")[0] == numpy
    more = resolve(*pinned(profile, extras), python=python, platform=platform)
    assert len(more) > len(base)
    for name, version in {**base, **more}.items():
        assert expected.get(name) == version, f"{name} {version} is not what constraints/{profile}.txt says"


@pytest.mark.parametrize(("python", "old"), [("3.11", True), ("3.13", False)])
def test_the_older_readers_resolve_without_a_pinned_set(python: str, old: bool) -> None:
    assert "tensorflow" in resolve("--extra=tensorflow", python=python, platform=BOARD)
    tflite = resolve("--extra=tflite", python=python, platform=BOARD)
    assert ("tflite-runtime" in tflite) == old  # it has no wheels for newer Pythons: there the extra adds nothing
    assert tflite["numpy"].startswith("1.") == old


def test_there_is_no_tensorflow_for_a_newer_python() -> None:
    """It has release candidates only: the extra takes none of them, and LiteRT is in the base."""
    assert "tensorflow" not in resolve("--extra=tensorflow", python=NEWEST[0], platform=NEWEST[1])


def test_opencv_is_one_whose_pixels_are_those_of_the_workstation() -> None:
    """OpenCV 5 for aarch64 rounds otherwise when it shrinks; tests/arm shows it."""
    for profile, python in (("device-jetpack6", "3.10"), ("device-numpy1", "3.11"), ("device-numpy2", "3.13")):
        assert pins(profile, python=python, machine="aarch64")["opencv-python-headless"].startswith("4.")
