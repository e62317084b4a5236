"""What an update over the air finds and does: the scenarios that meet faults."""

from __future__ import annotations

from pathlib import Path

from eyas_device.updates.slots import Slots
from tests.support.fault_matrix import PROGRAMS, Scenario
from tests.support.install_scenarios import NEW, OLD, OLDER, with_version
from tests.support.repositories import make_repository
from tests.support.tiny_bundle import write_tiny_bundle

UPDATE_PROGRAMS = (*PROGRAMS, "eyas_device.commands.update", "eyas_device.updates.machine", "tuf.ngclient")
"""What a process with faults imports once."""


def update_scenarios(folder: Path) -> list[Scenario]:
    """Scenarios of `eyas-device update` from a repository in a folder; all lies in the new folder `folder`."""
    tiny_bundle = write_tiny_bundle(folder / "tiny")
    older, old, new = (with_version(tiny_bundle, folder / v, v) for v in (OLDER, OLD, NEW))
    (new / "CARD.md").write_text("# A card of its own\n")
    repository = make_repository(folder / "fleet")
    repository.publish(new, channel="stable")
    (folder / "root.json").write_bytes(repository.root())
    one, two = folder / "state-one", folder / "state-two"
    for state, bundles in ((one, (old,)), (two, (older, old))):
        for bundle in bundles:
            Slots(state).install(bundle)
    config = folder / "device.toml"
    config.write_text(
        '[device]\nname = "cam-1"\n[model]\nruntime = "litert"\n'
        f'[update]\nurl = "{repository.folder}"\nroot = "{folder}/root.json"\n'
    )
    command = ("update", "--config", str(config), "--state", "{state}")
    return [
        Scenario(name="first update", state=one, command=command, old=OLD, new=NEW),
        Scenario(name="update, both slots full", state=two, command=command, old=OLD, new=NEW),
    ]
