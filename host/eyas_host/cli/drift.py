"""`eyas drift`: which devices no longer report what they reported on stable days."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import msgspec
import typer

from eyas_device.support.logs import clean, show
from eyas_device.support.streams import to_json
from eyas_host.cli.options import STORE, StoreOption

if TYPE_CHECKING:
    from eyas_host.fleet.drift.monitor import Monitor, Turn
    from eyas_host.fleet.drift.report import DeviceDrift


def drift(
    device: Annotated[
        list[str] | None, typer.Argument(metavar="[DEVICE]...", help="Only these devices.", show_default=False)
    ] = None,
    store: StoreOption = STORE,
    site: Annotated[str, typer.Option(metavar="SITE", help="Only devices of this site.")] = "",
    everything: Annotated[bool, typer.Option("--all", help="List devices without an alarm, too.")] = False,
    accept: Annotated[
        list[str] | None,
        typer.Option(
            "--accept",
            metavar="DEVICE",
            help="Take what this device reports from now on as usual; it learns again. Repeatable.",
        ),
    ] = None,
    bundle: Annotated[
        list[Path] | None,
        typer.Option(
            "--bundle", metavar="DIR", help="Remember what this bundle recorded of its validation images. Repeatable."
        ),
    ] = None,
    labels: Annotated[
        Path | None,
        typer.Option(
            "--labels", metavar="FILE", help="Also the accuracy on labelled samples: device,spool,sequence,label (CSV)."
        ),
    ] = None,
    labelled: Annotated[
        bool, typer.Option("--labelled", help="Also the accuracy on what people labelled by `eyas samples`.")
    ] = False,
    min_confidence: Annotated[
        float,
        typer.Option("--min-confidence", min=0, max=1, metavar="P", help="Name devices below it.  [default: none]"),
    ] = 0.0,
    profile_days: Annotated[
        float,
        typer.Option("--profile-days", min=1, metavar="DAYS", help="Days that a device's profile is learned from."),
    ] = 4.0,
    calibration_days: Annotated[
        float,
        typer.Option("--calibration-days", min=1, metavar="DAYS", help="Days after these that show what chance does."),
    ] = 3.0,
    check: Annotated[
        bool, typer.Option("--check", help="Exit with 1 if an alarm is confirmed, e.g. for cron.")
    ] = False,
    page: Annotated[
        Path | None,
        typer.Option(
            "--page",
            metavar="FILE",
            help="Also write all that as a page (HTML): the fleet at a glance, and a plot for each alarm.",
        ),
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option("--plot", metavar="FILE", help="Also draw the one device that is given (SVG)."),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one line of JSON for each device.")] = False,
) -> None:
    """Show which devices drift, since when, how sure that is, why, and what to do."""
    from eyas_host.fleet.drift.bundles import remember
    from eyas_host.fleet.drift.errors import DriftError
    from eyas_host.fleet.drift.fleet_state import Tuning
    from eyas_host.fleet.drift.labelled import accuracies, read_labels
    from eyas_host.fleet.drift.labelled import describe as describe_accuracy
    from eyas_host.fleet.drift.monitor import Monitor
    from eyas_host.fleet.drift.page import write_page, write_plot
    from eyas_host.fleet.drift.report import devices
    from eyas_host.fleet.samples.records import samples
    from eyas_host.fleet.samples.rules import labels_of
    from eyas_host.fleet.store.database import Store

    if plot is not None and len(device or ()) != 1:
        raise DriftError("--plot: one device is needed: eyas drift DEVICE --plot FILE")
    tuning = Tuning(profile_days=profile_days, calibration_days=calibration_days)
    with Store(store, create=False) as opened:
        for folder in bundle or ():
            show(remember(opened, folder))
        monitor = Monitor(opened, tuning)
        monitor.catch_up(_progress)
        _known(monitor, [*(device or ()), *(accept or ())], site)
        for name in accept or ():
            monitor.forget(name)
            show(f"{name}: what it reports from now on is usual; it learns again")
        rows = devices(monitor, site=site, names=device or (), min_confidence=min_confidence)
        measured = accuracies(opened, read_labels(labels)) if labels else []
        measured += accuracies(opened, labels_of(samples(opened))) if labelled else []
        if page is not None:
            write_page(opened, monitor, page, time.time(), site=site)
        if plot is not None and device:
            write_plot(opened, monitor, device[0], plot, time.time())
    if json:
        for found in measured:
            print(to_json(msgspec.to_builtins(found), sys.stdout))
        for one in rows:
            print(to_json(msgspec.to_builtins(one), sys.stdout))
    else:
        _print(rows, everything=everything or bool(device))
        for found in measured:
            print("\n".join(describe_accuracy(found)))
    if check and any(one.state == "confirmed" for one in rows):
        raise typer.Exit(1)


def _known(monitor: Monitor, names: list[str], site: str) -> None:
    """Raise an error that names what there is, for a device or site that is not followed."""
    from eyas_host.fleet.drift.errors import DriftError

    if not monitor.digests:
        return
    for what, name, there in (
        *(("device", name, set(monitor.digests)) for name in names),
        *([("site", site, set(monitor.sites.values()))] if site else []),
    ):
        if name not in there:
            some = ", ".join(sorted(there)[:8]) + (", …" if len(there) > 8 else "")
            raise DriftError(f"{name}: no such {what} among those whose windows are in the store; there are: {some}")


def _print(rows: list[DeviceDrift], *, everything: bool) -> None:
    from rich.console import Console
    from rich.table import Table

    from eyas_host.fleet.drift.report import describe, more_of, summary, table

    if not rows:
        print("no devices; they appear when a collector has stored their windows")
        return
    shown = [one for one in rows if everything or one.alarm]
    if shown:
        headings, cells = table(shown)
        grid = Table(box=None, pad_edge=False)
        for heading in headings:
            grid.add_column(heading, overflow="fold")
        for row in cells:
            grid.add_row(*row)
        Console(highlight=False, markup=False).print(grid)
        print()
    for one in rows:
        if one.alarm:
            print("\n".join([*describe(one.alarm), *more_of(one)]), end="\n\n")
        elif everything and (lines := more_of(one)):
            print("\n".join([clean(one.device, 64), *lines]), end="\n\n")
    print(summary(rows))


def _progress(turn: Turn) -> None:
    if turn.more and sys.stderr.isatty():
        show(f"{turn.windows} windows read, {turn.steps} steps of {turn.devices} devices", sys.stderr)
