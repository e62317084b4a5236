"""`eyas distill`, a verb for each stage of its chain, and `eyas preview`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from eyas_device.support.logs import show
from eyas_host.cli.options import (
    RUNS,
    Overrides,
    RecipeArgument,
    RunsOption,
    YesOption,
    prepared_run,
    run_chain,
    settled_run,
)

if TYPE_CHECKING:
    from eyas_host.pipeline.runner import RunContext


def distill(
    recipe: RecipeArgument,
    start: Annotated[
        str | None, typer.Option("--from", metavar="STAGE", help="Run this stage and all later ones again.")
    ] = None,
    only: Annotated[str | None, typer.Option("--only", metavar="STAGE", help="Run just this stage, again.")] = None,
    plan: Annotated[bool, typer.Option("--plan", help="Only print what would run, and about how long.")] = False,
    overrides: Overrides = None,
    yes: YesOption = False,
    runs: RunsOption = RUNS,
) -> None:
    """Run the whole chain: from the images of a recipe to a verified bundle and a report."""
    if plan:
        _print_plan(settled_run(recipe, runs, overrides, start=start, only=only, yes=True), start, only)
        return
    with prepared_run(recipe, runs, overrides, start=start, only=only, yes=yes) as context:
        if only is None:
            from eyas_host.bundle.demonstrate import demonstrate
            from eyas_host.cli.ending import show_ending
            from eyas_host.support.progress import say

            say("[bold]try[/bold]      the bundle on the validation images, with the device's own program:")
            code = demonstrate(context)
            show_ending(context)
            if code:
                raise typer.Exit(code)


def _print_plan(context: RunContext, start: str | None, only: str | None) -> None:
    from eyas_host.pipeline.runner import due_stages
    from eyas_host.stages.chain import STAGES
    from eyas_host.stages.plan import show_plan

    show_plan(context, due_stages(STAGES, context, start=start, only=only), always=True)


def pack(
    recipe: Annotated[
        Path, typer.Argument(metavar="RECIPE|BUNDLE", help="The recipe, or the folder of a bundle with --target.")
    ],
    target: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Also write the bundle with only what pi3, pi4, pi5, jetson or x86 runs, as BUNDLE-NAME; all: with "
            "everything.",
        ),
    ] = None,
    overrides: Overrides = None,
    yes: YesOption = False,
    runs: RunsOption = RUNS,
) -> None:
    """Write the bundle."""
    from eyas_host.bundle.reduce import check_target, pack_target

    if target is not None:
        check_target(target)
    if recipe.is_dir() and target is not None:
        bundle = recipe
    else:
        from eyas_host.pipeline.runner import BUNDLE

        bundle = run_chain(recipe, runs, overrides, until="pack", yes=yes).root / BUNDLE
    if target is not None:
        show(str(pack_target(bundle, target)))


def _stage_verb(stage: str, summary: str) -> Callable[..., None]:
    def verb(
        recipe: RecipeArgument, overrides: Overrides = None, yes: YesOption = False, runs: RunsOption = RUNS
    ) -> None:
        run_chain(recipe, runs, overrides, until=stage, yes=yes)

    verb.__name__, verb.__doc__ = stage, summary
    return verb


def prune(
    recipe: RecipeArgument,
    target_ms: Annotated[
        float | None, typer.Option("--target-ms", metavar="MS", min=0.0, help="Target latency of one image.")
    ] = None,
    keep: Annotated[
        float | None,
        typer.Option("--keep", metavar="FRACTION", help="Target latency as a fraction of the dense student's, 0 to 1."),
    ] = None,
    table: Annotated[
        Path | None, typer.Option("--table", metavar="FILE", help="Block times measured on the target device.")
    ] = None,
    overrides: Overrides = None,
    yes: YesOption = False,
    runs: RunsOption = RUNS,
) -> None:
    """Prune the distilled student's channels and fine-tune it."""
    if target_ms is not None and keep is not None:
        raise typer.BadParameter("--target-ms and --keep exclude each other")
    settings = [] if target_ms is None else [f"prune.ms={target_ms}"]
    settings += [] if keep is None else [f"prune.keep={keep}", "prune.ms=0.0"]
    settings += [] if table is None else [f"prune.table={table.resolve()}"]
    by_latency = ["prune.method=channel", "prune.target=latency"] if settings else []
    run_chain(recipe, runs, [*(overrides or ()), *by_latency, *settings], until="prune", yes=yes)


VERBS = (
    _stage_verb("split", "Index the images and split them into train, validation and test."),
    _stage_verb("teach", "Transfer-learn the teacher with staged unfreezing."),
    prune,
    _stage_verb("qat", "Fine-tune with simulated int8 (quantization-aware training)."),
    _stage_verb("compile", "Build fp32 and int8 artefacts for LiteRT, OpenVINO and ONNX."),
    _stage_verb("verify", "Evaluate every artefact on validation and apply the gates."),
    pack,
    _stage_verb("report", "Evaluate once on the held-out test set and write the report."),
)
"""A verb for each stage but `distill`, which runs the whole chain."""


def preview(
    recipe: RecipeArgument,
    images: Annotated[int, typer.Option(min=1, max=20, help="Images of each class.")] = 3,
    views: Annotated[int, typer.Option(min=1, max=20, help="Augmented views of each image.")] = 6,
    overrides: Overrides = None,
    yes: YesOption = False,
    runs: RunsOption = RUNS,
) -> None:
    """Draw a contact sheet: stored images, as the device prepares them, and augmented views."""
    with prepared_run(recipe, runs, overrides, until="split", yes=yes, shared=True) as context:
        from eyas_host.data.preview import write_preview
        from eyas_host.support.commands import command
        from eyas_host.support.progress import say

        show(str(write_preview(context, images=images, views=views)))
        say(f"next: {escape(command('eyas', 'distill', recipe))}    if the views could occur in front of the camera")
