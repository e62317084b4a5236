"""Class folders for tests: shapes drawn on pieces of scikit-image's free photographs.

`python -m tests.support.shapes FOLDER` draws a hundred images of each of three shapes
"""

from __future__ import annotations

import sys
from functools import cache
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt
import skimage.data

SHAPES = ("circle", "cross", "ring", "square", "triangle")
_BACKGROUNDS = ("astronaut", "coffee", "chelsea", "cat")

Pixels = npt.NDArray[np.uint8]


@cache
def _photograph(name: str) -> Pixels:
    image: Pixels = getattr(skimage.data, name)()[..., ::-1]
    return image


def draw_shape(label: str, seed: int, width: int = 96, height: int = 80) -> Pixels:
    """A shape in a colour of its own on a piece of a photograph, uint8 [height, width, 3] BGR."""
    rng = np.random.default_rng((SHAPES.index(label), seed))
    photograph = _photograph(_BACKGROUNDS[int(rng.integers(len(_BACKGROUNDS)))])
    top = int(rng.integers(photograph.shape[0] - height + 1))
    left = int(rng.integers(photograph.shape[1] - width + 1))
    image = photograph[top : top + height, left : left + width].copy()
    radius = int(min(width, height) * rng.uniform(0.25, 0.4))
    x, y = width // 2 + int(rng.integers(-4, 5)), height // 2 + int(rng.integers(-4, 5))
    colour = tuple(int(c) for c in rng.integers(0, 256, 3))
    if label == "circle":
        cv2.circle(image, (x, y), radius, colour, -1, cv2.LINE_AA)
    elif label == "ring":
        cv2.circle(image, (x, y), radius, colour, max(2, radius // 4), cv2.LINE_AA)
    elif label == "square":
        cv2.rectangle(image, (x - radius, y - radius), (x + radius, y + radius), colour, -1)
    elif label == "triangle":
        corners = np.array([(x, y - radius), (x - radius, y + radius), (x + radius, y + radius)])
        cv2.fillPoly(image, [corners], colour, cv2.LINE_AA)
    else:
        for side in (-1, 1):
            ends = (x - radius, y - side * radius), (x + radius, y + side * radius)
            cv2.line(image, *ends, colour, max(2, radius // 3), cv2.LINE_AA)
    return image


def draw_folder(
    root: Path, *, count: int = 12, width: int = 96, height: int = 80, labels: tuple[str, ...] = SHAPES
) -> Path:
    """Fill `root` with class folders of `count` images each, PNG and JPEG; the same arguments draw the same."""
    for label in labels:
        (root / label).mkdir(parents=True, exist_ok=True)
        for seed in range(count):
            path = root / label / f"{seed:03d}{'.jpg' if seed % 2 else '.png'}"
            assert cv2.imwrite(str(path), draw_shape(label, seed, width, height))
    return root


if __name__ == "__main__":
    draw_folder(Path(sys.argv[1]), count=100, labels=("circle", "square", "triangle"))
