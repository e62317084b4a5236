"""`eyas-device`: the device's command line, a table of verbs."""

from __future__ import annotations

import argparse
import importlib
import os
import re
import sys
from collections.abc import Sequence
from typing import NoReturn

from eyas_device import __version__
from eyas_device.errors import EXIT_CHECK_FAILED, EXIT_INTERRUPTED, EXIT_OUTPUT, EXIT_USER_ERROR, EyasError
from eyas_device.support.interrupts import describe, exit_code, interruptible
from eyas_device.support.streams import open_streams, output_of
from eyas_device.support.trouble import describe_trouble

VERBS = {
    "run": "eyas_device.commands.run",
    "check": "eyas_device.commands.check",
    "info": "eyas_device.commands.info",
    "bench": "eyas_device.commands.bench",
    "doctor": "eyas_device.commands.doctor",
    "snapshot": "eyas_device.commands.snapshot",
    "install": "eyas_device.commands.install",
    "update": "eyas_device.commands.update",
    "slots": "eyas_device.commands.slots",
    "reload": "eyas_device.commands.reload",
    "status": "eyas_device.commands.status",
    "service": "eyas_device.commands.service",
}
"""Verb -> the module that describes and runs it, in the order of `--help`."""

RENAMED_OPTIONS = {
    "--mqtt": "--broker",
    "--cert": "--certificate",
    "--mqtt-user": "--user",
    "--mqtt-password-file": "--password-file",
    "--device-id": "--name",
    "--give-up": "--give-up-s",
    "--window": "--window-s",
}
"""Options of earlier versions -> their present names, which are those of the configuration's keys."""

_EXAMPLES = """examples:
  eyas-device check runs/solar-cells/bundle
  eyas-device run --bundle runs/solar-cells/bundle --camera folder:images --accuracy
  eyas-device run --bundle b --camera video:line.mp4 --fps 5 --broker broker.local --site hall-2
  eyas-device run --bundle b --camera fake: --json | jq .label
  eyas-device bench --bundle runs/solar-cells/bundle --all
  eyas-device doctor --config /etc/eyas/device.toml

exit codes: 0 success, 1 a check failed, 2 an error in the command or the bundle,
            3 the camera was lost and did not recover, 74 the output could not be written,
            78 an error in the configuration file, 130 Ctrl-C
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a verb and return the exit code; an error made by the user is one message on standard error and code 2.

    Standard streams that are closed or fail never end a verb; if standard output did not take everything, the exit code
    is 74 instead of 0. A reader that closes the pipe ends the verb quietly, and so does a signal, once its children are
    ended.
    """
    with open_streams():
        try:
            with interruptible():
                code = _run(argv)
                sys.stdout.flush()
        except BrokenPipeError:
            return 0
        except KeyboardInterrupt as error:
            return _interrupted(error)
        output = output_of(sys.stdout)
        if output is None or output.first_error is None:
            return code
        if not output.reported:
            print(f"eyas-device: standard output: {output.first_error.strerror}", file=sys.stderr)
        return code or EXIT_OUTPUT


def _interrupted(error: KeyboardInterrupt) -> int:
    """End by the signal itself where that is what systemd and shells look at; Ctrl-C is a line and 130."""
    print(f"eyas-device: {describe(error)}", file=sys.stderr)
    if exit_code(error) != EXIT_INTERRUPTED:
        sys.stdout.flush()
        os.kill(os.getpid(), exit_code(error) - 128)
    return exit_code(error)


def _run(argv: Sequence[str] | None) -> int:
    try:
        args, unknown = _parser().parse_known_args(argv)
        if unknown:
            args.parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    except SystemExit as ended:  # --help, --version, wrong arguments
        return ended.code if isinstance(ended.code, int) else 0
    from eyas_device.support import logs  # not for `--help`
    from eyas_device.support.opencv import silence_opencv

    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # else NumPy starts one for each core of the machine
    silence_opencv()
    logs.set_up("warning")
    try:
        code: int = args.main(args)
    except EyasError as error:
        logs.print_error(f"eyas-device: {error}")
        return error.exit_code
    except BrokenPipeError:
        raise
    except Exception as error:
        if (trouble := describe_trouble(error)) is not None:
            logs.print_error(f"eyas-device: {trouble}")
        else:  # a defect: its traceback is redacted like every other message
            logs.log_defect()
        return EXIT_CHECK_FAILED
    finally:
        logs.close()
    return code


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, with the verb or option that was probably meant."""

    def error(self, message: str) -> NoReturn:
        from difflib import get_close_matches

        from eyas_device.support.logs import clean

        known = [*VERBS, *self._option_string_actions]
        words = re.findall(r"(?<=choice: ')[^']+|--[\w-]+", message)
        renamed = [f"{word} is now {RENAMED_OPTIONS[word]}" for word in words if word in RENAMED_OPTIONS]
        close = [match for word in words if word not in known for match in get_close_matches(word, known, n=1)]
        hint = f"; did you mean {' '.join(close)}?" if close else ""
        hint = f"; {', '.join(renamed)}" if renamed else hint
        text = clean(f"{self.prog}: {' '.join(message.split())}{hint} (see {self.prog} --help)")
        self.exit(EXIT_USER_ERROR, f"{text}\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
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
            name,
            help=verb.HELP,
            description=verb.__doc__,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        verb.add_arguments(subparser)
        subparser.set_defaults(main=verb.main, parser=subparser)
    return parser
