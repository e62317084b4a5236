"""`eyas-device slots`: show the two slots, or switch back to the other one."""

from __future__ import annotations

import argparse
from pathlib import Path

HELP = "show the two slots for models, or switch back to the other one"
STATE_HELP = "the state folder (default: what /etc/eyas/device.toml says, else /var/lib/eyas)"


def arguments(parser: argparse.ArgumentParser) -> None:
    """The verb's command line."""
    parser.add_argument("--state", type=Path, metavar="DIR", help=STATE_HELP)
    parser.add_argument("--roll-back", action="store_true", help="make the other slot the current one, if it is good")
    parser.add_argument("--json", action="store_true", help="one JSON object a slot")


def main(given: argparse.Namespace) -> int:
    """Print one line a slot. A roll-back that is not possible ends with code 2 and changes nothing."""
    import msgspec

    from eyas_device.updates.slots import Slots

    slots = Slots(state_folder(given.state))
    if given.roll_back:
        slots.roll_back()
    for state in slots.states():
        if given.json:
            print(msgspec.json.encode(state).decode())
            continue
        mark = "*" if state.current else " "
        model = f"{state.name} {state.version}".strip() or "-"
        print(f"{mark} {state.slot}  {model:24} {'good' if state.good else f'not good: {state.fault}'}")
    return 0


def state_folder(given: Path | None) -> Path:
    """The state folder that was asked for, else the one of the device's configuration. Raises `ConfigError`."""
    if given is not None:
        return given
    from eyas_device.config import CONFIG, DeviceSection, read_config

    return Path((read_config(CONFIG).device if CONFIG.exists() else DeviceSection()).state)
