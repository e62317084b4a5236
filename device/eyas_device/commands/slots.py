"""`eyas-device slots`: show the two slots, or roll back to the other one."""

from __future__ import annotations

import argparse
from pathlib import Path

HELP = "show the two slots for bundles, or roll back to the other one"
STATE_HELP = "the state folder (default: device.state of /etc/eyas/device.toml, else /var/lib/eyas)"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's arguments to its parser."""
    parser.add_argument("--state", type=Path, metavar="DIR", help=STATE_HELP)
    parser.add_argument("--roll-back", action="store_true", help="switch to the other slot, if it is good")
    parser.add_argument("--json", action="store_true", help="one JSON object per slot")


def main(args: argparse.Namespace) -> int:
    """Print one line per slot. A roll-back that is not possible changes nothing and exits with 2."""
    import msgspec

    from eyas_device.updates.slots import Slots

    slots = Slots(state_folder(args.state))
    if args.roll_back:
        slots.roll_back()
    for state in slots.states():
        if args.json:
            print(msgspec.json.encode(state).decode())
            continue
        mark = "*" if state.current else " "
        model = f"{state.name} {state.version}".strip() or "-"
        print(f"{mark} {state.slot}  {model:24} {'good' if state.good else f'not good: {state.problem}'}")
    return 0


def state_folder(state: Path | None) -> Path:
    """`state` if it is given, else the folder in the device's configuration. Raises `ConfigError`."""
    if state is not None:
        return state
    from eyas_device.config import CONFIG, DeviceSection, read_config

    return Path((read_config(CONFIG).device if CONFIG.exists() else DeviceSection()).state)
