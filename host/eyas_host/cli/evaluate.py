"""`eyas evaluate`: a finished bundle on a second labelled set."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from eyas_device.support.streams import escape_json


def evaluate(
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="The bundle, e.g. runs/solar-cells/bundle.")],
    source: Annotated[
        Path, typer.Argument(metavar="FOLDER|TABLE", help="One sub-folder for each class, or a CSV path,label[,group].")
    ],
    artefact: Annotated[
        list[str] | None,
        typer.Option("--artefact", metavar="NAME", help="Only this artefact; repeatable."),
    ] = None,
    run: Annotated[
        Path | None,
        typer.Option("--run", metavar="DIR", help="Run of the bundle, if the bundle is elsewhere."),
    ] = None,
    skip_unreadable: Annotated[
        bool, typer.Option("--skip-unreadable", help="List unreadable images instead of stopping.")
    ] = False,
    html: Annotated[
        Path | None,
        typer.Option("--html", metavar="FILE", help="Page.  [default: RUN/evaluate/SET.html, else BUNDLE-SET.html]"),
    ] = None,
    json: Annotated[
        str | None,
        typer.Option("--json", metavar="FILE", help="Also write the figures to this file; - for standard output."),
    ] = None,
) -> None:
    """Evaluate a bundle on a second labelled set, through the device's own runtimes."""
    import msgspec

    from eyas_host.evaluation.labelled_set import evaluate_bundle
    from eyas_host.evaluation.overlap import run_of
    from eyas_host.report.labelled_set import evaluation_table, render_evaluation
    from eyas_host.support.files import write_bytes
    from eyas_host.support.progress import say, show, warn

    evaluation = evaluate_bundle(bundle, source, artefacts=artefact or (), run=run, skip_unreadable=skip_unreadable)
    name, root = source.resolve().stem, run or run_of(bundle)
    page = html or (root / "evaluate" / f"{name}.html" if root else Path(f"{evaluation.bundle}-{name}.html"))
    write_bytes(page, render_evaluation(evaluation).encode())
    figures = msgspec.json.format(msgspec.json.encode(evaluation), indent=1)
    if json == "-":
        print(escape_json(figures.decode(), sys.stdout))
    else:
        show(evaluation_table(evaluation))
    if json not in (None, "-"):
        write_bytes(Path(json), figures)
    for warning in evaluation.warnings:
        warn(warning)
    say(str(page))
