"""`eyas-device install`: copy a bundle into the inactive slot, check it there, and switch to it."""

from __future__ import annotations

import argparse
from pathlib import Path

from eyas_device.commands.slots import STATE_HELP, device_config

HELP = "install a bundle: verify, golden check, atomic switch"
CONFIG_HELP = "the device's configuration, whose [model] settings the check uses (default: /etc/eyas/device.toml)"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's arguments to its parser."""
    parser.add_argument("bundle", type=Path, metavar="BUNDLE")
    parser.add_argument("--config", type=Path, metavar="FILE", help=CONFIG_HELP)
    parser.add_argument("--state", type=Path, metavar="DIR", help=STATE_HELP)
    parser.add_argument("--json", action="store_true", help="the slot as one JSON object")


def main(args: argparse.Namespace) -> int:
    """Print the slot; exit code 1 if the golden check fails, 2 if the bundle cannot be installed."""
    import msgspec

    from eyas_device.runtimes import use_engine_cache
    from eyas_device.updates.judge import prove
    from eyas_device.updates.slots import Slots

    config = device_config(args.config)
    slots = Slots(args.state or Path(config.device.state))
    use_engine_cache(slots.state)
    before = slots.current()
    good = ""

    def check(root: Path) -> None:
        nonlocal good
        good = prove(root, config.model, slots.state)

    installed = slots.install(args.bundle, check=check)
    state = next(state for state in slots.states() if state.path == str(installed))
    changed = installed != before
    if args.json:
        print(msgspec.json.encode({**msgspec.to_builtins(state), "changed": changed, "checked": good}).decode())
    else:
        change = "is now current" if changed else "was already current"
        print(f"{state.name} {state.version} {change}: slot {state.slot}, {state.path}")
        print(f"good here: {good}")
    return 0
