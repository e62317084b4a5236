"""`eyas-device install`: copy a bundle into the inactive slot, check it there, and switch to it."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from eyas_device.commands import values
from eyas_device.commands.slots import STATE_HELP, device_config

if TYPE_CHECKING:
    from eyas_device.updates.slots import SlotState

HELP = "install a bundle: verify, golden check, atomic switch"
CONFIG_HELP = "the device's configuration, whose [model] settings the check uses (default: /etc/eyas/device.toml)"

_DIGEST = 12
"""Hex digits of a digest that are shown."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's arguments to its parser."""
    parser.add_argument("bundle", type=values.path, metavar="BUNDLE")
    parser.add_argument("--config", type=values.path, metavar="FILE", help=CONFIG_HELP)
    parser.add_argument("--state", type=values.path, metavar="DIR", help=STATE_HELP)
    parser.add_argument("--json", action="store_true", help="the slot as one JSON object")


def main(args: argparse.Namespace) -> int:
    """Print the slot; exit code 1 if the golden check fails, 2 if the bundle cannot be installed."""
    import msgspec

    from eyas_device.runtimes import use_engine_cache
    from eyas_device.support.logs import show
    from eyas_device.support.streams import to_json
    from eyas_device.updates.judge import Proof, prove
    from eyas_device.updates.slots import Slots

    config = device_config(args.config)
    slots = Slots(args.state or Path(config.device.state))
    use_engine_cache(slots.state)
    before, states = slots.current(), slots.states()
    proof = Proof("", "")

    def check(root: Path) -> None:
        nonlocal proof
        proof = prove(root, config.model, slots.state)

    installed = slots.install(args.bundle, check=check)
    state = next(state for state in slots.states() if state.path == str(installed))
    changed = installed != before
    notices = [notice for notice in (_same_version(state, states), proof.notice) if notice]
    if args.json:
        extra = {"changed": changed, "checked": proof.good, "notices": notices}
        print(to_json({**msgspec.to_builtins(state), **extra}, sys.stdout))
        return 0
    change = "is now current" if changed else "was already current"
    show(f"{state.name} {state.version} {change}: slot {state.slot}, {state.path}")
    show(f"good here: {proof.good}")
    for notice in notices:
        show(f"notice: {notice}")
    return 0


def _same_version(installed: SlotState, before: list[SlotState]) -> str:
    """Which bundle of the same name and version but other contents was in a slot before; empty if none."""
    model = (installed.name, installed.version)
    for state in before:
        if (state.name, state.version) == model and state.identity != installed.identity:
            old, new = state.identity[:_DIGEST], installed.identity[:_DIGEST]
            return (
                f"slot {state.slot} had another {state.name} {state.version}: digest {old}, now {new}; "
                "give each bundle its own version"
            )
    return ""
