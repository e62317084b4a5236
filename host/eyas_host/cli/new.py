"""`eyas new`: write a recipe for a folder of images."""

from __future__ import annotations

import shlex
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
    from eyas_device.support.image_files import describe_left_out
    from eyas_host.data.class_folders import inspect_folder
    from eyas_host.recipe.presets import STUDENTS, TEACHERS, pick
    from eyas_host.recipe.scaffold import new_recipe

    networks = pick(TEACHERS, teacher), pick(STUDENTS, student)
    found = inspect_folder(images)
    path = new_recipe(images, found.classes, models, name, *networks, divided=bool(found.splits))
    total = sum(map(len, found.classes.values()))
    counts = ", ".join(f"{label} {len(files):,}" for label, files in found.classes.items())
    typer.echo(f"{images}: {total:,} images, {len(found.classes)} classes ({counts})")
    if found.splits:
        typer.echo(f'divided already into {", ".join(found.splits)}: the recipe keeps that ([data] by = "folders")')
    if found.left_out:
        typer.echo(describe_left_out(found.left_out))
    for doubt in found.doubts:
        typer.echo(f"look: {doubt}")
    typer.echo(f"{path}\nnext: eyas distill {shlex.quote(str(path))}")
