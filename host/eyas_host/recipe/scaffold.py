"""Write a recipe for a folder of labelled images, with settings that suit its size and the chosen networks."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from eyas_device.errors import ImageError
from eyas_device.preprocess import read_image
from eyas_host.recipe.presets import STUDENTS, TEACHERS, Student, Teacher
from eyas_host.support.errors import RecipeError
from eyas_host.support.files import write_bytes

_SAMPLE = 24
_FEW_IMAGES = 200
_TEMPLATE = """\
# {name}: {images} images, {classes} classes ({counts}).
# `eyas distill {path}` makes the bundle; models/template/recipe.toml explains every setting.

[run]
name = "{name}"
seed = 0

[data]
source = "folder"
path = {folder}{division}

[image]
size = {size}    # most images are {width} x {height}
fit = "{fit}"

[augment]        # only what the real camera could see
horizontal_flip = true    # false for text, signs, X-rays
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
epochs = {epochs}
"""


def new_recipe(
    images: Path,
    classes: Mapping[str, Sequence[Path]],
    models: Path,
    name: str | None = None,
    teacher: Teacher = TEACHERS["efficientnet_lite0"],
    student: Student = STUDENTS["mobilenetv3_small"],
    *,
    divided: bool = False,
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

    Raises:
        RecipeError: the recipe exists, or the name is invalid.

    """
    name = name or re.sub(r"[^A-Za-z0-9._-]+", "-", images.resolve().name).strip("-._")
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise RecipeError(f"name {name!r}: letters, digits, '.', '_' and '-' are allowed; choose one with --name")
    path = models / name / "recipe.toml"
    if path.exists():
        raise RecipeError(f"{path}: exists already; edit it, or choose another --name")
    files = [image for own in classes.values() for image in own]
    width, height = _typical_size(files)
    text = _TEMPLATE.format(
        name=name,
        path=path,
        images=len(files),
        classes=len(classes),
        counts=", ".join(f"{' '.join(label.split())} {len(own)}" for label, own in classes.items()),
        division='\nby = "folders"    # as they are divided already' if divided else "",
        folder=json.dumps(str(images.resolve()), ensure_ascii=False),  # a JSON string is a TOML basic string
        size=next(size for size in (teacher.size, 128, 96, 64) if size <= max(64, min(width, height))),
        width=width,
        height=height,
        fit="crop" if max(width, height) <= 2 * min(width, height) else "pad",
        teacher=teacher,
        student=student,
        epochs=60 if len(files) < _FEW_IMAGES else 30,
    )
    write_bytes(path, text.encode())
    return path


def _typical_size(images: Sequence[Path]) -> tuple[int, int]:
    """Most frequent width and height in a sample spread over the folder; (128, 128) if none can be read."""
    sizes: Counter[tuple[int, int]] = Counter()
    for path in images[:: max(1, len(images) // _SAMPLE)]:
        try:
            height, width = read_image(path).shape[:2]
        except ImageError:
            continue
        sizes[(width, height)] += 1
    return sizes.most_common(1)[0][0] if sizes else (128, 128)
