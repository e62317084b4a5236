"""`eyas models`: versions of models, what each was made from, and which one is in use."""

from __future__ import annotations

import json as json_module
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import msgspec
import typer

from eyas_device.errors import EXIT_CHECK_FAILED
from eyas_device.support.logs import show as print_line
from eyas_device.support.redact import redact
from eyas_device.support.streams import to_json
from eyas_host.cli.options import RUNS, RunsOption

if TYPE_CHECKING:
    from eyas_host.versions.compare import Comparison
    from eyas_host.versions.registry import Registry

RegistryOption = Annotated[Path, typer.Option("--registry", metavar="DIR", help="Folder of all versions.")]
REGISTRY = Path("registry")
VersionArgument = Annotated[
    str, typer.Argument(metavar="VERSION", help="MODEL@VERSION, MODEL@ALIAS, or the digest that a device reports.")
]
LicenseOption = Annotated[
    str, typer.Option("--license", metavar="ID", help="Its licence, e.g. apache-2.0.  [default: not named]")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]
_SHOWN_ROWS = 20


def add(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a finished run, e.g. runs/solar-cells.")],
    parent: Annotated[
        str | None,
        typer.Option(
            "--parent", metavar="VERSION", help="Version that it follows; empty for none.  [default: the champion]"
        ),
    ] = None,
    note: Annotated[str, typer.Option("--note", metavar="TEXT", help="Why it was made, in a sentence.")] = "",
    alias: Annotated[
        list[str] | None, typer.Option("--alias", metavar="NAME", help="Give it this alias at once; repeatable.")
    ] = None,
    registry: RegistryOption = REGISTRY,
) -> None:
    """Keep a finished run's bundle as a version, with all that it was made from."""
    from eyas_host.versions.collect import read_run
    from eyas_host.versions.registry import CHAMPION

    opened = open_registry(registry)
    record = read_run(run, now=time.time(), by=opened.by, note=note)
    follows = parent
    if follows is None:
        follows = opened.aliases().get(record.model, {}).get(CHAMPION, "")
    elif follows:
        follows = opened.find(follows if "@" in follows else f"{record.model}@{follows}").version
    record = msgspec.structs.replace(record, parent="" if follows == record.version else follows)
    new = opened.add(record, run)
    where = f"{len(record.files)} files, {record.size_bytes / 1e6:.1f} MB"
    print_line(f"{record.name}: {f'registered, {where}' if new else 'is registered already'}")
    for name in alias or ():
        _print_alias(name, record.name, opened.set_alias(name, record))
    if not record.figures:
        print_line(
            "  it has no figures on held-out images: eyas report RECIPE measures them, before a version is registered"
        )


def list_models(
    model: Annotated[str, typer.Argument(metavar="[MODEL]", help="Only this model.", show_default=False)] = "",
    registry: RegistryOption = REGISTRY,
    log: Annotated[bool, typer.Option("--log", help="What was done, when and by whom, in place of versions.")] = False,
    json: JsonOption = False,
) -> None:
    """List versions, with their figures and aliases."""
    from rich.console import Console
    from rich.table import Table

    opened = open_registry(registry)
    if log:
        events = [one for one in opened.history() if model in ("", one.model)]
        for event in events:
            words = [event.model + (f"@{event.version}" if event.version else ""), event.what, event.alias]
            before = f"before: {event.before}" if event.before else ""
            line = " ".join(word for word in (*words, before, event.note) if word)
            print_line(to_json(event, sys.stdout) if json else f"{_when(event.time)}  {event.by:10} {line}")
        return
    records, aliases = opened.versions(model), opened.aliases()
    if json:
        for record in records:
            names = [alias for alias, version in aliases.get(record.model, {}).items() if version == record.version]
            more = {"aliases": names, "pruned": opened.is_pruned(record)}
            print(to_json(msgspec.to_builtins(record) | more, sys.stdout))
        return
    if not records:
        print_line(f"{registry}: no version; eyas models add RUN registers one")
        return
    table = Table(box=None, pad_edge=False)
    for heading in ("version", "alias", "follows", "images", "balanced accuracy", "verdict", "added", "files"):
        table.add_column(heading, no_wrap=heading == "version")
    for record in records:
        names = [alias for alias, version in aliases.get(record.model, {}).items() if version == record.version]
        figures = record.figures.get(record.shipped)
        quality = "not measured"
        if figures is not None:
            low, high = figures.balanced_accuracy_ci
            quality = f"{figures.balanced_accuracy:.3f} ({low:.3f} to {high:.3f})"
        files = "removed" if opened.is_pruned(record) else f"{record.size_bytes / 1e6:.1f} MB"
        table.add_row(
            record.name,
            ", ".join(names),
            record.parent,
            str(record.data.images),
            quality,
            record.verdict,
            _when(record.added),
            files,
        )
    Console(highlight=False, width=None if sys.stdout.isatty() else 160).print(table)


def alias(
    name: Annotated[str, typer.Argument(metavar="ALIAS", help="champion, challenger, or a word of yours.")],
    version: Annotated[
        str, typer.Argument(metavar="[VERSION]", help="Version that gets it; MODEL@ with --drop.", show_default=False)
    ] = "",
    drop: Annotated[bool, typer.Option("--drop", help="Take it away.")] = False,
    registry: RegistryOption = REGISTRY,
) -> None:
    """Name the version that serves (champion), or is tried beside it (challenger); or take the name away."""
    from eyas_host.versions.record import RegistryError

    opened = open_registry(registry)
    if drop:
        models = opened.models()
        model = version.rstrip("@") or (models[0] if len(models) == 1 else "")
        print_line(f"{model}@{name}: dropped, was {opened.drop_alias(name, model)}")
        return
    if not version:
        raise RegistryError(f"{name}: of which version? eyas models alias {name} MODEL@VERSION, or --drop")
    record = opened.find(version)
    _print_alias(name, record.name, opened.set_alias(name, record))


def show(
    version: VersionArgument,
    registry: RegistryOption = REGISTRY,
    json: JsonOption = False,
) -> None:
    """Show what a version was made from, and what followed it."""
    opened = open_registry(registry)
    record = opened.find(version)
    if json:
        print(to_json(record, sys.stdout))
        return
    held = [name for name, one in opened.aliases().get(record.model, {}).items() if one == record.version]
    same = [one.name for one in opened.versions(record.model) if one.data.data == record.data.data and one != record]
    lines = {
        "version": " ".join([record.name, *(f"({name})" for name in held)]),
        "bundle": record.digest,
        "follows": f"{record.model}@{record.parent}" if record.parent else "nothing",
        "followed by": ", ".join(one.name for one in opened.children(record)) or "nothing",
        "added": f"{_when(record.added)} by {record.added_by or 'nobody known'}",
        "note": record.note or "none",
        "data": f"{record.data.images} images, revision {record.data.data[:16]}"
        + (f"; as in {', '.join(same)}" if same else ""),
        "split": f"{record.data.split[:16]}, {record.data.strategy}",
        "recipe": f"{record.recipe[:16]}, seed {record.tools.seed}",
        "made with": f"eyas {record.tools.eyas}, "
        + ", ".join(f"{name} {number}" for name, number in record.tools.libraries.items()),
        "verdict": record.verdict or "not measured",
        "files": "removed" if opened.is_pruned(record) else f"{len(record.files)}, {record.size_bytes / 1e6:.1f} MB",
    }
    for heading, text in lines.items():
        print_line(f"{heading:12} {text}")
    for variant, one in record.figures.items():
        low, high = one.balanced_accuracy_ci
        mark = "*" if variant == record.shipped else " "
        print_line(f"{mark} {variant:18} balanced accuracy {one.balanced_accuracy:.3f} ({low:.3f} to {high:.3f})")


def diff(
    first: VersionArgument,
    second: Annotated[str, typer.Argument(metavar="VERSION", help="The other one.")],
    registry: RegistryOption = REGISTRY,
    json: JsonOption = False,
) -> None:
    """Show what differs between two versions: images, recipe, tools and figures."""
    from eyas_host.versions.compare import compare

    opened = open_registry(registry)
    found = compare(opened, opened.find(first), opened.find(second))
    if json:
        print(to_json(found, sys.stdout))
        return
    _print_comparison(found)


def card(
    version: VersionArgument,
    out: Annotated[Path | None, typer.Option("--out", metavar="FILE", help="Write it there.  [default: print]")] = None,
    license_id: LicenseOption = "",
    store: Annotated[
        str | None, typer.Option("--store", metavar="URL", help="Also what the fleet reports since the release.")
    ] = None,
    registry: RegistryOption = REGISTRY,
) -> None:
    """Write a version's model card, with a head that the Hugging Face Hub reads."""
    from eyas_host.support.files import write_bytes
    from eyas_host.versions.card import version_card

    opened = open_registry(registry)
    record = opened.find(version)
    text = version_card(opened, record, license_id=license_id, drift=_drift(store, record.digest) if store else ())
    if out is None:
        print(text, end="")
    else:
        write_bytes(out, text.encode())
        print_line(f"{out}: the card of {record.name}")


def export(
    version: VersionArgument,
    to: Annotated[
        str,
        typer.Argument(
            metavar="PATH",
            help="A new folder; for cyclonedx a file; for mlflow a tracking URI, e.g. sqlite:///mlflow.db.",
        ),
    ],
    kind: Annotated[
        str,
        typer.Option(
            "--as",
            metavar="KIND",
            help="run: all its files. bundle: what devices get. hub: the bundle with the card as README, for the "
            "Hugging Face Hub. cyclonedx: a bill of materials (ML-BOM). mlflow: a run with settings, figures, files.",
        ),
    ] = "run",
    license_id: LicenseOption = "",
    experiment: Annotated[
        str, typer.Option("--experiment", metavar="NAME", help="Of mlflow.  [default: the model]", show_default=False)
    ] = "",
    register: Annotated[
        bool, typer.Option("--register", help="Of mlflow: also register the model, with the version's aliases.")
    ] = False,
    registry: RegistryOption = REGISTRY,
) -> None:
    """Write a version's files, as they were, to go on with them elsewhere."""
    from eyas_host.support.files import write_bytes
    from eyas_host.versions.bom import bill_of_materials
    from eyas_host.versions.card import version_card
    from eyas_host.versions.record import RegistryError

    if kind != "mlflow" and (experiment or register):
        raise RegistryError(f"--as {kind}: --experiment and --register are for --as mlflow")
    opened = open_registry(registry)
    record = opened.find(version)
    path = Path(to)
    if kind == "run":
        opened.check_out(record, path)
        print_line(f"{to}: the run of {record.name}; eyas flash --bundle {to}/bundle brings it to devices")
    elif kind == "bundle":
        opened.bundle(record, path)
        print_line(f"{to}: the bundle of {record.name}")
    elif kind == "hub":
        text = version_card(opened, record, license_id=license_id)
        opened.bundle(record, path)
        write_bytes(path / "README.md", text.encode())
        print_line(f"{to}: {record.name} for the Hub: hf upload OWNER/{record.model} {to}")
    elif kind == "cyclonedx":
        document = json_module.dumps(bill_of_materials(record, license_id=license_id), indent=1)
        write_bytes(path, document.encode() + b"\n")
        print_line(f"{to}: the bill of materials of {record.name}")
    elif kind == "mlflow":
        from eyas_host.versions.mlflow_export import log_version

        done = log_version(opened, record, to, experiment=experiment, register=register, license_id=license_id)
        where = f"run {done.run_id}{'' if done.new else ', as before'}"
        if done.registered:
            where += "; " + " ".join(
                [f"registered as version {done.registered}", *(f"({one})" for one in done.aliases)]
            )
        print_line(f"{record.name}: {where}, at {redact(to)}")
    else:
        raise RegistryError(f"--as {kind}: run, bundle, hub, cyclonedx or mlflow is possible")


def rebuild(
    version: VersionArgument,
    tolerance: Annotated[
        float,
        typer.Option("--tolerance", min=0, max=1, metavar="T", help="Largest difference of a balanced accuracy."),
    ] = 0.02,
    data: Annotated[
        str, typer.Option("--data", metavar="PATH", help="Where its images lie now.  [default: as in its recipe]")
    ] = "",
    runs: RunsOption = RUNS,
    registry: RegistryOption = REGISTRY,
    json: JsonOption = False,
) -> None:
    """Build a version again from its recipe and images, each in its old split, and compare it with the recorded one."""
    from eyas_host.versions.rebuild import rebuild as run

    opened = open_registry(registry)
    found = run(opened, opened.find(version), runs, tolerance=tolerance, now=time.time(), data=data)
    if json:
        print(to_json(msgspec.to_builtins(found) | {"ok": found.ok}, sys.stdout))
    else:
        same = {True: "the same", False: "another"}
        print_line(f"{found.version} again, in {found.run}")
        print_line(
            f"  images {same[found.same_data]}, split {same[found.same_split]}, weights {same[found.same_weights]}"
        )
        for name, (before, now) in found.figures.items():
            print_line(f"  {name:18} balanced accuracy {before:.3f} -> {now:.3f} ({now - before:+.3f})")
        for line in found.tools:
            print_line(f"  {line}")
        print_line(
            f"  {'within' if found.ok else 'NOT within'} the promise: same images and split, figures +-{tolerance:g}"
        )
    if not found.ok:
        raise typer.Exit(EXIT_CHECK_FAILED)


def verify(registry: RegistryOption = REGISTRY, json: JsonOption = False) -> None:
    """Read every file of every version, and compare it with its hash."""
    opened = open_registry(registry)
    problems = opened.verify()
    if json:
        print(to_json(problems, sys.stdout))
    else:
        for problem in problems:
            print_line(problem)
        print_line(f"{registry}: {len(opened.versions())} versions, {len(problems)} problems")
    if problems:
        raise typer.Exit(EXIT_CHECK_FAILED)


def prune(
    keep: Annotated[
        int, typer.Option("--keep", min=1, metavar="N", help="Newest versions of each model to keep whole.")
    ],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be removed.")] = False,
    registry: RegistryOption = REGISTRY,
) -> None:
    """Remove the files of old versions; their records stay, and so do versions with an alias and their parents."""
    removed = open_registry(registry).prune(keep, dry_run=dry_run)
    what = ", ".join(removed.versions) or "no version"
    print_line(f"{'would remove' if dry_run else 'removed'} the files of {what}; {removed.size_bytes / 1e6:.1f} MB")


list_models.__name__ = "list"
"""As it is typed; a function of that name would hide the built-in one."""


def open_registry(folder: Path) -> Registry:
    """The registry in a folder, in which this user acts."""
    from eyas_host.fleet.commands.send import issuer
    from eyas_host.versions.registry import Registry

    return Registry(folder, now=time.time, by=issuer())


def _print_alias(alias: str, name: str, before: str) -> None:
    was = "" if not before else " already" if name.endswith(f"@{before}") else f", before: {before}"
    print_line(f"{name}: {alias}{was}")


def _print_comparison(found: Comparison) -> None:
    images = found.images
    print_line(f"{found.first} -> {found.second}")
    print_line(f"images: {images.same} the same; new: {_counts(images.new)}; gone: {_counts(images.gone)}")
    if images.moved or images.relabelled:
        print_line(f"  in another split: {_counts(images.moved)}; with another label: {images.relabelled}")
    if images.leaked:
        print_line(
            f"  {images.leaked} images that tested the first one trained the second: the figures cannot be compared"
        )
    for heading, changes in (("recipe", found.recipe), ("made with", found.tools)):
        print_line(f"{heading}: {'the same' if not changes else ''}".rstrip())
        for name, (before, after) in list(changes.items())[:_SHOWN_ROWS]:
            print_line(f"  {name}: {before or 'none'} -> {after or 'none'}")
        if len(changes) > _SHOWN_ROWS:
            print_line(f"  and {len(changes) - _SHOWN_ROWS} more")
    print_line(f"figures on {'the same' if found.same_test else 'different'} held-out images:")
    for variant, figures in found.figures.items():
        for name, (old, new) in figures.items():
            print_line(f"  {variant:18} {name.replace('_', ' '):18} {old:.3f} -> {new:.3f} ({new - old:+.3f})")


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in counts.items()) or "none"


def _drift(store: str, digest: str) -> list[str]:
    """What the fleet's devices with this model report, a line of Markdown each."""
    from eyas_host.fleet.drift.monitor import Monitor
    from eyas_host.fleet.drift.report import describe, devices
    from eyas_host.fleet.store.database import Store

    with Store(store, create=False) as opened:
        monitor = Monitor(opened)
        monitor.catch_up()
        rows = [row for row in devices(monitor) if digest.startswith(row.digest) or row.digest.startswith(digest)]
    if not rows:
        return ["No device reports this version."]
    states = {
        state: sum(row.state == state for row in rows) for state in ("stable", "learning", "suspected", "confirmed")
    }
    lines = [f"{len(rows)} devices report it: " + ", ".join(f"{n} {state}" for state, n in states.items() if n) + "."]
    for row in rows:
        if row.alarm is not None:
            lines.append(f"- {row.device}: " + " ".join(line.strip() for line in describe(row.alarm)))
    return lines


def _when(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M")
