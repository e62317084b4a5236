"""`eyas-device doctor`: check whether this device can run a camera, and how to fix what is wrong."""

from __future__ import annotations

import argparse
import os
import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from eyas_device.commands import values
from eyas_device.commands.broker import add_broker_arguments, broker_values, identity_values
from eyas_device.errors import EXIT_CHECK_FAILED, ConfigError

if TYPE_CHECKING:
    from eyas_device.doctor import CheckResult, Context

HELP = "check this device: system, libraries, model, camera, broker, service"

_COLOURS = {"green": "32", "yellow": "33", "red": "31", "grey": "90"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's arguments to its parser."""
    parser.add_argument(
        "--config", type=values.path, metavar="FILE", help="default: /etc/eyas/device.toml, if it exists"
    )
    parser.add_argument("--bundle", metavar="B", help="check this bundle instead of the current slot's")
    parser.add_argument("--camera", metavar="SPEC", help="check this camera, e.g. v4l2:0")
    add_broker_arguments(parser, purpose="check this broker")
    parser.add_argument("--json", action="store_true", help="one JSON object with all findings")


def main(args: argparse.Namespace) -> int:
    """Print one line per check, with the fix below if it is not green; exit code 1 if one is red."""
    from eyas_device import __version__
    from eyas_device.doctor import CHECKS, check_name, examine, running_check
    from eyas_device.support.streams import to_json

    context = _context(args)
    results: list[CheckResult] = []
    width = max(len(check_name(check)) for check in CHECKS)
    with running_check(sys.stderr) as running:
        for result in examine(context, on_start=running):
            running("")
            results.append(result)
            if not args.json:
                print_result(result, width)
    counts: Counter[str] = Counter(result.status for result in results)
    if args.json:
        worst = next((status for status in ("red", "yellow") if counts[status]), "green")
        print(to_json({"agent": __version__, "worst": worst, "findings": results}, sys.stdout))
    else:
        labels = {"green": "green", "yellow": "yellow", "red": "red", "grey": "not checked"}
        print(", ".join(f"{counts[status]} {label}" for status, label in labels.items()))
    return EXIT_CHECK_FAILED if counts["red"] else 0


def _context(args: argparse.Namespace) -> Context:
    """Configuration with command-line overrides; an invalid file becomes a finding, not an error."""
    from msgspec.structs import replace

    from eyas_device.config import CONFIG, Config, read_config, with_home
    from eyas_device.doctor import Context
    from eyas_device.doctor.service_user import become_service_user
    from eyas_device.telemetry.tls import Security

    path = args.config or (CONFIG if CONFIG.exists() else None)
    config, problem = Config(), ""
    if path is not None:
        try:
            config = read_config(path)
        except ConfigError as error:
            problem = str(error)
    if args.bundle:
        config = replace(config, model=replace(config.model, bundle=args.bundle))
    if args.camera:
        config = replace(config, camera=replace(config.camera, source=args.camera))
    given = {key: value for key, value in broker_values(args).items() if value is not None}
    identity = {key: value for key, value in identity_values(args).items() if value is not None}
    config = replace(config, device=replace(config.device, **identity), telemetry=replace(config.telemetry, **given))
    config = with_home(config)
    if args.password_file:
        # An unreadable one is an error of the command.
        Security(password_file=config.telemetry.password_file).password()
    judge = become_service_user([Path(args.bundle)] if args.bundle else [])
    return Context(config=config, config_path=path, config_error=problem, judge=judge)


def print_result(result: CheckResult, width: int) -> None:
    """Print a result in two lines at most, in colour on a terminal; `width` is that of the longest name."""
    from eyas_device.support.logs import show

    status = f"{result.status:6}"
    if sys.stdout.isatty() and "NO_COLOR" not in os.environ:
        status = f"\x1b[{_COLOURS[result.status]}m{status}\x1b[0m"
    print(f"{status}  ", end="")
    show(f"{result.check:{width}}  {result.finding}")
    if result.fix:
        show(f"{'':6}  {'':{width}}  -> {result.fix}")
