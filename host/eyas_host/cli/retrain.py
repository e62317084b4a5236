"""`eyas retrain`: the next version, from the one that serves and new labelled images."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from eyas_device.errors import EXIT_CHECK_FAILED
from eyas_device.support.logs import show as print_line
from eyas_host.cli.models import REGISTRY, RegistryOption
from eyas_host.cli.options import RUNS, RunsOption

_DAY_S = 86_400.0


def retrain(
    images: Annotated[
        list[Path],
        typer.Argument(metavar="IMAGES...", help="New labelled images: class folders, or a table path,label (.csv)."),
    ],
    start: Annotated[
        str, typer.Option("--from", metavar="VERSION", help="Version to go on from.  [default: the champion]")
    ] = "champion",
    version: Annotated[
        str, typer.Option("--version", metavar="VERSION", help="The next version.  [default: the second number + 1]")
    ] = "",
    epochs: Annotated[int, typer.Option("--epochs", min=1, metavar="N", help="Of each training, at most.")] = 8,
    max_loss: Annotated[
        float,
        typer.Option(
            "--max-loss", min=0, max=1, metavar="LOSS", help="Balanced accuracy that the old test images may lose."
        ),
    ] = 0.01,
    new_class: Annotated[
        bool, typer.Option("--new-class", help="Allow labels that the version does not know.")
    ] = False,
    promote: Annotated[
        bool, typer.Option("--promote", help="Make it the champion at once if it is better, not the challenger.")
    ] = False,
    cooldown: Annotated[
        float, typer.Option("--cooldown", min=0, metavar="DAYS", help="Days since the last version, at least.")
    ] = 1.0,
    runs: RunsOption = RUNS,
    registry: RegistryOption = REGISTRY,
) -> None:
    """Train the next version on old and new images, and keep it only if it is better."""
    from eyas_host.cli.models import open_registry
    from eyas_host.recipe.data import Source
    from eyas_host.retrain.derive import next_version
    from eyas_host.retrain.run import read_state
    from eyas_host.retrain.run import retrain as run
    from eyas_host.versions.record import RegistryError

    opened = open_registry(registry)
    parent = opened.find(start)
    chosen = version or next_version(opened.versions(parent.model)[-1].version)
    for path in images:
        if not path.exists():
            raise RegistryError(f"{path}: there are no images")
    newest = opened.versions(parent.model)[-1]
    days = (time.time() - newest.added) / _DAY_S
    if days < cooldown and read_state(runs / f"{parent.model}-{chosen}") is None:
        raise RegistryError(
            f"{newest.name} was added {days:.1f} days ago, and {cooldown:g} have to pass: it may not have shown yet "
            "what it is worth; --cooldown 0 does not wait"
        )
    ended = run(
        opened,
        parent,
        [Source(path=str(path.resolve()), source="csv" if path.is_file() else "folder") for path in images],
        runs=runs,
        version=chosen,
        epochs=epochs,
        max_loss=max_loss,
        promote=promote,
        new_class=new_class,
        now=time.time,
        say=print_line,
    )
    if ended.stage == "kept out":
        raise typer.Exit(EXIT_CHECK_FAILED)
    alias = "champion" if promote else "challenger"
    print_line(f"{ended.version}: {alias}; eyas models diff {ended.parent} {ended.version} shows what changed")
    if not promote:
        print_line(f"  eyas models alias champion {ended.version} lets it serve")
