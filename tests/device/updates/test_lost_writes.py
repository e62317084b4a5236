"""A power cut at a flush of an installation's disk, with any part of the writes behind it lost.

The disk is a real ext4 file system, recorded block by block; needs root. `benchmarks/updates.py` cuts at every flush.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from tests.support.block_log import Write, states_after_cuts
from tests.support.fault_matrix import PROGRAMS, Scenario
from tests.support.faults import FaultyDisk
from tests.support.install_scenarios import install_scenarios
from tests.support.power_loss import lose_writes


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FaultyDisk]:
    with FaultyDisk(tmp_path_factory.mktemp("faults"), *PROGRAMS) as started:
        yield started


@pytest.fixture(scope="module")
def scenarios(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Scenario]:
    folder = tmp_path_factory.mktemp("scenarios")
    return {scenario.name: scenario for scenario in install_scenarios(folder)}


@pytest.mark.parametrize("options", ["", "data=writeback,noauto_da_alloc"])
def test_a_power_cut_leaves_a_verified_bundle(
    options: str, disk: FaultyDisk, scenarios: dict[str, Scenario], tmp_path: Path
) -> None:
    scenario = scenarios["install, both slots full"]
    losses = lose_writes(disk, scenario, tmp_path / "loss", subsets=2, every=10, again_every=8, options=options)
    assert losses.flushes > 30 and losses.cuts > 12 and losses.second_tries > 0
    assert losses.wrong == []


def test_what_finds_nothing_wrong_can_find_something(
    disk: FaultyDisk, scenarios: dict[str, Scenario], tmp_path: Path
) -> None:
    scenario = scenarios["second install"]
    careless = msgspec.structs.replace(scenario, command=(scenario.command[1], "{state}"))
    losses = lose_writes(disk, careless, tmp_path / "over", subsets=1, every=6, module="tests.support.careless")
    assert any("slot a: marked" in wrong for wrong in losses.wrong)
    losses = lose_writes(disk, scenario, tmp_path / "unsynced", subsets=1, every=3, synced=False)
    assert any("the command had ended; 1.0.0 is current" in wrong for wrong in losses.wrong)


def test_the_writes_before_a_flush_are_kept_and_each_part_of_the_others_may_be() -> None:
    first, second, third = Write(0, b"a" * 4096), Write(4096, b"b" * 12288), Write(0, b"c" * 4096)
    cuts = list(states_after_cuts([[first], [second, third], []], subsets=200, seed=random.randrange(100)))
    later = [tuple(cut.writes[1:]) for cut in cuts if cut.flushes == 1]
    assert all(cut.writes[0] == first for cut in cuts if cut.flushes >= 1)
    assert {(), (second,), (third,), (second, third)} <= set(later)
    assert {len(writes[0].data) for writes in later if writes and writes[0].offset} == {0, 4096, 8192, 12288}
    assert [cut.writes for cut in cuts if cut.flushes == 2] == [[first, second, third]]
