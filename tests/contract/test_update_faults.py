"""An update over the air meets faults and power cuts: `eyas-device update` from a signed repository, in real processes.

Each test lets a part of the changes meet a fault; `benchmarks/updates.py` lets all of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from eyas_device.updates.progress import read_progress
from tests.support.fault_matrix import Scenario, judged_run, matrix
from tests.support.faults import Fault, FaultyDisk, verified
from tests.support.install_scenarios import NEW, OLD
from tests.support.power_loss import lose_writes
from tests.support.update_scenarios import UPDATE_PROGRAMS, update_scenarios


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FaultyDisk]:
    with FaultyDisk(tmp_path_factory.mktemp("faults"), *UPDATE_PROGRAMS) as started:
        yield started


@pytest.fixture(scope="module")
def scenario(tmp_path_factory: pytest.TempPathFactory) -> Scenario:
    return update_scenarios(tmp_path_factory.mktemp("scenarios"))[-1]


def test_a_fault_leaves_a_verified_bundle_and_the_second_try_succeeds(
    disk: FaultyDisk, scenario: Scenario, tmp_path: Path
) -> None:
    result = matrix(disk, scenario, tmp_path, every=70)
    assert len(result.changes) > 120 and result.runs > 12
    assert result.wrong == []


def test_a_power_cut_leaves_a_verified_bundle(disk: FaultyDisk, scenario: Scenario, tmp_path: Path) -> None:
    losses = lose_writes(disk, scenario, tmp_path / "loss", subsets=1, every=16, again_every=6)
    assert losses.flushes > 80 and losses.cuts > 12 and losses.second_tries > 0
    assert losses.wrong == []


def test_a_disk_that_never_takes_the_record_does_not_block_an_update_that_is_on_the_disk(
    disk: FaultyDisk, scenario: Scenario, tmp_path: Path
) -> None:
    changes = judged_run(disk, scenario, tmp_path, 0, Fault.NONE).changes
    switch = next(n for n, change in enumerate(changes, 1) if str(change) == "rename slots/current")
    run = judged_run(disk, scenario, tmp_path, switch + 2, Fault.DEAD)
    assert "Input/output error" in run.output
    state = tmp_path / "state"
    assert verified(state / "slots") == NEW != OLD
    assert read_progress(state).state == "probation", "the second look finds what was installed"
