"""Frames that a camera's agent loses while updates over the air change its model, the probation's shadow included."""

from __future__ import annotations

import itertools
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import msgspec

from common import Figure
from eyas_device.updates.records import read_agent
from eyas_device.updates.release import Bounds
from eyas_device.updates.slots import Slots
from tests.support.fleet_parts import wait_until
from tests.support.publishing import rewrite
from tests.support.repositories import make_repository, served
from tests.support.tiny_bundle import write_tiny_bundle

_FPS = 10
_CHANGE_S = 2.0
_WATCHED_S = 4.0
"""Time before the first update and after each one."""
_BOUNDS = Bounds(frames=20, seconds=10.0, min_frames=5, max_latency_factor=100.0, shadow_every=2)


class _Line(msgspec.Struct):
    """What an agent's line of JSON says of its frame."""

    source: str
    time: float

    @property
    def number(self) -> int:
        """Number of the frame in the camera, those without a prediction counted, too."""
        return int(self.source.split("#")[1])


def frames_lost(scratch: Path, swaps: int = 3) -> dict[str, Figure]:
    """Count the frames without a prediction in a run of a real agent with `swaps` signed updates."""
    repository = make_repository(scratch / "fleet")
    state, config, lines = scratch / "state", scratch / "device.toml", scratch / "lines.json"
    first = rewrite(write_tiny_bundle(scratch / "1.0.0"), "1.0.0")
    Slots(state).install(first)
    (scratch / "root.json").write_bytes(repository.root())
    with served(repository.folder) as (url, _):
        config.write_text(
            f'[device]\nname = "cam-1"\nstate = "{state}"\n[model]\nruntime = "litert"\n'
            f'[camera]\nsource = "fake:?live=1&fps={_FPS}&frames=1000000&size=64x48"\n'
            f'[update]\nurl = "{url}"\nroot = "{scratch}/root.json"\n'
        )
        command = [sys.executable, "-m", "eyas_device"]
        with lines.open("wb") as out, (scratch / "agent.log").open("wb") as log:
            agent = subprocess.Popen([*command, "run", "--config", config, "--json"], stdout=out, stderr=log)
        changes: list[float] = []
        try:
            wait_until(lambda: lines.stat().st_size, 120, "a first prediction")
            time.sleep(_WATCHED_S)
            for number in range(1, swaps + 1):
                version = f"1.{number}.0"
                bundle = rewrite(Path(shutil.copytree(first, scratch / version)), version)
                repository.publish(bundle, channel="stable", probation=_BOUNDS)
                subprocess.run([*command, "update", "--config", config], check=True, capture_output=True)
                wait_until(lambda version=version: _runs(state, version), 60, f"{version} runs")  # type: ignore[misc]
                changes.append(_loaded(state))
                time.sleep(_WATCHED_S)
        finally:
            agent.send_signal(signal.SIGTERM)
            agent.wait(60)
    seen = [msgspec.json.decode(line, type=_Line) for line in lines.read_text().splitlines() if line.startswith("{")]
    beside, elsewhere = 0, 0
    for before, after in itertools.pairwise(seen):
        missing = after.number - before.number - 1
        if any(before.time < change + _CHANGE_S and after.time > change for change in changes):
            beside += missing
        else:
            elsewhere += missing
    return {
        "frames_lost_a_swap": Figure(
            value=beside / swaps,
            unit="",
            bound=2,
            better="lower",
            spread=f"{beside} in {swaps} swaps, {elsewhere} elsewhere in the run of {seen[-1].number + 1} frames",
            note=f"without a prediction within {_CHANGE_S:g} s from the load of the new model, at {_FPS} frames/s; "
            "signed updates with a probation; other processes that use the machine cost frames, too",
        )
    }


def _loaded(state: Path) -> float:
    """When the agent began to load its model, seconds since 1970."""
    agent = read_agent(state)
    assert agent is not None
    return time.time() - (time.monotonic() - agent.loaded)


def _runs(state: Path, version: str) -> bool:
    agent, slots = read_agent(state), Slots(state)
    verdict = slots.verdict(agent.slot) if agent is not None and agent.slot else None
    return agent is not None and agent.model.endswith(version) and verdict is not None and verdict.state == "passed"
