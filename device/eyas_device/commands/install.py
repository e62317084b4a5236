"""`eyas-device install`: put a bundle into the inactive slot, prove it there, and switch to it."""

from __future__ import annotations

import argparse
from pathlib import Path

from eyas_device.commands.slots import STATE_HELP, state_folder

HELP = "install a bundle: verify, golden check, atomic switch"


def arguments(parser: argparse.ArgumentParser) -> None:
    """The verb's command line."""
    parser.add_argument("bundle", type=Path, metavar="BUNDLE")
    parser.add_argument("--state", type=Path, metavar="DIR", help=STATE_HELP)
    parser.add_argument("--json", action="store_true", help="the slot as one JSON object")


def main(given: argparse.Namespace) -> int:
    """Print the slot; code 1 if the bundle does not answer here as on the workstation, 2 if it cannot be installed."""
    import msgspec

    from eyas_device.updates.slots import Slots

    slots = Slots(state_folder(given.state))
    before = slots.current()
    installed = slots.install(given.bundle)
    state = next(state for state in slots.states() if state.path == str(installed))
    changed = installed != before
    if given.json:
        print(msgspec.json.encode({**msgspec.to_builtins(state), "changed": changed}).decode())
    else:
        word = "is current now" if changed else "was current already"
        print(f"{state.name} {state.version} {word}: slot {state.slot}, {state.path}")
    return 0
