"""`eyas retrain`: the next version, from the one that serves and new labelled images."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from eyas_device.errors import EXIT_CHECK_FAILED
from eyas_device.support.logs import show as print_line
from eyas_host.cli.models import REGISTRY, RegistryOption
from eyas_host.cli.options import RUNS, STORE, RunsOption, StoreOption
from eyas_host.cli.samples import PeopleOption

if TYPE_CHECKING:
    from eyas_host.fleet.retrain.due import Demands
    from eyas_host.retrain.state import Retraining, Terms
    from eyas_host.versions.record import VersionRecord
    from eyas_host.versions.registry import Registry

EXIT_APPROVAL = 77
"""`EX_NOPERM` of sysexits.h: a retraining is due, and nobody has approved it."""
_DAY_S = 86_400.0


def retrain(
    images: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="[IMAGES]...",
            help="New labelled images: class folders, or a table path,label (.csv).",
            show_default=False,
        ),
    ] = None,
    due: Annotated[
        bool, typer.Option("--due", help="Look whether drift calls for it, and take the store's labelled samples.")
    ] = False,
    approve: Annotated[
        str, typer.Option("--approve", metavar="WHO", help="Of --due: begin what is due; WHO approves it.")
    ] = "",
    automatic: Annotated[
        bool, typer.Option("--automatic", help="Of --due: begin what is due; nobody has to approve it.")
    ] = False,
    min_labels: Annotated[
        int,
        typer.Option("--min-labels", min=1, metavar="N", help="Of --due: new labelled images of each class, at least."),
    ] = 20,
    more_labels: Annotated[
        int,
        typer.Option(
            "--more-labels", min=1, metavar="N", help="Of --due: so many further ones end the wait after one kept out."
        ),
    ] = 100,
    per_device: Annotated[
        int, typer.Option("--per-device", min=1, metavar="N", help="Of --due: new images of one device, at most.")
    ] = 100,
    people: PeopleOption = 1,
    start: Annotated[
        str,
        typer.Option(
            "--from", metavar="VERSION", help="Version to go on from.  [default: the champion]", show_default=False
        ),
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
    level: Annotated[
        float,
        typer.Option(
            "--level",
            min=0.001,
            max=0.5,
            metavar="P",
            help="How often chance alone may call an equal version better, or worse; 0.5 takes the bare figures.",
        ),
    ] = 0.05,
    strict: Annotated[bool, typer.Option("--strict", help="Keep out what is not shown to be better.")] = False,
    new_class: Annotated[
        bool, typer.Option("--new-class", help="Allow labels that the version does not know.")
    ] = False,
    promote: Annotated[
        bool,
        typer.Option("--promote", help="Make it the champion at once if it is shown to be better, not the challenger."),
    ] = False,
    cooldown: Annotated[
        float, typer.Option("--cooldown", min=0, metavar="DAYS", help="Days since the last version, at least.")
    ] = 1.0,
    runs: RunsOption = RUNS,
    registry: RegistryOption = REGISTRY,
    store: StoreOption = STORE,
) -> None:
    """Train the next version on old and new images, and keep it out if it is worse."""
    from eyas_host.cli.models import open_registry
    from eyas_host.retrain.state import Terms
    from eyas_host.versions.record import RegistryError

    terms = Terms(epochs=epochs, level=level, max_loss=max_loss, strict=strict, promote=promote, new_class=new_class)
    if due == bool(images):
        raise RegistryError(
            "retrain: name new images, or --due to take the store's labelled samples if drift calls for it"
        )
    opened = open_registry(registry)
    if not due:
        if approve or automatic:
            raise RegistryError("retrain: --approve and --automatic are for --due")
        _print_end(_by_hand(opened, images or [], start, version, terms, cooldown, runs))
        return
    if promote or version:
        raise RegistryError("retrain: --due goes on from the champion to a challenger: no --version or --promote")
    if approve and automatic:
        raise RegistryError("retrain: --approve WHO, or --automatic")
    if approve and not (approve.strip() and approve.isprintable()):
        raise RegistryError(f"retrain: --approve {approve!r}: who approves it, by name?")
    parent = opened.find(start)
    if opened.aliases().get(parent.model, {}).get("champion") != parent.version:
        raise RegistryError(
            f"retrain: --due goes on from the champion, and {parent.name} is none; --from MODEL names it"
        )
    from eyas_host.fleet.retrain.due import Demands

    demands = Demands(
        min_labels=min_labels,
        more_labels=more_labels,
        per_device=per_device,
        people=people,
        cooldown_s=cooldown * _DAY_S,
        new_class=new_class,
    )
    _due(opened, parent, store, runs, terms, demands, approve, automatic=automatic)


def _by_hand(
    registry: Registry, images: list[Path], start: str, version: str, terms: Terms, cooldown: float, runs: Path
) -> Retraining:
    from eyas_host.recipe.data import Source
    from eyas_host.retrain.run import retrain as run
    from eyas_host.retrain.state import next_version, only_one, read_state
    from eyas_host.versions.record import RegistryError

    parent = registry.find(start)
    newest = registry.versions(parent.model)[-1]
    chosen = version or next_version(newest.version)
    for path in images:
        if not path.exists():
            raise RegistryError(f"{path}: there are no images")
    days = (time.time() - newest.added) / _DAY_S
    if abs(days) < cooldown and read_state(runs / f"{parent.model}-{chosen}") is None:
        raise RegistryError(
            f"{newest.name} was added {days:.1f} days ago, and {cooldown:g} have to pass: it may not have shown yet "
            "what it is worth; --cooldown 0 does not wait"
        )
    sources = [Source(path=str(path.resolve()), source="csv" if path.is_file() else "folder") for path in images]
    with only_one(registry, parent.model):
        return run(registry, parent, sources, terms, runs=runs, version=chosen, now=time.time, say=print_line)


def _due(
    registry: Registry,
    parent: VersionRecord,
    store: str,
    runs: Path,
    terms: Terms,
    demands: Demands,
    approve: str,
    *,
    automatic: bool,
) -> None:
    from eyas_host.fleet.retrain.begin import begin
    from eyas_host.fleet.retrain.due import look
    from eyas_host.fleet.store.database import Store
    from eyas_host.retrain.state import AUTOMATIC, AlreadyRunning, only_one

    try:
        with only_one(registry, parent.model):
            with Store(store, create=False) as opened:
                found = look(opened, registry, parent, runs, demands, now=time.time())
            for line in found.lines:
                print_line(line)
            if found.plan is None:
                return
            if not (found.plan.goes_on or approve or automatic):
                print_line("  eyas retrain --due --approve WHO begins it; --automatic needs nobody's approval")
                raise typer.Exit(EXIT_APPROVAL)
            approval = approve or AUTOMATIC
            ended = begin(
                registry, parent, found.plan, terms, runs=runs, approved_by=approval, now=time.time, say=print_line
            )
    except AlreadyRunning as error:
        print_line(str(error))
        return
    _print_end(ended)


def _print_end(ended: Retraining) -> None:
    if ended.stage == "kept out":
        raise typer.Exit(EXIT_CHECK_FAILED)
    print_line(f"{ended.version}: {ended.alias}; eyas models diff {ended.parent} {ended.version} shows what changed")
    if ended.judged is not None and ended.judged.outcome != "better":
        print_line('  not shown to be better: a rollout whose plan says `then = "proven"` shows it on live frames')
    if ended.alias != "champion":
        print_line(f"  eyas models alias champion {ended.version} lets it serve")
