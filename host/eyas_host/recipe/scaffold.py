"""Write a recipe for a folder of labelled images, with settings that suit its size and the chosen networks."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

from eyas_host.recipe import Recipe
from eyas_host.recipe.presets import STUDENTS, TEACHERS, Student, Teacher
from eyas_host.recipe.run import NAME, RunSection
from eyas_host.recipe.training import StudentSection
from eyas_host.recipe.warnings import label_warnings
from eyas_host.support.errors import RecipeError
from eyas_host.support.files import write_bytes

_FEW_IMAGES = 200
_STRIP, _MAX_SIZE = 64, 256
"""Height that a long image should keep, and the largest input for it: twice what the students were trained at."""
_VIEWS, _CACHE_BYTES = StudentSection().views, 0.9e9 * StudentSection().cache_gb
_MIRRORED = "true    # false for text, signs, X-rays"
_NOT_MIRRORED = "false    # by the labels, a mirrored image may be of another class"
_PLAIN = Recipe(run=RunSection(name="new"))
_TEMPLATE = """\
# {name}: {images} images, {classes} classes ({counts}).
# `eyas distill {path}` makes the bundle; models/template/recipe.toml in Eyas's repository explains every setting.

[run]
name = "{name}"
seed = 0

[data]
source = "folder"
path = {folder}{division}

[image]
size = {size}    # the images are {width} x {height}{reason}
fit = "{fit}"{bits}

[augment]        # only what the real camera could see
horizontal_flip = {mirrored}
vertical_flip = false
quarter_turns = false

[teacher]        # {teacher.why}
model = "{teacher.model}"
rate = {teacher.rate}
head_rate = {teacher.head_rate}
layer_decay = {teacher.layer_decay}
unfreeze = "{teacher.unfreeze}"
batch = {teacher.batch}

[student]        # {student.why}
model = "{student.model}"
rate = {student.rate}
batch = {student.batch}
epochs = {epochs}{views}

# [accept]       # what held-out images must reach: without it the report cannot say whether to ship
# min_balanced_accuracy = 0.9
"""


def recipe_path(images: Path, models: Path, name: str | None = None) -> Path:
    """Where the recipe of a folder is written, by its name or the folder's.

    Raises `RecipeError` if the name is invalid.
    """
    name = name or re.sub(r"[^A-Za-z0-9._-]+", "-", images.resolve().name).strip("-._")
    if not re.fullmatch(NAME, name):
        raise RecipeError(f"name {name!r}: letters, digits, '.', '_' and '-' are allowed; choose one with --name")
    return models / name / "recipe.toml"


def new_recipe(
    images: Path,
    classes: Mapping[str, Sequence[Path]],
    models: Path,
    name: str | None = None,
    teacher: Teacher = TEACHERS["efficientnet_lite0"],
    student: Student = STUDENTS["mobilenetv3_small"],
    *,
    divided: bool = False,
    typical: tuple[int, int] = (128, 128),
    bits: int = 0,
) -> Path:
    """Write `models/<name>/recipe.toml` for the folder `images` and return its path.

    Args:
        images: Folder with one sub-folder for each class.
        classes: Label -> its images.
        divided: Whether the folder is divided into splits already.
        models: Folder of recipes.
        name: Name of the run; the folder's name by default.
        teacher: Preset of the teacher.
        student: Preset of the student.
        typical: Most frequent width and height of the images, pixels.
        bits: Bits that images of 16 bits per channel use; 0: all.

    Raises:
        RecipeError: the recipe exists, or the name is invalid.

    """
    path = recipe_path(images, models, name)
    if path.exists():
        raise RecipeError(f"{path}: exists already; edit it, or choose another --name")
    count = sum(map(len, classes.values()))
    width, height = typical
    fit: Literal["crop", "pad"] = "crop" if max(width, height) <= 2 * min(width, height) else "pad"
    size = input_size(teacher, width, height)
    mirrored = not any("horizontal_flip" in line for line in label_warnings(_PLAIN, list(classes)))
    views = max(1, min(_VIEWS, int(_CACHE_BYTES / (count * 3 * size**2))))
    text = _TEMPLATE.format(
        name=path.parent.name,
        path=path,
        images=count,
        classes=len(classes),
        counts=", ".join(f"{' '.join(label.split())} {len(own)}" for label, own in classes.items()),
        division='\nby = "folders"    # as they are divided already' if divided else "",
        folder=json.dumps(str(images.resolve()), ensure_ascii=False),  # a JSON string is a TOML basic string
        size=size,
        width=width,
        height=height,
        reason="; the networks were trained on images of about this size" if min(width, height) < size else "",
        fit=fit,
        bits=f"\nbits = {bits}    # of the 16 that the files have" if bits else "",
        mirrored="true    # false for text, signs, X-rays"
        if mirrored
        else "false    # a mirrored image may be another class",
        teacher=teacher,
        student=student,
        epochs=60 if count < _FEW_IMAGES else 30,
        views=f"\nviews = {views}    # so that the cache of views fits into cache_gb" if views < _VIEWS else "",
    )
    write_bytes(path, text.encode())
    return path


def input_size(teacher: Teacher, width: int, height: int) -> int:
    """Side of the model's input: the teacher's smallest, more where a long image would become too thin a strip."""
    short, ratio = min(width, height), max(width, height) / min(width, height)
    size = teacher.size if short >= teacher.size else teacher.min_size
    if ratio <= 2 or short < _STRIP:
        return size
    return next((larger for larger in range(size, _MAX_SIZE, 32) if larger / ratio >= _STRIP), _MAX_SIZE)
