"""A kill, a full disk or an error of the disk at a change of an installation, in real processes.

Each test lets a part of the changes meet a fault; `benchmarks/updates.py` lets all of them.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.fault_matrix import PROGRAMS, Scenario, judged_run, matrix
from tests.support.faults import Change, Fault, FaultyDisk, verified
from tests.support.install_scenarios import install_scenarios
from tests.support.system_parts import require


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FaultyDisk]:
    with FaultyDisk(tmp_path_factory.mktemp("faults"), *PROGRAMS) as started:
        yield started


@pytest.fixture(scope="module")
def scenarios(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Scenario]:
    folder = tmp_path_factory.mktemp("scenarios")
    return {scenario.name: scenario for scenario in install_scenarios(folder)}


@pytest.mark.parametrize(
    ("name", "every"),
    [
        ("install, both slots full", 24),
        ("first install", 32),
        ("second install", 32),
        ("install of what was refused", 36),
        ("install of wrong predictions", 36),
        ("roll back", 2),
    ],
)
def test_a_fault_leaves_a_verified_bundle_and_the_second_try_succeeds(
    name: str, every: int, disk: FaultyDisk, scenarios: dict[str, Scenario], tmp_path: Path
) -> None:
    result = matrix(disk, scenarios[name], tmp_path, every=every)
    assert result.runs > 8
    assert result.wrong == []


def test_an_error_after_the_switch_says_which_slot_is_current(
    disk: FaultyDisk, scenarios: dict[str, Scenario], tmp_path: Path
) -> None:
    scenario = scenarios["second install"]
    changes = judged_run(disk, scenario, tmp_path, 0, Fault.NONE).changes
    assert changes[-1] == Change("fsync", "slots")
    run = judged_run(disk, scenario, tmp_path, len(changes), Fault.IO_ERROR)
    assert run.code == 2
    assert (
        "slots: Input/output error; slot b is current now, and a power cut may undo that: check the disk" in run.output
    )
    command = [word.format(state=tmp_path / "state") for word in scenario.command]
    again = disk.run(tmp_path / "state", *command)
    assert again.changes[-1] == Change("fsync", "slots"), "what is current already may not be on the disk"


def test_a_refusal_that_cannot_be_taken_back_ends_the_installation(
    disk: FaultyDisk, scenarios: dict[str, Scenario], tmp_path: Path
) -> None:
    scenario = scenarios["second install"]
    changes = judged_run(disk, scenario, tmp_path, 0, Fault.NONE).changes
    at = 1 + changes.index(Change("unlink", "slots/b.refused"))
    for fault in (Fault.NO_SPACE, Fault.DEAD):
        run = judged_run(disk, scenario, tmp_path, at, fault)
        assert run.code == 2 and "the current slot is unchanged" in run.output


def test_what_killed_processes_leave_is_removed_and_what_others_write_is_not(
    disk: FaultyDisk, scenarios: dict[str, Scenario], tmp_path: Path
) -> None:
    scenario = scenarios["second install"]
    changes = judged_run(disk, scenario, tmp_path, 0, Fault.NONE).changes
    at = next(n for n, change in enumerate(changes, 1) if re.match(r"rename slots/b\.refused", str(change)))
    slots = tmp_path / "state" / "slots"
    mine = f".b.refused.{os.getpid()}.part"
    shutil.rmtree(slots.parent)
    command = scenario.prepare(slots.parent)
    (slots / mine).write_bytes(b"half")
    assert disk.run(slots.parent, *command, at=at, fault=Fault.KILL).code == -signal.SIGKILL
    assert len(list(slots.glob(".b.refused.*.part"))) == 2
    assert disk.run(slots.parent, *command).code == 0
    assert [path.name for path in slots.glob(".*.part")] == [mine]


def test_what_finds_nothing_wrong_can_find_something(
    disk: FaultyDisk, scenarios: dict[str, Scenario], tmp_path: Path
) -> None:
    before, state = scenarios["second install"], tmp_path / "state"
    broken, at = [], 0
    while True:
        at += 1
        shutil.rmtree(state, ignore_errors=True)
        before.prepare(state)
        run = disk.run(state, before.command[1], state, at=at, fault=Fault.KILL, module="tests.support.careless")
        if run.code == 0:
            break
        try:
            verified(state / "slots")
        except AssertionError as error:
            broken.append(str(error))
    assert len(broken) > at / 2


_SYSTEM_CALLS = (
    "openat,open,creat,write,pwrite64,writev,pwritev,fsync,fdatasync,rename,renameat,renameat2,unlink,unlinkat,mkdir,"
    "mkdirat,rmdir,symlink,symlinkat,link,linkat,chmod,fchmod,fchmodat,ftruncate,truncate,fallocate,sendfile,"
    "copy_file_range"
)


def test_every_change_that_the_kernel_sees_is_counted(
    disk: FaultyDisk, scenarios: dict[str, Scenario], tmp_path: Path
) -> None:
    (strace,) = require("strace")
    scenario, log = scenarios["install, both slots full"], tmp_path / "strace.log"
    counted = judged_run(disk, scenario, tmp_path, 0, Fault.NONE).changes
    state = tmp_path / "traced"
    command = scenario.prepare(state)
    tracing = [strace, "-f", "-y", "-s", "300", "-e", f"trace={_SYSTEM_CALLS}", "-o", log]
    subprocess.run([*tracing, sys.executable, "-m", "eyas_device", *command], check=True, capture_output=True)
    lines = [line for line in log.read_text().splitlines() if str(state) in line and not _only_reads(line)]
    assert len(lines) == len(counted), "\n".join(lines)
    for line, change in zip(lines, counted, strict=True):
        name = re.sub(r"\.\d+\.part$", "", Path(change.path).name)
        assert name in line and re.search(_CALLS.get(change.what, change.what), line), (line, change)


_CALLS = {"rmdir": r"rmdir\(|AT_REMOVEDIR", "open": "O_CREAT|O_TRUNC"}


def _only_reads(line: str) -> bool:
    return "<pipe:" in line or (" open" in line and "O_CREAT" not in line and "O_TRUNC" not in line)
