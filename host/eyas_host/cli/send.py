"""`eyas send`: a command to devices, with the answer of each."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from eyas_device.errors import EXIT_CHECK_FAILED, LinkError
from eyas_device.support.logs import clean, show
from eyas_device.support.streams import to_json
from eyas_host.cli.options import (
    BrokerOption,
    CaOption,
    CertificateOption,
    InsecureOption,
    KeyOption,
    KitOption,
    PasswordFile,
    TlsOption,
    UserOption,
    broker_access,
)

if TYPE_CHECKING:
    from eyas_host.fleet.commands.send import Outcome, Request

_COLOURS = {"executed": "32", "refused": "31", "offline": "33", "no answer": "33"}


def send(
    words: Annotated[
        list[str],
        typer.Argument(
            metavar="[DEVICE]... COMMAND",
            help="Devices, then pause, resume, set-thresholds, snapshot, bench or doctor.",
            show_default=False,
        ),
    ],
    everything: Annotated[bool, typer.Option("--all", help="All devices instead of named ones.")] = False,
    site: Annotated[
        str | None, typer.Option(metavar="SITE", help="All devices of this site; with names: those at this site.")
    ] = None,
    minutes: Annotated[
        float | None, typer.Option(help="Duration of pause (60) or set-thresholds (1440).", show_default=False)
    ] = None,
    seconds: Annotated[float | None, typer.Option(help="The same in seconds.")] = None,
    threshold: Annotated[
        float | None, typer.Option(help="Of set-thresholds: predictions below it are uncertain, 0 to 1.")
    ] = None,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Of snapshot: folder for the images.")] = Path(),
    timeout: Annotated[
        float | None,
        typer.Option(
            min=1,
            max=3600,
            metavar="SECONDS",
            help="Wait so long for answers; no device starts the command later.  "
            "[default: 15; snapshot 30, bench 180, doctor 240]",
        ),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one line of JSON for each device.")] = False,
    broker: BrokerOption = None,
    tls: TlsOption = False,
    ca: CaOption = None,
    certificate: CertificateOption = None,
    key: KeyOption = None,
    kit: KitOption = None,
    user: UserOption = "",
    password_file: PasswordFile = None,
    insecure: InsecureOption = False,
) -> None:
    """Send a command to devices and print the answer of each."""
    from eyas_host.fleet.commands.send import check
    from eyas_host.fleet.commands.send import send as run

    given = {"threshold": threshold, "minutes": minutes, "seconds": seconds}
    request = _request(words, everything=everything, site=site, arguments=given, timeout=timeout)
    check(request)
    access = broker_access(
        broker,
        kit,
        tls=tls,
        ca=ca,
        certificate=certificate,
        key=key,
        user=user,
        password_file=password_file,
        insecure=insecure,
    )
    executed = True
    for outcome in run(access, request, lambda text: show(f"eyas send: {text}", sys.stderr)):
        executed &= _print(outcome, out, json=json)
    if not executed:
        raise typer.Exit(EXIT_CHECK_FAILED)


def _request(
    words: list[str],
    *,
    everything: bool,
    site: str | None,
    arguments: Mapping[str, float | None],
    timeout: float | None,
) -> Request:
    """Read the words of the command line; the last one is the command. Raises `LinkError`."""
    from eyas_device.telemetry.arguments import TAKES
    from eyas_host.fleet.commands.send import Request

    *devices, command = words
    if command not in TAKES and (misplaced := next((word for word in devices if word in TAKES), None)):
        raise LinkError(f"the command comes last: eyas send {command} {misplaced}")
    if everything and devices:
        raise LinkError(f"either --all or names of devices, not both: {', '.join(devices)}")
    if command in TAKES and not (everything or devices or site is not None):
        raise LinkError(f"{command}: name a device, or give --all or --site SITE")
    present = {name: value for name, value in arguments.items() if value is not None}
    return Request(command=command, arguments=present, devices=tuple(devices), site=site, timeout_s=timeout)


def _print(outcome: Outcome, folder: Path, *, json: bool) -> bool:
    """Print what became of a command to one device, save its image; return whether all of it worked."""
    from eyas_device.commands.doctor import print_result
    from eyas_host.fleet.commands import images
    from eyas_host.fleet.commands.show import findings, summary

    path, text, worked = None, summary(outcome), outcome.state == "executed"
    if outcome.event is not None:
        try:
            path = images.save(outcome, folder)
            text = f"{text}; {images.describe(outcome.event, path)}"
        except images.ImageNotSaved as error:
            worked, text = False, f"{text}; {error}"
    if json:
        print(to_json(_as_json(outcome, text, path), sys.stdout), flush=True)
        return worked
    colour = _COLOURS[outcome.state] if sys.stdout.isatty() else ""
    state = f"\x1b[{colour}m{outcome.state}\x1b[0m" if colour else outcome.state
    print(clean(f"{outcome.site}/{outcome.device}"), end=f"  {state}")
    show(f": {text}" if text else "")
    rows = list(findings(outcome))
    for row in rows:
        print_result(row, max(len(row.check) for row in rows))
    return worked


def _as_json(outcome: Outcome, text: str, path: Path | None) -> dict[str, Any]:

    event = outcome.event
    snapshot = (
        {
            "label": event.label,
            "confidence": event.confidence,
            "image": str(path or ""),
            "image_policy": event.image_policy,
        }
        if event is not None
        else None
    )
    return {
        "site": outcome.site,
        "device": outcome.device,
        "command": outcome.command,
        "state": outcome.state,
        "detail": clean(outcome.detail) if outcome.state != "executed" else text,
        "seconds": outcome.seconds,
        "data": outcome.data,
        **({"snapshot": snapshot} if snapshot is not None else {}),
    }
