"""Verbs that reach devices over SSH: `flash` and `bench`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from eyas_device.support.logs import show
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
    wheel_dir: Annotated[Path | None, typer.Option(metavar="DIR", help="Folder of wheels to install from.")] = None,
    offline: Annotated[
        bool, typer.Option("--offline", help="The device has no network: download its wheels here and send them.")
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
        python=python,
        root=root,
    )
    access = ssh_access(identity, port, ssh_option)
    with resumable("devices keep the bundle that they run; the same command finishes what was begun"):
        results = run(devices, bundle, settings, access=access)
    for result in results:
        sent = f", {(result.sent_bytes - result.dependency_bytes) / 1e3:.0f} kB sent" if result.sent_bytes else ""
        sent += f" beside {result.dependency_bytes / 1e6:.0f} MB of wheels" if result.dependency_bytes else ""
        show(f"{result.target}: {result.status}: {result.detail} ({result.seconds:.1f} s{sent})")
        for warning in result.warnings:
            show(f"{result.target}: warning: {warning}")
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
