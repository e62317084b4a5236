"""Every change of the disk meets every fault, and what a device has afterwards is judged."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec

from tests.support.faults import Change, Fault, FaultyDisk, Run, verified

ONCE = (Fault.KILL, Fault.NO_SPACE, Fault.IO_ERROR)
MORE = (Fault.TORN, Fault.FULL, Fault.DEAD, Fault.HANG, Fault.TERM)
_LOCKS = ("slots/.lock", "updates/.lock")
_ENDS = (Fault.KILL, Fault.TORN, Fault.TERM, Fault.HANG)
PROGRAMS = (
    "eyas_device.commands.install",
    "eyas_device.commands.run",
    "eyas_device.commands.slots",
    "eyas_device.updates.slots",
    "eyas_device.runtimes.litert",
    "eyas_device.support.logs",
    "ai_edge_litert.interpreter",
)
"""What a process with faults imports once."""


class Scenario(msgspec.Struct, frozen=True, kw_only=True):
    """A command, the state that it begins with, and the versions that may run afterwards."""

    name: str
    state: Path
    """Is copied for each run."""
    command: tuple[str, ...]
    """With `{state}` for the copy of the state."""
    old: str | None
    """Version that is current before; None if there is none."""
    new: str
    """Version that is current once the command succeeds."""
    expected_code: int = 0
    """Exit code without a fault."""
    toggles: bool = False
    """Whether the command undoes itself if it is given again."""

    def prepare(self, state: Path) -> list[str]:
        """Copy the state to the new folder `state`, and return the command for it."""
        shutil.copytree(self.state, state, symlinks=True)
        return [word.format(state=state) for word in self.command]


class Current(NamedTuple):
    """The current slot."""

    version: str | None
    """None if there is none."""
    good: bool = False
    problem: str = ""


class Matrix(msgspec.Struct, frozen=True, kw_only=True):
    """What the faults of one scenario have shown."""

    scenario: str
    changes: list[Change]
    """Changes of the disk without a fault."""
    points: int
    """Changes that met a fault."""
    runs: int
    wrong: list[str]
    """Each run after which something was not as it must be."""


def matrix(
    disk: FaultyDisk, scenario: Scenario, scratch: Path, *, faults: Sequence[Fault] = ONCE + MORE, every: int = 1
) -> Matrix:
    """Let every change of a scenario meet each of the faults; with `every`, one of so many, another for each fault."""
    changes = judged_run(disk, scenario, scratch, 0, Fault.NONE).changes
    met: set[int] = set()
    wrong: list[str] = []
    runs = 0
    for number, fault in enumerate(faults):
        for at in range(1 + number % every, len(changes) + 1, every):
            if fault is Fault.TORN and changes[at - 1].what != "write":
                continue
            runs += 1
            met.add(at)
            try:
                judged_run(disk, scenario, scratch, at, fault)
            except AssertionError as error:
                wrong.append(f"{scenario.name}, {fault.name} at {at} ({changes[at - 1]}): {error}")
    return Matrix(scenario=scenario.name, changes=changes, points=len(met), runs=runs, wrong=wrong)


def judged_run(disk: FaultyDisk, scenario: Scenario, scratch: Path, at: int, fault: Fault) -> Run:
    """Run a scenario with one fault, then without; `AssertionError` says what is not as it must be."""
    state = scratch / "state"
    shutil.rmtree(state, ignore_errors=True)
    command = scenario.prepare(state)
    run = disk.run(state, *command, at=at, fault=fault, meanwhile=command)
    version = verified(state / "slots")
    if run.meanwhile is not None:
        _check_the_other(run, run.meanwhile, scenario)
    assert "Traceback" not in run.output, run.output
    assert version in (scenario.old, scenario.new), f"{version} is current"
    if fault in _ENDS:
        assert run.code < 0, f"went on: {run.code} {run.output}"
    elif run.code == scenario.expected_code:
        assert version == scenario.new, f"said {run.output!r}, but {version} is current"
    else:
        assert run.code in (1, 2), f"exit code {run.code}: {run.output}"
        assert fault is not Fault.NONE, run.output
        assert version == scenario.old or "unchanged" not in run.output, f"{version} is current, but: {run.output}"
    known = current(disk, state)
    assert known.version in (version, version or scenario.new), f"`slots` calls {known} current"
    if run.code == scenario.expected_code:
        assert known.good, f"the command succeeded, and its slot is {known}"
    if scenario.toggles and version == scenario.new:
        return run
    again = disk.run(state, *command)
    assert again.code == scenario.expected_code, f"the second try: {again.code} {again.output}"
    assert verified(state / "slots") == scenario.new, f"after the second try: {again.output}"
    assert current(disk, state) == Current(scenario.new, True), f"after the second try: {current(disk, state)}"
    left = [path.name for path in (state / "slots").iterdir() if path.name.endswith(".part")]
    assert not left, f"left behind: {left}"
    return run


def _check_the_other(hung: Run, other: Run, scenario: Scenario) -> None:
    """Whoever comes while a program hangs is told so at once, or does the work that the other has not begun."""
    begun = any(change.path in _LOCKS for change in hung.changes[:-1])
    if begun:
        assert other.code in (1, 2) and re.search("another (installation is running|update runs)", other.output), other
    else:
        assert other.code == scenario.expected_code, other.output


def current(disk: FaultyDisk, state: Path) -> Current:
    """What `eyas-device slots` calls current."""
    run = disk.run(state, "slots", "--state", state, "--json")
    assert run.code == 0, run.output
    slots = [json.loads(line) for line in run.output.splitlines()]
    found = (Current(slot["version"], slot["good"], slot["problem"]) for slot in slots if slot["current"])
    return next(found, Current(None))


def kinds(changes: Iterable[Change]) -> str:
    """How many changes there are of each kind, the most frequent first."""
    names = [change.what for change in changes]
    return ", ".join(f"{names.count(name)} {name}" for name in sorted(set(names), key=lambda n: -names.count(n)))
