"""Checks of the machine; what this one cannot have (1970, a full disk) is put before them."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from eyas_device.config import INSTANCES, Config, ModelSection
from eyas_device.doctor import Context, system
from eyas_device.doctor.finding import green
from tests.support.doctor_parts import context, disk_of, file


@pytest.mark.parametrize("now", [0.0, 86400.0, 4.0e9, 1e20])
def test_an_impossible_clock(now: float) -> None:
    finding = system.clock(context(now=lambda: now))
    assert finding.status == "red" and "impossible" in finding.text


def test_a_clock_before_the_installation_and_an_unsynchronised_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed_at = Path(system.__file__).stat().st_mtime
    monkeypatch.setattr(system, "is_kernel_clock_synchronised", lambda: False)
    before = system.clock(context(now=lambda: installed_at - 3 * 86400, root=tmp_path))
    assert before.status == "yellow" and "before the agent was installed" in before.text
    assert "not synchronised" in system.clock(context(now=lambda: installed_at + 60, root=tmp_path)).text
    file(tmp_path / "run/systemd/timesync/synchronized", "")
    assert system.clock(context(now=lambda: installed_at + 60, root=tmp_path)).status == "green"


@pytest.mark.parametrize(
    ("kernel", "timedatectl", "status"),
    [
        (-1, None, "grey"),
        (-1, "yes\n", "green"),
        (-1, "no\n", "yellow"),
        (5, None, "yellow"),
        (5, "yes\n", "green"),
        (0, None, "green"),
    ],
)
def test_a_clock_inside_of_the_services_sandbox(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kernel: int, timedatectl: str | None, status: str
) -> None:
    """Where adjtimex is forbidden, systemd's bus knows; where nobody may say, it is no warning for ever."""
    monkeypatch.setattr(system, "_ask_kernel", lambda: (kernel, 0))
    now = Path(system.__file__).stat().st_mtime + 60
    asked: list[object] = []

    def run(command: Any, timeout_s: float) -> str | None:
        asked.append(command[0])
        return timedatectl

    assert system.clock(context(now=lambda: now, root=tmp_path, run=run)).status == status
    assert asked == ([] if kernel == 0 else ["timedatectl"])


@pytest.mark.parametrize(
    ("state", "status", "synchronised"),
    [(0, 0, True), (0, 0x2001, True), (0, 0x41, False), (5, 0, False), (-1, 0, False)],
)
def test_the_kernel_tells_whether_the_clock_is_synchronised(
    state: int, status: int, synchronised: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Library:
        @staticmethod
        def adjtimex(timex: Any) -> int:
            (ctypes.c_int * 11).from_buffer(timex._obj)[10] = status  # `status` of struct timex on 64 bits
            return state

    monkeypatch.setattr(system.ctypes, "CDLL", lambda name: Library)  # type: ignore[attr-defined]
    assert system.is_kernel_clock_synchronised() is synchronised


@pytest.mark.parametrize(("free", "status"), [(99, "red"), (400, "yellow"), (501, "green")])
def test_free_space_on_the_disk(tmp_path: Path, free: float, status: str) -> None:
    assert system.disk(context(tmp_path, statvfs=disk_of(free_mb=free))).status == status
    assert system.disk(context(tmp_path / "not/yet", statvfs=disk_of(free_mb=free))).status == status
    assert not list(tmp_path.iterdir()), "the doctor leaves nothing behind"


@pytest.mark.parametrize(
    ("number", "status", "message"),
    [(30, "red", "Read-only file system"), (13, "yellow", "not writable for this user")],
)
def test_a_disk_that_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, status: str, message: str
) -> None:
    def refuse(**_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(system.tempfile, "TemporaryFile", refuse)
    finding = system.disk(context(tmp_path))
    assert (finding.status, message in finding.text) == (status, True), finding


@pytest.mark.parametrize(
    ("inodes", "free", "status"),
    [(10**6, 10**5, "green"), (10**6, 40_000, "yellow"), (10**6, 999, "red"), (0, 0, "green")],
)
def test_inodes(tmp_path: Path, inodes: int, free: int, status: str) -> None:
    assert system.inodes(context(tmp_path, statvfs=disk_of(inodes=inodes, free_inodes=free))).status == status


@pytest.mark.parametrize(
    ("zones", "bits", "status", "message"),
    [
        ([], None, "grey", "no sensor"),
        (["48300"], "0\n", "green", "48 °C"),
        (["48300", "79000"], None, "yellow", "79 °C"),
        (["86000"], None, "red", "86 °C"),
        (["51000"], "50005", "red", "now under-voltage, throttled"),
        (["51000"], "50000", "yellow", "since boot under-voltage, throttled"),
        (["nonsense", "-9999999"], "zz", "grey", "no sensor"),
        ([], "20002", "red", "now frequency capped"),
    ],
)
def test_temperature(tmp_path: Path, zones: list[str], bits: str | None, status: str, message: str) -> None:
    for number, reading in enumerate(zones):
        file(tmp_path / f"sys/class/thermal/thermal_zone{number}/temp", f"{reading}\n")
    if bits is not None:
        file(tmp_path / "sys/devices/platform/soc/soc:firmware/get_throttled", bits)
    finding = system.temperature(context(root=tmp_path))
    assert (finding.status, message in finding.text) == (status, True), finding
    assert "power supply" in finding.fix or "under-voltage" not in finding.text


@pytest.mark.parametrize(
    ("text", "status"),
    [
        ("some avg10=0.00 avg60=3.10 avg300=0.00 total=1\n", "green"),
        ("some avg10=0.00 avg60=71.00 avg300=0.00 total=1\n", "yellow"),
        ("nonsense", "grey"),
        ("", "grey"),
        ("some avg60=x", "grey"),
    ],
)
def test_pressure(tmp_path: Path, text: str, status: str) -> None:
    file(tmp_path / "proc/pressure/cpu", text)
    assert system.processor(context(root=tmp_path)).status == status


def test_a_container_has_its_own_cores_and_memory(tmp_path: Path) -> None:
    file(tmp_path / "proc/pressure/cpu", "some avg10=0.00 avg60=3.10 avg300=0.00 total=1\n")
    file(tmp_path / "proc/meminfo", "MemAvailable:  900000 kB\n")
    file(tmp_path / "proc/self/cgroup", "0::/\n")
    file(tmp_path / "sys/fs/cgroup/cpu.max", "50000 100000\n")
    file(tmp_path / "sys/fs/cgroup/memory.max", "40000000\n")
    config = Config(model=ModelSection(threads=4))
    assert system.processor(context(root=tmp_path)) == green("1 usable cores, pressure 3 % of the last minute")
    assert system.processor(Context(config=config, root=tmp_path)).fix == "[model] threads = 1"
    assert system.memory(context(root=tmp_path)).text == "40 MB available"


@pytest.mark.parametrize(
    ("text", "status"),
    [
        ("MemTotal: 1 kB\nMemAvailable:  900000 kB\n", "green"),
        ("MemAvailable: 150000 kB\n", "yellow"),
        ("MemAvailable: 9000 kB\n", "red"),
        ("MemAvailable: much kB\n", "grey"),
        ("", "grey"),
    ],
)
def test_memory(tmp_path: Path, text: str, status: str) -> None:
    file(tmp_path / "proc/meminfo", text)
    assert system.memory(context(root=tmp_path)).status == status


@pytest.mark.parametrize(("limit", "status"), [(100, "yellow"), (1024, "green"), (-1, "green")])
def test_descriptors(monkeypatch: pytest.MonkeyPatch, limit: int, status: str) -> None:
    monkeypatch.setattr(system.resource, "getrlimit", lambda kind: (limit, limit))
    assert system.descriptors(context()).status == status


@pytest.mark.parametrize(
    ("load", "active", "enabled", "status", "message"),
    [
        ("loaded", "active", "enabled", "green", "active (running), enabled"),
        ("loaded", "active", "disabled", "yellow", "will not start at boot"),
        ("loaded", "activating", "enabled", "yellow", "no frame has been classified yet"),
        ("loaded", "failed", "enabled", "red", "failed"),
        ("not-found", "inactive", "", "red", "not installed"),
    ],
)
def test_service(tmp_path: Path, load: str, active: str, enabled: str, status: str, message: str) -> None:
    (tmp_path / "run/systemd/system").mkdir(parents=True)
    asked: list[Sequence[str]] = []

    def run(command: Sequence[str], timeout_s: float) -> str:
        asked.append(command)
        return f"LoadState={load}\nActiveState={active}\nSubState=running\nUnitFileState={enabled}\nNRestarts=2\n"

    finding = system.service(context(Path("/var/lib/eyas"), root=tmp_path, run=run, config_path=tmp_path))
    assert (finding.status, message in finding.text) == (status, True), finding
    assert asked[0][:3] == ["systemctl", "show", "eyas-device.service"]


def test_the_service_of_one_camera_among_several(tmp_path: Path) -> None:
    (tmp_path / "run/systemd/system").mkdir(parents=True)
    asked: list[Sequence[str]] = []

    def run(command: Sequence[str], timeout_s: float) -> str:
        asked.append(command)
        return "LoadState=not-found\n"

    finding = system.service(context(root=tmp_path, run=run, config_path=INSTANCES / "line-7.toml"))
    assert asked[0][2] == "eyas-device@line-7.service" and "eyas-device@line-7.service is not installed" in finding.text
    assert Path(finding.fix.split()[1]).is_file(), "the file to copy"


@pytest.mark.parametrize(
    ("state", "paths", "status"),
    [
        ("/var/lib/eyas", "", "green"),
        ("/var/lib/eyas/devices/line-7", "", "green"),
        ("/data/eyas", "", "red"),
        ("/var/lib/eyas-2", "", "red"),
        ("/data/eyas", "/data", "green"),
        ("/data/eyas", "/srv -/data/eyas", "green"),
        ("/data/eyas", "/data/eyas/slots", "red"),
    ],
)
def test_the_service_may_write_to_the_state_folder(state: str, paths: str, status: str, tmp_path: Path) -> None:
    (tmp_path / "run/systemd/system").mkdir(parents=True)
    unit = f"LoadState=loaded\nActiveState=active\nUnitFileState=enabled\nReadWritePaths={paths}\n"
    finding = system.service(context(Path(state), root=tmp_path, run=lambda command, timeout_s: unit))
    assert finding.status == status, finding
    assert status == "green" or f"ReadWritePaths={state}" in finding.fix


def test_service_without_systemd_or_with_one_that_does_not_answer(tmp_path: Path) -> None:
    assert system.service(context(root=tmp_path)).status == "grey"
    (tmp_path / "run/systemd/system").mkdir(parents=True)
    assert system.service(context(root=tmp_path, run=lambda command, timeout_s: None)).status == "yellow"
