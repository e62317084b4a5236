"""Checks of the system, Python and libraries."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from eyas_device.doctor import software
from eyas_device.doctor.finding import green
from eyas_device.support.processes import JobError
from tests.support.doctor_parts import context, file, versions


def test_this_machine_is_supported() -> None:
    for check in (software.operating_system, software.userland, software.c_library, software.python):
        assert check(context()).status == "green", check(context())


def test_the_name_of_the_system_is_read_from_os_release(tmp_path: Path) -> None:
    file(tmp_path / "etc/os-release", 'NAME=x\nPRETTY_NAME="Raspberry Pi OS 13"\n')
    uname = SimpleNamespace(sysname="Linux", release="6.12.0-rpi", machine="aarch64")
    finding = software.operating_system(context(root=tmp_path, uname=lambda: uname))
    assert finding == green("Raspberry Pi OS 13, Linux 6.12.0-rpi")
    assert (
        software.operating_system(context(uname=lambda: SimpleNamespace(sysname="Darwin", release="1"))).status == "red"
    )


def test_32_bit_and_strange_processors_are_red(monkeypatch: pytest.MonkeyPatch) -> None:
    assert software.userland(context(uname=lambda: SimpleNamespace(machine="riscv64"))).status == "red"
    monkeypatch.setattr(software.struct, "calcsize", lambda kind: 4)
    finding = software.userland(context(uname=lambda: SimpleNamespace(machine="aarch64")))
    assert (finding.status, finding.text) == ("red", "32-bit Python, kernel for aarch64")


@pytest.mark.parametrize(("libc", "status"), [("glibc 2.27", "red"), ("glibc 2.28", "green"), ("", "red")])
def test_c_library(monkeypatch: pytest.MonkeyPatch, libc: str, status: str) -> None:
    monkeypatch.setattr(software.os, "confstr", lambda name: libc)
    assert software.c_library(context()).status == status


@pytest.mark.parametrize(("version", "status"), [((3, 9), "yellow"), ((3, 10), "green"), ((3, 15), "yellow")])
def test_python(monkeypatch: pytest.MonkeyPatch, version: tuple[int, int], status: str) -> None:
    monkeypatch.setattr(software.sys, "version_info", (*version, 0, "final", 0))
    assert software.python(context()).status == status


@pytest.mark.parametrize(
    ("installed", "status", "message"),
    [
        ({"numpy": "2.4.6", "opencv_python_headless": "5.0.0.93"}, "green", "no known conflicts"),
        (
            {"numpy": "1.26.4", "opencv_python_headless": "4.11.0.86", "tflite_runtime": "2.14.0"},
            "green",
            "no known conflicts",
        ),
        (
            {"numpy": "2.0.0", "tflite_runtime": "2.14.0"},
            "red",
            "tflite-runtime 2.14.0 cannot be imported with numpy 2",
        ),
        ({"numpy": "1.26.4", "opencv_python_headless": "5.0.0.93"}, "red", "does not work with numpy 1.26.4"),
        ({"numpy": "2.1.0", "opencv_python": "4.9.0.80"}, "red", "opencv-python 4.9.0.80 does not work with numpy 2"),
        (
            {"numpy": "2.1.0", "opencv_python": "4.12.0.88", "opencv_python_headless": "4.12.0.88"},
            "yellow",
            "opencv-python and opencv-python-headless overwrite",
        ),
        ({"numpy": "2.1.0", "onnxruntime": "1.20", "onnxruntime_gpu": "1.20"}, "yellow", "overwrite each other"),
        ({"numpy": "2.1.0", "onnxruntime": "1.18.1"}, "red", "onnxruntime 1.18.1 does not work with numpy 2.1.0"),
        ({}, "green", "no known conflicts"),
    ],
)
def test_conflicts(installed: dict[str, str], status: str, message: str) -> None:
    finding = software.conflicts(context(version=versions(**installed)))
    assert (finding.status, message in finding.text) == (status, True), finding
    assert bool(finding.fix) == (status != "green")


@pytest.mark.parametrize(("machine", "status"), [("aarch64", "yellow"), ("x86_64", "green")])
def test_opencv_5_resizes_differently_on_aarch64(machine: str, status: str) -> None:
    installed = versions(numpy="2.4.6", opencv_python_headless="5.0.0.93")
    finding = software.conflicts(context(version=installed, uname=lambda: SimpleNamespace(machine=machine)))
    assert finding.status == status, finding
    assert ("resizes images" in finding.text) == (machine == "aarch64")


def test_the_worst_of_several_conflicts_counts_and_all_are_listed() -> None:
    installed = versions(numpy="2.0", tflite_runtime="2.14.0", opencv_python="5.0", opencv_contrib_python="5.0")
    finding = software.conflicts(context(version=installed))
    assert finding.status == "red"
    assert "tflite-runtime" in finding.text and "overwrite" in finding.text


def test_an_import_that_fails_is_red() -> None:
    def job(name: str, arguments: object, timeout_s: float) -> Any:
        raise JobError("numpy.core.multiarray failed to import", "ImportError")

    finding = software.libraries(context(job=job))
    assert finding.status == "red" and "multiarray failed" in finding.text
