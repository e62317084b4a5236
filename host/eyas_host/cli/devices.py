"""Verbs that reach devices over SSH: `flash` and `bench`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from eyas_device.support.logs import show
from eyas_device.support.streams import to_json
from eyas_host.cli.options import (
    KIT,
    IdentityOption,
    KitOption,
    PortOption,
    PythonOption,
    RootOption,
    SshOption,
    ssh_access,
)

if TYPE_CHECKING:
    from eyas_host.fleet.deploy.flash import FlashResult


def flash(
    devices: Annotated[list[str], typer.Argument(metavar="USER@HOST[:PORT]...", help="One or several devices.")],
    bundle: Annotated[Path, typer.Option(metavar="DIR", help="The bundle, e.g. runs/solar-cells/bundle.")],
    config: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Replace the device's device.toml with this file.")
    ] = None,
    name: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Bring configuration and credentials of this enrolled device from the kit."),
    ] = None,
    kit: KitOption = None,
    wheel_dir: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Folder of wheels to install from; with --offline it has all of them."),
    ] = None,
    offline: Annotated[
        bool,
        typer.Option("--offline", help="The device has no network: download its wheels here and send them."),
    ] = False,
    runtime: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="Send only what litert, openvino, onnx or tflite runs, and install that runtime; repeatable; all: the "
            "whole bundle.  [default: the configuration's, else what is installed there]",
        ),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would be done; change nothing.")] = False,
    parallel: Annotated[
        int, typer.Option(min=1, max=64, metavar="COUNT", help="Devices that are flashed at the same time.")
    ] = 8,
    json: Annotated[bool, typer.Option("--json", help="Print one line of JSON for each device.")] = False,
    python: PythonOption = None,
    root: RootOption = "/",
    identity: IdentityOption = None,
    port: PortOption = None,
    ssh_option: SshOption = None,
) -> None:
    """Install a bundle and the agent on devices: check, install, switch, watch, roll back on failure."""
    from eyas_device.support.interrupts import resumable
    from eyas_host.fleet.deploy.flash import FlashSettings
    from eyas_host.fleet.deploy.flash import flash as run

    settings = FlashSettings(
        config=config,
        name=name,
        kit=KIT if kit is None else kit,
        wheel_dir=wheel_dir,
        offline=offline,
        runtimes=tuple(runtime or ()),
        dry_run=dry_run,
        parallel=parallel,
        python=python,
        root=root,
    )
    access = ssh_access(identity, port, ssh_option)
    with resumable("devices keep the bundle that they run; the same command finishes what was begun"):
        results = run(devices, bundle, settings, access=access)
    _print_results(results, json=json)
    if not all(result.ok for result in results):
        raise typer.Exit(1)


def bench(
    device: Annotated[str, typer.Argument(metavar="USER@HOST[:PORT]")],
    bundle: Annotated[
        Path | None, typer.Option(metavar="DIR", help="The bundle.  [default: the device's current slot]")
    ] = None,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder for BOARD.json.")] = Path("benchmarks/results"),
    seconds: Annotated[int, typer.Option(min=1, max=3600, help="Duration of the measurement.")] = 20,
    python: PythonOption = None,
    root: RootOption = "/",
    identity: IdentityOption = None,
    port: PortOption = None,
    ssh_option: SshOption = None,
) -> None:
    """Benchmark a bundle on a device and fetch the result."""
    from eyas_host.fleet.deploy.bench import BenchSettings
    from eyas_host.fleet.deploy.bench import bench as run

    settings = BenchSettings(seconds=seconds, root=root, python=python)
    show(str(run(device, bundle, out, settings, access=ssh_access(identity, port, ssh_option))))


def _print_results(results: Sequence[FlashResult], *, json: bool) -> None:
    """Print what became of each device: a line for one, a table for several."""
    from rich.console import Console

    from eyas_host.fleet.deploy.results import as_json, sent, table

    if json:
        for result in results:
            print(to_json(as_json(result), sys.stdout))
        return
    warnings = [f"{result.target}: warning: {warning}" for result in results for warning in result.warnings]
    if len(results) == 1:
        [result] = results
        more = f", {sent(result)} sent" if result.sent_bytes else ""
        show(f"{result.target}: {result.status}: {result.detail} ({result.seconds:.1f} s{more})")
    for warning in warnings:
        show(warning)
    if len(results) > 1:
        for line in table(results, Console().width):
            print(line)
