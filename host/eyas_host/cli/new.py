"""`eyas new`: write a recipe for a folder of images."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def new(
    images: Annotated[Path, typer.Argument(metavar="FOLDER", help="Folder with one sub-folder for each class.")],
    name: Annotated[str | None, typer.Option(help="Name of the run.  [default: the folder's name]")] = None,
    teacher: Annotated[str, typer.Option(metavar="NAME", help="Preset of the teacher.")] = "efficientnet_lite0",
    student: Annotated[str, typer.Option(metavar="NAME", help="Preset of the student.")] = "mobilenetv3_small",
    models: Annotated[Path, typer.Option(metavar="DIR", help="Folder of recipes.")] = Path("models"),
) -> None:
    """Inspect a folder of labelled images and write a recipe for it."""
    from eyas_host.data.sources import list_class_folders
    from eyas_host.recipe.presets import STUDENTS, TEACHERS, pick
    from eyas_host.recipe.scaffold import new_recipe

    networks = pick(TEACHERS, teacher), pick(STUDENTS, student)
    path = new_recipe(images, list_class_folders(images), models, name, *networks)
    typer.echo(f"{path}\nnext: eyas distill {path}")
