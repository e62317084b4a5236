"""`eyas fleet`: who runs what, who is behind and why."""

from __future__ import annotations

import sys
import time
from typing import Annotated

import msgspec
import typer

from eyas_device.support.streams import to_json
from eyas_host.cli.options import STORE, StoreOption


def fleet(
    store: StoreOption = STORE,
    site: Annotated[str, typer.Option(metavar="SITE", help="Only devices of this site.")] = "",
    model: Annotated[str, typer.Option(metavar="NAME", help="Only devices that run this model.")] = "",
    behind: Annotated[bool, typer.Option("--behind", help="Only devices that are behind.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print one line of JSON for each device.")] = False,
) -> None:
    """List which device runs which version, who is behind, and why."""
    from rich.console import Console

    from eyas_host.fleet.inventory import inventory, lines, summary
    from eyas_host.fleet.store.database import Store

    with Store(store, create=False) as opened:
        devices = inventory(opened.devices(), time.time(), site=site, model=model)
    shown = [device for device in devices if device.behind or not behind]
    if json:
        for device in shown:
            print(to_json(msgspec.to_builtins(device), sys.stdout))
        return
    if not devices:
        print("no devices; they appear when a collector has stored their first message")
        return
    for line in (*lines(shown, Console().width), "", *summary(devices)):
        print(line)
