"""`eyas labels check`: images whose labels may be wrong, side by side."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer

from eyas_host.cli.options import RUNS, Overrides, RecipeArgument, RunsOption, settled_run


class Action(StrEnum):
    """What to do with the labels."""

    CHECK = "check"


def labels(
    action: Annotated[Action, typer.Argument(metavar="check", help="Look for labels that may be wrong.")],
    recipe: RecipeArgument,
    overrides: Overrides = None,
    runs: RunsOption = RUNS,
) -> None:
    """Show look-alikes with two labels side by side: `eyas labels check RECIPE`."""
    from eyas_host.report.labels import check_labels, write_label_check
    from eyas_host.support.progress import say

    context = settled_run(recipe, runs, overrides, yes=True)  # nothing is cleared
    check = check_labels(context)
    say(f"{check.summary}: {write_label_check(context, check)}")
    if check.suspects:
        raise typer.Exit(1)
