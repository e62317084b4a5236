"""`eyas doctor`: a line a check, and the fix below what is not green."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import msgspec
from rich.console import Console
from rich.text import Text

from eyas_device import __version__
from eyas_device.doctor import CheckResult, check_name, run_checks
from eyas_device.errors import EXIT_CHECK_FAILED
from eyas_host.doctor import CHECKS
from eyas_host.doctor.context import Context
from eyas_host.recipe.load import load_recipe
from eyas_host.support.errors import RecipeError

LIMIT_S = 600.0
"""Importing everything on a busy machine takes minutes."""
_COLOURS = {"green": "green", "yellow": "yellow", "red": "red", "grey": "bright_black"}


def doctor(recipe: Path | None, overrides: Sequence[str], runs: Path, *, json: bool) -> int:
    """Run all checks; returns 1 if one of them is red, else 0."""
    console = Console(highlight=False, soft_wrap=True)
    width = max(len(check_name(check)) for check in CHECKS)
    found: list[CheckResult] = []
    for row in run_checks(_context(recipe, overrides, runs), CHECKS, limit_s=LIMIT_S):
        found.append(row)
        if not json:
            console.print(
                Text(f"{row.status:6}", style=_COLOURS[row.status]), Text(f" {row.check:{width}}  {row.finding}")
            )
            if row.fix:
                console.print(Text(f"{'':6}  {'':{width}}  -> {row.fix}"))
    counts = Counter(row.status for row in found)
    if json:
        worst = next((status for status in ("red", "yellow") if counts[status]), "green")
        print(msgspec.json.encode({"eyas": __version__, "worst": worst, "findings": found}).decode())
    else:
        kinds = {"green": "green", "yellow": "yellow", "red": "red", "grey": "not checked"}
        console.print(Text(", ".join(f"{counts[status]} {word}" for status, word in kinds.items())))  # type: ignore[index]
    return EXIT_CHECK_FAILED if counts["red"] else 0


def _context(path: Path | None, overrides: Sequence[str], runs: Path) -> Context:
    """A faulty recipe is a finding, not an error."""
    if path is None:
        return Context(runs=runs)
    try:
        return Context(recipe=load_recipe(path, overrides), recipe_path=path, runs=runs)
    except RecipeError as error:
        return Context(recipe_path=path, recipe_fault=str(error), runs=runs)
