"""The verbs of `eyas` that reach devices. Nothing heavy is imported until one of them runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

_ROOT = typer.Option(metavar="DIR", help="Everything lies below this folder there; but for / without a service.")
_PYTHON = typer.Option(metavar="PATH", help="An interpreter there that has eyas already: no environment is made.")
_PORT = typer.Option(min=1, max=65535, help="For devices that name none.")
_IDENTITY = typer.Option(metavar="FILE", help="Private key to use.")
_OPTION = typer.Option(metavar="KEY=VALUE", help="Given to ssh with -o; may be given again.")


def flash(
    devices: Annotated[list[str], typer.Argument(metavar="USER@HOST[:PORT]...", help="One or several devices.")],
    bundle: Annotated[Path, typer.Option(metavar="DIR", help="The bundle, e.g. runs/solar-cells/bundle.")],
    config: Annotated[Optional[Path], typer.Option(metavar="FILE", help="Replaces the device's device.toml.")] = None,  # noqa: UP045
    wheel_dir: Annotated[Optional[Path], typer.Option(metavar="DIR", help="Wheels to install from.")] = None,  # noqa: UP045
    offline: Annotated[
        bool, typer.Option("--offline", help="The device has no network: fetch its wheels here.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be done; change nothing.")] = False,
    python: Annotated[Optional[str], _PYTHON] = None,  # noqa: UP045
    root: Annotated[str, _ROOT] = "/",
    identity: Annotated[Optional[Path], _IDENTITY] = None,  # noqa: UP045
    port: Annotated[Optional[int], _PORT] = None,  # noqa: UP045
    ssh_option: Annotated[Optional[list[str]], _OPTION] = None,  # noqa: UP045
) -> None:
    """Bring a bundle and what runs it to devices: check, install, switch, watch, and go back if it does not stay up."""
    from eyas_host.fleet.connect.ssh import Access
    from eyas_host.fleet.deploy.flash import flash as run

    outcomes = run(
        devices,
        bundle,
        config=config,
        wheel_dir=wheel_dir,
        offline=offline,
        dry_run=dry_run,
        python=python,
        root=root,
        access=Access(identity=identity, port=port, options=tuple(ssh_option or ())),
    )
    for outcome in outcomes:
        sent = f", {outcome.sent_bytes / 1e3:.0f} kB sent" if outcome.sent_bytes else ""
        typer.echo(f"{outcome.target}: {outcome.status}: {outcome.words} ({outcome.seconds:.1f} s{sent})")
    if not all(outcome.ok for outcome in outcomes):
        raise typer.Exit(1)


def bench(
    device: Annotated[str, typer.Argument(metavar="USER@HOST[:PORT]")],
    bundle: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(metavar="DIR", help="The bundle; what is in the device's slot by default."),
    ] = None,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where BOARD.json goes.")] = Path("benchmarks/results"),
    seconds: Annotated[int, typer.Option(min=1, max=3600, help="How long to measure.")] = 20,
    python: Annotated[Optional[str], _PYTHON] = None,  # noqa: UP045
    root: Annotated[str, _ROOT] = "/",
    identity: Annotated[Optional[Path], _IDENTITY] = None,  # noqa: UP045
    port: Annotated[Optional[int], _PORT] = None,  # noqa: UP045
    ssh_option: Annotated[Optional[list[str]], _OPTION] = None,  # noqa: UP045
) -> None:
    """Measure a bundle on a device and bring the figures here."""
    from eyas_host.fleet.connect.ssh import Access
    from eyas_host.fleet.deploy.bench import bench as run

    access = Access(identity=identity, port=port, options=tuple(ssh_option or ()))
    typer.echo(run(device, bundle, out, seconds=seconds, root=root, python=python, access=access))
