"""`eyas-device doctor`: whether this device is fit to run a camera, and if not, what to do."""

from __future__ import annotations

import argparse
import os
import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from eyas_device.commands import values
from eyas_device.errors import EXIT_CHECK_FAILED, ConfigError

if TYPE_CHECKING:
    from eyas_device.doctor import Context, Row

HELP = "examine this device: system, libraries, model, camera, broker, service"

_COLOURS = {"green": "32", "yellow": "33", "red": "31", "grey": "90"}


def arguments(parser: argparse.ArgumentParser) -> None:
    """The verb's command line."""
    parser.add_argument("--config", type=Path, metavar="FILE", help="default: /etc/eyas/device.toml, if there is one")
    parser.add_argument("--bundle", metavar="B", help="examine this bundle instead of the current slot's")
    parser.add_argument("--camera", metavar="SPEC", help="examine this camera, e.g. v4l2:0")
    parser.add_argument("--mqtt", type=values.broker, metavar="HOST[:PORT]", help="examine this broker")
    parser.add_argument("--mqtt-user", metavar="NAME", default="", help="connect to the broker as this user")
    parser.add_argument("--mqtt-password-file", type=Path, metavar="FILE", help="its first line is the password")
    parser.add_argument("--json", action="store_true", help="one JSON object with all findings")


def main(given: argparse.Namespace) -> int:
    """Print a line a check, and the fix below what is not green; code 1 if one of them is red."""
    import msgspec

    from eyas_device import __version__
    from eyas_device.doctor import CHECKS, examine, title

    context = _context(given)
    rows: list[Row] = []
    width = max(len(title(check)) for check in CHECKS)
    for row in examine(context):
        rows.append(row)
        if not given.json:
            _show(row, width)
    counts: Counter[str] = Counter(row.status for row in rows)
    if given.json:
        worst = next((status for status in ("red", "yellow") if counts[status]), "green")
        print(msgspec.json.encode({"agent": __version__, "worst": worst, "findings": rows}).decode())
    else:
        kinds = {"green": "green", "yellow": "yellow", "red": "red", "grey": "not checked"}
        print(", ".join(f"{counts[status]} {word}" for status, word in kinds.items()))
    return EXIT_CHECK_FAILED if counts["red"] else 0


def _context(given: argparse.Namespace) -> Context:
    """What the configuration says, with the command line over it; a faulty file is a finding, not an error."""
    from msgspec.structs import replace

    from eyas_device.config import CONFIG, Config, read_config
    from eyas_device.doctor import Context
    from eyas_device.telemetry.tls import Security

    path = given.config or (CONFIG if CONFIG.exists() else None)
    config, fault = Config(), ""
    if path is not None:
        try:
            config = read_config(path)
        except ConfigError as error:
            fault = str(error)
    if given.bundle:
        config = replace(config, model=replace(config.model, bundle=given.bundle))
    if given.camera:
        config = replace(config, camera=replace(config.camera, source=given.camera))
    if given.mqtt:
        config = replace(config, telemetry=replace(config.telemetry, broker=":".join(map(str, given.mqtt))))
    return Context(
        config=config,
        config_path=path,
        config_fault=fault,
        username=given.mqtt_user,
        password=Security(password_file=str(given.mqtt_password_file or "")).password() or "",
    )


def _show(row: Row, width: int) -> None:
    word = f"{row.status:6}"
    if sys.stdout.isatty() and "NO_COLOR" not in os.environ:
        word = f"\x1b[{_COLOURS[row.status]}m{word}\x1b[0m"
    print(f"{word}  {row.check:{width}}  {row.finding}")
    if row.fix:
        print(f"{'':6}  {'':{width}}  -> {row.fix}")
    sys.stdout.flush()
