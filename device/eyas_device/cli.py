"""`eyas-device`: the device's command line, a table of verbs."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence

from eyas_device import __version__
from eyas_device.errors import EyasError
from eyas_device.support.redact import redact

VERBS = {
    "run": "eyas_device.commands.run",
    "check": "eyas_device.commands.check",
    "info": "eyas_device.commands.info",
    "bench": "eyas_device.commands.bench",
    "doctor": "eyas_device.commands.doctor",
    "snapshot": "eyas_device.commands.snapshot",
    "install": "eyas_device.commands.install",
    "slots": "eyas_device.commands.slots",
    "reload": "eyas_device.commands.reload",
}
"""Verb -> the module that describes and runs it, in the order of `--help`."""

_EXAMPLES = """examples:
  eyas-device check runs/solar-cells/bundle
  eyas-device run --bundle runs/solar-cells/bundle --camera folder:images --accuracy
  eyas-device run --bundle b --camera video:line.mp4 --fps 5 --mqtt broker.local --site hall-2
  eyas-device run --bundle b --camera fake: --json | jq .label
  eyas-device bench --bundle runs/solar-cells/bundle --all
  eyas-device doctor --config /etc/eyas/device.toml

exit codes: 0 success, 1 a check failed, 2 an error in the command or the bundle,
            3 the camera was lost and did not recover, 78 an error in the configuration file
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a verb and return the exit code; an error made by the user is one message on standard error and code 2."""
    args = _parser().parse_args(argv)
    try:
        code: int = args.main(args)
        sys.stdout.flush()
    except EyasError as error:
        print(f"eyas-device: {redact(str(error))}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the reader has closed the pipe
        return 0
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="eyas-device",
        description="Run a verified model bundle on a camera.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"eyas-device {__version__}")
    verbs = parser.add_subparsers(title="verbs", required=True, metavar="VERB")
    for name, path in VERBS.items():
        verb = importlib.import_module(path)
        subparser = verbs.add_parser(
            name, help=verb.HELP, description=verb.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        verb.add_arguments(subparser)
        subparser.set_defaults(main=verb.main)
    return parser
