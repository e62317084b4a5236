"""Some thousand images of Fashion-MNIST as a folder of labelled images with a recipe: a second set for benchmarks.

`apt-get install dataset-fashion-mnist`, or unpacked below a folder.
"""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np

from eyas_host.support.files import atomic_write
from sides.garments import LABELS, garments, installed

EACH = 400
"""Images of each class: a quarter to learn from, 60 % to be scored by."""
_RECIPE = """[run]
name = "fashion"
[data]
source = "folder"
path = "images"
split = [0.25, 0.15, 0.6]
near_duplicates = 0   # at 28 pixels half a class looks alike
[image]
size = 64
[augment]
horizontal_flip = true
[student]
views = 12
weight_decay = 0.05
"""


def fashion_recipe(root: Path, folder: Path) -> Path | None:
    """A recipe in `folder` over images of the package below `root`; None where the package is not installed."""
    if not installed(root):
        return None
    recipe = folder / "recipe.toml"
    if not recipe.exists():
        images, labels = garments(root, "train")
        for label, name in enumerate(LABELS):
            (folder / "images" / name).mkdir(parents=True, exist_ok=True)
            for number in np.flatnonzero(labels == label)[:EACH]:
                cv2.imwrite(str(folder / "images" / name / f"{number}.png"), images[number])
        with atomic_write(recipe) as temporary:  # last: it says that the images are there
            temporary.write_text(_RECIPE)
    return recipe
