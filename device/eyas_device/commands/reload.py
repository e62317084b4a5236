"""`eyas-device reload`: let the running agent load the current slot's model, and wait for what became of it."""

from __future__ import annotations

import argparse

from eyas_device.commands import values
from eyas_device.commands.slots import STATE_HELP, state_folder
from eyas_device.errors import EXIT_CHECK_FAILED

HELP = "let the running agent load the current model; exit code 1 if it refuses it"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's arguments to its parser."""
    parser.add_argument("--config", type=values.path, metavar="FILE", help="the device's configuration")
    parser.add_argument("--state", type=values.path, metavar="DIR", help=STATE_HELP)
    parser.add_argument(
        "--timeout", type=values.positive_number, default=300.0, metavar="SECONDS", help="longest wait (default 300)"
    )


def main(args: argparse.Namespace) -> int:
    """Print what runs now; exit code 1 if that is not what should run, 2 without an agent or an outcome in time."""
    from eyas_device.errors import EyasError
    from eyas_device.support.logs import show
    from eyas_device.updates.reload import request_reload

    state = state_folder(args.state, args.config)
    agent = request_reload(state, args.timeout)
    if agent is None:
        raise EyasError(f"{state}: no agent runs with this state folder; start it: systemctl start eyas-device")
    active = f"{agent.model}: {agent.artefact} on {agent.runtime} ({agent.selection})"
    show(active if agent.model else "no model runs")
    if agent.problem:
        show(f"nothing changed: {agent.problem}")
    elif agent.refused_reason:
        show(f"{agent.refused_model or 'every model'} was refused: {agent.refused_reason}")
    return EXIT_CHECK_FAILED if agent.problem or agent.refused_reason else 0
