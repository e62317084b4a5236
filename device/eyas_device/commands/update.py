"""`eyas-device update`: install what the signed repository wants of this device.

Looks at the repository of [update] url once, downloads what is missing, checks the model in the inactive slot (golden
images, latency), switches to it, and asks the running agent to load it. The agent keeps the earlier model beside it
for a while, compares the two on real frames, and goes back by itself if the new one is worse: `--status` says how far
it is.

`--watch` does so from time to time; the service eyas-device-update runs it where [update] url is set. `--from` takes
the repository in a folder, for example on a USB stick: it needs no network, and the same signatures.

The agent itself is a release, too (`eyas-agent`): this collects its wheels, and `--agent`, as root and started by the
unit eyas-device-agent-update, verifies them once more, builds an environment beside the one in use, proves it, switches
and goes back if the service does not stay up.

Nothing is installed that is not signed for this device. With `install` and `flash`, over ssh, whoever may log in there
vouches for a bundle; here, only the keys below the root that was pinned at enrolment do.

exit codes: 0 up to date, installed, on probation or waiting; 1 refused, failed or rolled back, or the repository cannot
            be trusted or reached; 2 nothing to update from, or another update runs
"""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from eyas_device.commands import values
from eyas_device.commands.slots import STATE_HELP, device_config
from eyas_device.errors import EXIT_CHECK_FAILED

if TYPE_CHECKING:
    from collections.abc import Iterator

    from eyas_device.config import Config
    from eyas_device.updates.plan import Plan
    from eyas_device.updates.progress import UpdateRecord

HELP = "install what the signed repository wants of this device"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's arguments to its parser."""
    parser.add_argument(
        "--config", type=values.path, metavar="FILE", help="the device's configuration (default: /etc/eyas/device.toml)"
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--check", action="store_true", help="only say what would be done")
    what.add_argument("--watch", action="store_true", help="look again and again, every [update] poll_s on average")
    what.add_argument("--agent", action="store_true", help="as root: exchange the agent by what was collected")
    what.add_argument("--status", action="store_true", help="only say how far the last update is")
    parser.add_argument("--state", type=values.path, metavar="DIR", help=STATE_HELP)
    parser.add_argument(
        "--from",
        dest="folder",
        type=values.path,
        metavar="FOLDER",
        help="the repository in this folder: a USB stick",
    )
    parser.add_argument(
        "--now", action="store_true", help="also outside of maintenance hours, and what was refused here before"
    )
    parser.add_argument("--json", action="store_true", help="the outcome as one JSON object")


def main(args: argparse.Namespace) -> int:
    """Print the outcome; exit code 1 if it is none that was wanted."""
    from pathlib import Path

    import msgspec

    from eyas_device.config import STATE
    from eyas_device.support import logs
    from eyas_device.updates.progress import read_progress
    from eyas_device.updates.usb import find_repository

    config = device_config(args.config)
    state = args.state or Path(config.device.state)
    config = msgspec.structs.replace(config, device=msgspec.structs.replace(config.device, state=str(state)))
    if args.status:
        return _show_status(read_progress(state), args)
    if args.watch:
        return _watch(config, args)
    if args.agent:
        return _update_agent(config, args)
    logs.set_up(logs.choose_level(None, config.device.log_level))
    from eyas_device.runtimes import use_engine_cache
    from eyas_device.updates.agent_offer import ROOT_UNIT
    from eyas_device.updates.machine import Updater

    use_engine_cache(state)
    url = find_repository(args.folder) if args.folder is not None else ""
    steps = _Steps(quiet=args.json)
    updater = Updater(config, url=url, now=args.now, on_state=steps.on_state, progress=steps.on_bytes)
    if args.check:
        return _show_plan(updater.preview(), args)
    record = updater.run_once()
    first = state == Path(STATE)  # of several cameras, which share the agent: root's unit looks there
    if first and ROOT_UNIT.exists() and record.state != "probation":  # one at a time
        _offer_agent(config, url, steps)
    return _show(record, args)


def _offer_agent(config: Config, url: str, steps: _Steps) -> None:
    """Collect a release of the agent for root's unit; trouble with it is no trouble of the model."""
    from eyas_device.support.logs import print_error, show
    from eyas_device.updates.agent_offer import offer_agent
    from eyas_device.updates.release import UpdateError

    try:
        offered = offer_agent(config, url=url, progress=steps.on_bytes)
    except UpdateError as error:
        print_error(f"eyas-device: the agent's release: {error}")
        return
    if offered:
        show(f"{offered} was collected: eyas-device-agent-update installs it", sys.stderr)


def _update_agent(config: Config, args: argparse.Namespace) -> int:
    import os

    from eyas_device.config import CONFIG
    from eyas_device.errors import EyasError
    from eyas_device.updates.agent_release import AgentUpdater

    if args.folder is not None or args.now:
        raise EyasError("--agent takes what was collected: it goes with neither --from nor --now")
    if os.geteuid() != 0:
        raise EyasError("--agent exchanges the environment in /opt/eyas: root is needed")
    return _show(AgentUpdater(config, args.config or CONFIG).run_once(), args)


def _watch(config: Config, args: argparse.Namespace) -> int:
    from pathlib import Path

    from eyas_device.errors import EyasError
    from eyas_device.support.logs import show
    from eyas_device.updates.watch import Watch

    if args.folder is not None or args.now or args.json:
        raise EyasError("--watch follows [update] url: it goes with none of --from, --now and --json")
    if not config.update.url:
        show("[update] url is empty: there is nothing to watch")
        return 0
    chosen = ["--config", str(args.config)] if args.config is not None else []
    Watch(
        [sys.executable, "-m", "eyas_device", "update", *chosen], Path(config.device.state), config.update.poll_s
    ).run()
    return 0


class _Steps:
    """Shows the states that begin, and on a terminal how much has arrived."""

    def __init__(self, *, quiet: bool) -> None:
        self._quiet = quiet
        self._shown = ""
        self._live = not quiet and sys.stderr.isatty()

    def on_state(self, record: UpdateRecord) -> None:
        from eyas_device.support.logs import show

        if not self._quiet and record.state in ("downloading", "installing") and record.state != self._shown:
            show(f"{record.state} {record.model}")
        self._shown = record.state

    def on_bytes(self, done: int, total: int) -> None:
        if self._live:
            sys.stderr.write(f"\r{done / 1e6:8.1f} of {total / 1e6:.1f} MB" + ("\n" if done == total else ""))


def _show_plan(plan: Plan, args: argparse.Namespace) -> int:
    from eyas_device.support.logs import show
    from eyas_device.support.streams import to_json
    from eyas_device.updates.plan import Install, Refuse, Switch

    if isinstance(plan, Install):
        size = sum(file.size_bytes for file in plan.variant.files) / 1e6
        what, text = "install", f"{plan.release.model} {plan.release.version}, at most {size:.1f} MB"
    elif isinstance(plan, Switch):
        what, text = "switch", f"to slot {plan.held.slot}: {plan.reason}"
    else:
        what, text = "refuse" if isinstance(plan, Refuse) else "keep", plan.reason
    if args.json:
        print(to_json({"plan": what, "detail": text}, sys.stdout))
    else:
        show(f"would {what}: {text}")
    return EXIT_CHECK_FAILED if isinstance(plan, Refuse) else 0


def _show(record: UpdateRecord, args: argparse.Namespace) -> int:
    from eyas_device.support.logs import show
    from eyas_device.support.streams import to_json

    if args.json:
        print(to_json(record, sys.stdout))
    else:
        for name, text in _rows(record):
            show(f"{name:12}{text}")
    wrong = record.trouble or record.state in ("refused", "failed", "rolled back")
    return EXIT_CHECK_FAILED if wrong else 0


def _show_status(record: UpdateRecord, args: argparse.Namespace) -> int:
    from eyas_device.support.logs import show
    from eyas_device.updates.progress import ROOT_STATE, read_progress, record_path

    code = _show(record, args)
    if record_path(ROOT_STATE).is_file() and not args.json:
        for name, text in _rows(read_progress(ROOT_STATE)):
            show(f"{'agent' if name == 'update' else name:12}{text}")
    return code


def _rows(record: UpdateRecord) -> Iterator[tuple[str, str]]:
    import time

    about = f"{record.model} ({record.digest})" if record.digest else record.model or "no release"
    yield "update", f"{about}: {record.state}" + (f", rollout {record.rollout}" if record.rollout else "")
    if record.reason:
        yield "", record.reason
    if record.trouble and record.trouble != record.reason:
        yield "repository", record.trouble
    if record.checked:
        yield "checked", time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(record.checked))
    if record.clock:
        yield "clock", record.clock
