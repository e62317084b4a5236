"""`eyas repo`: verify and renew the repository of signed releases."""

from __future__ import annotations

import sys
from collections.abc import Sized
from pathlib import Path
from typing import Annotated

import typer

from eyas_device.errors import EXIT_CHECK_FAILED
from eyas_device.support.logs import show
from eyas_device.support.streams import to_json
from eyas_host.cli.options import KeysOption, KitOption, PassphraseFile


def verify(
    folder: Annotated[
        Path | None,
        typer.Argument(metavar="[DIR]", help="A copy, e.g. on a stick.  [default: the kit's own]", show_default=False),
    ] = None,
    kit: KitOption = None,
    json: Annotated[bool, typer.Option("--json", help="Print the problems as JSON.")] = False,
) -> None:
    """Check the repository as a device would: signatures, expiry, every target and blob."""
    from eyas_host.cli.passphrases import open_repository
    from eyas_host.fleet.updates.verify import verify as run

    repository = open_repository(kit, None, None)
    problems = run(repository, folder)
    if json:
        print(to_json(problems, sys.stdout))
    else:
        for problem in problems:
            show(problem)
        releases, channels = repository.releases(), repository.channels()
        counts = (_count(releases, "release"), _count(channels, "channel"), _count(problems, "problem"))
        show(f"{folder or repository.folder}: {', '.join(counts)}")
    if problems:
        raise typer.Exit(EXIT_CHECK_FAILED)


def renew(
    kit: KitOption = None,
    everything: Annotated[bool, typer.Option("--all", help="Also sign what is not due yet, and targets.")] = False,
    keys: KeysOption = None,
    to: Annotated[
        Path | None, typer.Option("--to", metavar="DIR", help="Also copy the repository there, as `eyas publish --to`.")
    ] = None,
    passphrase_file: PassphraseFile = None,
) -> None:
    """Sign again what expires soon, so that devices know that the repository is looked after. Run it daily."""
    from eyas_host.cli.passphrases import open_repository
    from eyas_host.fleet.updates.mirror import mirror
    from eyas_host.fleet.updates.prune import prune

    repository = open_repository(kit, passphrase_file, keys)
    warnings = repository.renew(everything=everything)
    removed = prune(repository)
    metadata = repository.metadata()
    days = min(metadata.days_left(role, repository.now()) for role in ("timestamp", "snapshot"))
    gone = f", {removed} old files removed" if removed else ""
    show(f"{repository.folder}: renewed, valid for {days:.0f} days without another `eyas repo renew`{gone}")
    if to is not None:
        copied = mirror(repository, to)
        show(f"{to}: {copied.files} files copied, {copied.size_bytes / 1e3:.0f} kB")
    for warning in warnings:
        show(f"warning: {warning}", sys.stderr)


def _count(things: Sized, name: str) -> str:
    return f"{len(things) or 'no'} {name}{'' if len(things) == 1 else 's'}"
