"""Cut the power of a recorded disk at every flush of an installation, with any part of the later writes lost."""

from __future__ import annotations

from pathlib import Path

import msgspec

from tests.support.block_log import RecordedDisk, make_image, mounted, states_after_cuts, write_image
from tests.support.fault_matrix import Scenario
from tests.support.faults import Fault, FaultyDisk, verified


class Losses(msgspec.Struct, frozen=True, kw_only=True):
    """What the power cuts of one scenario have shown."""

    scenario: str
    flushes: int
    cuts: int
    second_tries: int
    """Cuts after which the command was given again."""
    wrong: list[str]
    """Each cut after which something was not as it must be."""


def lose_writes(
    disk: FaultyDisk,
    scenario: Scenario,
    scratch: Path,
    *,
    subsets: int = 5,
    every: int = 1,
    again_every: int = 10,
    options: str = "",
    module: str = "eyas_device.cli",
    synced: bool = True,
) -> Losses:
    """Record a scenario on a disk of its own, cut the power at each flush, and judge what is found.

    Args:
        disk: Runs the command.
        scenario: What is done, and what may be current afterwards.
        scratch: A new folder.
        subsets: Random parts of the writes behind each flush.
        every: Only each so-many-th flush.
        again_every: Give the command again after each so-many-th cut.
        options: Options of the mount.
        module: The program.
        synced: Whether the program syncs; without, its syncs do nothing.

    """
    scratch.mkdir(parents=True)
    folder = scratch / "disk"
    base = make_image(scratch / "base.img")
    with mounted(base, folder, options):
        state = folder / "state"
        command = scenario.prepare(state)
    recorded = RecordedDisk(base, folder, scratch / "recorder", options=options)
    try:
        run = disk.run(state, *command, module=module, fault=Fault.NONE if synced else Fault.LOST_SYNC)
        done = recorded.position()
    finally:
        epochs = recorded.close()
    assert run.code == scenario.expected_code, run.output
    wrong: list[str] = []
    cuts = second_tries = 0
    for cuts, cut in enumerate(states_after_cuts(epochs, subsets=subsets, every=every), 1):
        image = write_image(base, cut, scratch / "cut.img")
        with mounted(image, folder, options):
            try:
                version = verified(state / "slots")
                assert version in (scenario.old, scenario.new), f"{version} is current"
                assert cut.flushes < done or version == scenario.new, f"the command had ended; {version} is current"
                if cuts % again_every == 0 and not scenario.toggles:
                    second_tries += 1
                    again = disk.run(state, *command, module=module)
                    assert again.code == scenario.expected_code, f"the second try: {again.output}"
                    assert verified(state / "slots") == scenario.new, f"after the second try: {again.output}"
            except (AssertionError, OSError, ValueError) as error:
                wrong.append(f"{scenario.name}, flush {cut.flushes} of {len(epochs) - 1}, {cut.kept}: {error}")
    return Losses(scenario=scenario.name, flushes=len(epochs) - 1, cuts=cuts, second_tries=second_tries, wrong=wrong)
