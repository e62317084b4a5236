"""`eyas new`: look at a folder of class folders and write a recipe for it."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path

from eyas_device.errors import ImageError
from eyas_device.preprocess import read_image
from eyas_host.data.sources import list_class_folders
from eyas_host.models.presets import STUDENTS, TEACHERS, pick
from eyas_host.support.errors import RecipeError
from eyas_host.support.files import write_bytes

_LOOKED_AT = 24
_SMALL = 200
_TEMPLATE = """\
# {name}: {images} images, {classes} classes ({counts}).
# `eyas distill {path}` makes the bundle; models/template/recipe.toml explains every setting.

[run]
name = "{name}"
seed = 0

[data]
source = "folder"
path = {folder}

[image]
size = {size}    # the images looked at are about {width} x {height}
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
    name: str | None,
    models: Path,
    *,
    teacher: str = "efficientnet_lite0",
    student: str = "mobilenetv3_small",
) -> Path:
    """Write `models/<name>/recipe.toml` for a folder of class folders and return its path.

    `teacher` and `student` are names in `networks`. Raises `DataError` if the folder cannot be used, `RecipeError` if
    the recipe exists, the name is no name, or a network is not among the ready ones.
    """
    strong, small = pick(TEACHERS, teacher), pick(STUDENTS, student)
    files = list_class_folders(images)
    name = name or re.sub(r"[^A-Za-z0-9._-]+", "-", images.resolve().name).strip("-._")
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise RecipeError(f"name {name!r}: letters, digits, '.', '_' and '-' are allowed; give one with --name")
    path = models / name / "recipe.toml"
    if path.exists():
        raise RecipeError(f"{path}: exists already; edit it, or give another --name")
    everything = [image for found in files.values() for image in found]
    width, height = _usual_size(everything)
    text = _TEMPLATE.format(
        name=name,
        path=path,
        images=len(everything),
        classes=len(files),
        counts=", ".join(f"{' '.join(label.split())} {len(found)}" for label, found in files.items()),
        folder=json.dumps(str(images.resolve()), ensure_ascii=False),  # also what TOML calls a basic string
        size=next(size for size in (strong.size, 128, 96, 64) if size <= max(64, min(width, height))),
        width=width,
        height=height,
        fit="crop" if max(width, height) <= 2 * min(width, height) else "pad",
        teacher=strong,
        student=small,
        epochs=60 if len(everything) < _SMALL else 30,
    )
    write_bytes(path, text.encode())
    return path


def _usual_size(images: list[Path]) -> tuple[int, int]:
    """The commonest width and height of a few images spread over the folder."""
    sizes: Counter[tuple[int, int]] = Counter()
    for path in images[:: max(1, len(images) // _LOOKED_AT)]:
        try:
            height, width = read_image(path).shape[:2]
        except ImageError:
            continue
        sizes[(width, height)] += 1
    return sizes.most_common(1)[0][0] if sizes else (128, 128)
