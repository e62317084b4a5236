"""Class folders for tests: shapes drawn on crops of scikit-image's free photographs."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
from skimage import data

SHAPES = ("circle", "cross", "ring", "square", "triangle")


def draw_folder(
    root: Path, *, classes: int = 5, pictures: int = 12, size: tuple[int, int] = (96, 80), seed: int = 0
) -> Path:
    """Write `root/<shape>/NN.(png|jpg)`: colour pictures of `size` (width, height); the same seed draws the same."""
    rng = np.random.default_rng(seed)
    photographs = [photograph()[..., ::-1] for photograph in (data.astronaut, data.coffee, data.chelsea)]
    width, height = size
    for shape in SHAPES[:classes]:
        folder = root / shape
        folder.mkdir(parents=True)
        for number in range(pictures):
            photograph = photographs[int(rng.integers(len(photographs)))]
            top = int(rng.integers(photograph.shape[0] - height))
            left = int(rng.integers(photograph.shape[1] - width))
            picture = photograph[top : top + height, left : left + width] // 2
            _draw(picture, shape, rng)
            suffix = ".png" if number % 2 else ".jpg"
            assert cv2.imwrite(str(folder / f"{number:02d}{suffix}"), picture)
    return root


def _draw(picture: np.ndarray, shape: str, rng: np.random.Generator) -> None:
    height, width = picture.shape[:2]
    radius = int(rng.integers(height // 5, height // 3))
    x, y = (int(rng.integers(radius, side - radius)) for side in (width, height))
    colour = tuple(int(c) for c in rng.integers(128, 256, 3))
    if shape == "circle":
        cv2.circle(picture, (x, y), radius, colour, -1)
    elif shape == "ring":
        cv2.circle(picture, (x, y), radius, colour, 4)
    elif shape == "square":
        cv2.rectangle(picture, (x - radius, y - radius), (x + radius, y + radius), colour, -1)
    elif shape == "triangle":
        corners = np.array([(x, y - radius), (x - radius, y + radius), (x + radius, y + radius)])
        cv2.fillPoly(picture, [corners], colour)
    else:
        cv2.line(picture, (x - radius, y), (x + radius, y), colour, 6)
        cv2.line(picture, (x, y - radius), (x, y + radius), colour, 6)
