"""`eyas-device slots`: show the two slots, or roll back to the other one."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from eyas_device.commands import values

if TYPE_CHECKING:
    from eyas_device.config import Config
    from eyas_device.updates.slots import SlotState

HELP = "show the two slots for bundles, or roll back to the other one"
STATE_HELP = "the state folder (default: device.state of the configuration, else /var/lib/eyas)"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's arguments to its parser."""
    parser.add_argument("--state", type=values.path, metavar="DIR", help=STATE_HELP)
    parser.add_argument("--config", type=values.path, metavar="FILE", help="the device's configuration")
    parser.add_argument("--roll-back", action="store_true", help="switch to the other slot, if it is good")
    parser.add_argument("--json", action="store_true", help="one JSON object per slot")


def main(args: argparse.Namespace) -> int:
    """Print one line per slot, and what the agent runs. A roll-back that is not possible changes nothing: exit code 2.

    `*` marks the current slot. A slot that the agent or an installation refused shows why.
    """
    from eyas_device.support.logs import show
    from eyas_device.support.streams import to_json
    from eyas_device.updates.records import read_agent
    from eyas_device.updates.slots import Slots

    slots = Slots(state_folder(args.state, args.config))
    if args.roll_back:
        slots.roll_back()
    for state in slots.states():
        if args.json:
            print(to_json(state, sys.stdout))
        else:
            show(_line(state))
    agent = read_agent(slots.state)
    if agent is not None and not args.json:
        show(f"the agent runs {agent.model or 'no model'}" + (f" from {agent.bundle}" if agent.bundle else ""))
        if agent.refused_reason:
            show(f"  it refused {agent.refused_model or 'every model'}: {agent.refused_reason}")
    return 0


def _line(state: SlotState) -> str:
    mark = "*" if state.current else " "
    model = f"{state.name} {state.version}".strip() or "-"
    condition = "good" if state.good else f"not good: {state.problem}"
    condition += ", running" if state.running else ""
    condition += ", on probation" if state.probation == "running" else ""
    if state.refused and not state.name:
        condition += f"; refused {state.refused}"
    return f"{mark} {state.slot}  {model:24} {condition}"


def device_config(path: Path | None) -> Config:
    """The configuration at `path`, else the service's, else the defaults. Raises `ConfigError`."""
    from eyas_device.config import CONFIG, Config, read_config

    if path is not None:
        return read_config(path)
    return read_config(CONFIG) if CONFIG.exists() else Config()


def state_folder(state: Path | None, config: Path | None = None) -> Path:
    """`state` if it is given, else the folder in the device's configuration, as for `device_config`."""
    return state if state is not None else Path(device_config(config).device.state)
