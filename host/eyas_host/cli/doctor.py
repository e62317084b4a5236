"""`eyas doctor`: one line for each check, with the fix below each check that is not green."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from eyas_device import __version__
from eyas_device.errors import EXIT_CHECK_FAILED
from eyas_device.support.streams import to_json
from eyas_host.cli.options import RUNS, Overrides, RunsOption

if TYPE_CHECKING:
    from eyas_host.doctor.context import Context

LIMIT_S = 600.0
"""Time limit of a check: importing everything on a busy machine takes minutes."""
_LABELS = {"green": "green", "yellow": "yellow", "red": "red", "grey": "not checked"}


def doctor(
    recipe: Annotated[Path | None, typer.Argument(metavar="[RECIPE]", help="Also check this recipe.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object with all findings.")] = False,
    overrides: Overrides = None,
    runs: RunsOption = RUNS,
) -> None:
    """Check this workstation: packages, GPU, weights, memory, disk, programs."""
    from rich.console import Console
    from rich.text import Text

    from eyas_device.doctor import check_name, run_checks, running_check
    from eyas_host.doctor import CHECKS, shared_jobs

    console = Console(highlight=False, soft_wrap=True)
    width = max(len(check_name(check)) for check in CHECKS)
    findings = []
    context = _context(recipe, overrides or (), runs)
    context = replace(context, job=shared_jobs(context.recipe))
    with running_check(sys.stderr) as running:
        for row in run_checks(context, CHECKS, limit_s=LIMIT_S, on_start=running):
            running("")
            findings.append(row)
            if not json:
                colour = "bright_black" if row.status == "grey" else row.status
                console.print(Text(f"{row.status:6}", style=colour), Text(f" {row.check:{width}}  {row.finding}"))
                if row.fix:
                    console.print(Text(f"{'':6}  {'':{width}}  -> {row.fix}"))
    counts: Counter[str] = Counter(row.status for row in findings)
    if json:
        worst = next((status for status in ("red", "yellow") if counts[status]), "green")
        print(to_json({"eyas": __version__, "worst": worst, "findings": findings}, sys.stdout))
    else:
        console.print(Text(", ".join(f"{counts[status]} {label}" for status, label in _LABELS.items())))
    if counts["red"]:
        raise typer.Exit(EXIT_CHECK_FAILED)


def _context(path: Path | None, overrides: Sequence[str], runs: Path) -> Context:
    """The workstation and the recipe to check; an invalid recipe is a finding, not an error."""
    from eyas_host.doctor.context import Context
    from eyas_host.recipe.load import load_recipe
    from eyas_host.support.errors import RecipeError

    if path is None:
        return Context(runs=runs)
    try:
        return Context(recipe=load_recipe(path, overrides), recipe_path=path, runs=runs)
    except RecipeError as error:
        return Context(recipe_path=path, recipe_error=str(error), runs=runs)
