"""`eyas evaluate`: a finished bundle on a second labelled set. Nothing heavy is imported until it runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer


def evaluate(
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="The bundle, e.g. runs/solar-cells/bundle.")],
    source: Annotated[
        Path, typer.Argument(metavar="FOLDER|TABLE", help="A folder of class folders, or a CSV path,label[,group].")
    ],
    artefact: Annotated[
        Optional[list[str]],  # noqa: UP045 - typer reads the annotation on Python 3.10
        typer.Option("--artefact", metavar="NAME", help="Only this artefact; may be given again."),
    ] = None,
    run: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--run", metavar="DIR", help="The bundle's run, where the bundle does not lie in it."),
    ] = None,
    skip_unreadable: Annotated[
        bool, typer.Option("--skip-unreadable", help="List unreadable images instead of stopping.")
    ] = False,
    html: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--html", metavar="FILE", help="The page; RUN/evaluate/SET.html, or BUNDLE-SET.html, by default."),
    ] = None,
    json: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option("--json", metavar="FILE", help="Write the figures there too; - writes them to standard output."),
    ] = None,
) -> None:
    """Evaluate a bundle on a second labelled set, through the device's own runtimes."""
    import msgspec

    from eyas_host.evaluation.labelled_set import evaluate_bundle, run_of
    from eyas_host.report.labelled_set import evaluation_table, render_evaluation
    from eyas_host.support.files import write_bytes
    from eyas_host.support.progress import say, show, warn

    found = evaluate_bundle(bundle, source, artefacts=artefact or (), run=run, skip_unreadable=skip_unreadable)
    name, root = source.resolve().stem, run or run_of(bundle)
    page = html or (root / "evaluate" / f"{name}.html" if root else Path(f"{found.bundle}-{name}.html"))
    write_bytes(page, render_evaluation(found).encode())
    figures = msgspec.json.format(msgspec.json.encode(found), indent=1)
    if json == "-":
        typer.echo(figures.decode())
    else:
        show(evaluation_table(found))
    if json not in (None, "-"):
        write_bytes(Path(json), figures)
    for line in found.warnings:
        warn(line)
    say(str(page))
