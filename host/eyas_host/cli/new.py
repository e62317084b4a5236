"""`eyas new`: look at a folder of images, and write a recipe for it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from eyas_device.support.logs import show

_SHOWN = 12


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
    from eyas_host.data.first_look import doubts, look_at
    from eyas_host.recipe.load import load_recipe
    from eyas_host.recipe.presets import STUDENTS, TEACHERS, pick
    from eyas_host.recipe.scaffold import input_size, new_recipe, recipe_path
    from eyas_host.support.commands import command

    networks = pick(TEACHERS, teacher), pick(STUDENTS, student)
    path = recipe_path(images, models, name)
    found = inspect_folder(images)
    look = look_at(found.classes)
    total = sum(map(len, found.classes.values()))
    counts = [f"{label} {len(files):,}" for label, files in found.classes.items()]
    more = f" and {len(counts) - _SHOWN} more" if len(counts) > _SHOWN else ""
    show(f"{images}: {total:,} images, {len(counts)} classes: {', '.join(counts[:_SHOWN])}{more}")
    show(f"size:    {look.describe_sizes()}")
    if found.splits:
        show(f'split:   as the folders are divided already: {", ".join(found.splits)} ([data] by = "folders")')
    else:
        show("split:   70 % training, 15 % validation, 15 % held-out test")
    if found.left_out:
        show(describe_left_out(found.left_out))
    size = input_size(networks[0], *look.typical)
    for doubt in [*found.doubts, *doubts(found.classes, look, size)]:
        show(f"doubt:   {doubt}")
    if path.exists():
        _refuse(path, images)
    new_recipe(
        images, found.classes, models, name, *networks, divided=bool(found.splits), typical=look.typical, bits=look.bits
    )
    recipe = load_recipe(path)
    image, augment = recipe.image, recipe.augment
    mirror = "mirrored at random" if augment.horizontal_flip else "never mirrored"
    show(f"recipe:  {path}: {image.size} x {image.size} pixels (fit {image.fit}), {mirror}")
    show(f"next:    {command('eyas', 'preview', path)}    # what the model will see")
    show(f"then:    {command('eyas', 'distill', path)}    # trains; with --plan it only says how long that takes")


def _refuse(path: Path, images: Path) -> None:
    """Raise `RecipeError` for a recipe that exists, with what to type."""
    from eyas_host.support.commands import command
    from eyas_host.support.errors import RecipeError
    from eyas_host.support.files import free_name

    other = free_name(path.parent).name
    raise RecipeError(
        f"{path}: exists already and stays as it is. Type one of:\n"
        f"  {command('eyas', 'distill', path)}    to use it\n"
        f"  {command('eyas', 'new', images, '--name', other)}    to write another one"
    )
