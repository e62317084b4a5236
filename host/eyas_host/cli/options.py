"""What several verbs of `eyas` are told on the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

RecipeArgument = Annotated[
    Path, typer.Argument(metavar="RECIPE", help="The recipe, e.g. models/solar-cells/recipe.toml.")
]
Overrides = Annotated[
    Optional[list[str]],  # noqa: UP045 - typer reads the annotation on Python 3.10
    typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Override a setting of the recipe; may be given again."),
]
RunsOption = Annotated[Path, typer.Option("--runs", help="Where runs are kept.")]
JsonOption = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Option("--json", metavar="FILE", help="Write the figures there too."),
]
