"""Class folders for tests: drawn grey silhouettes of clothes, 28 x 28 pixels on black, as in Fashion-MNIST."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt

GARMENTS = ("ankle-boot", "bag", "coat", "dress", "pullover", "sandal", "shirt", "sneaker", "t-shirt", "trouser")
_SIDE, _FINE = 28, 8
"""Side of an image in pixels, and how much finer it is drawn."""
_BODY = ((-6, -9), (6, -9), (6, 9), (-6, 9))
_SHOE = ((-11, 5), (-11, -1), (-3, -1), (2, 2), (11, 3), (11, 5))
_OUTLINES: dict[str, tuple[tuple[tuple[float, float], ...], ...]] = {
    "ankle-boot": (((-9, 9), (-9, -9), (-1, -9), (0, 3), (10, 5), (10, 9)),),
    "bag": (((-10, -2), (10, -2), (10, 9), (-10, 9)), ((-5, -8), (5, -8), (5, -6), (-5, -6)), ((-6, -8), (-4, -2))),
    "coat": (((-6, -10), (-1, -10), (-1, 10), (-6, 10)), ((1, -10), (6, -10), (6, 10), (1, 10)), ((-11, 8), (-7, -9))),
    "dress": (((-3, -11), (3, -11), (2, -3), (7, 11), (-7, 11), (-2, -3)),),
    "pullover": (_BODY, ((-11, 7), (-8, 7), (-6, -8), (-8, -9)), ((11, 7), (8, 7), (6, -8), (8, -9))),
    "sandal": (((-11, 4), (11, 4), (11, 6), (-11, 6)), ((-8, 4), (-1, -3), (1, -3), (-6, 4)), ((4, 4), (8, 0), (9, 4))),
    "shirt": (_BODY, ((-10, 1), (-7, 2), (-5, -8), (-7, -9)), ((10, 1), (7, 2), (5, -8), (7, -9)), ((-2, -9), (2, -9))),
    "sneaker": (_SHOE,),
    "t-shirt": (_BODY, ((-11, -5), (-6, -2), (-5, -9)), ((11, -5), (6, -2), (5, -9))),
    "trouser": (((-5, -11), (5, -11), (5, 11), (1, 11), (0, -4), (-1, 11), (-5, 11)),),
}
"""Garment -> polygons around the image's centre, pixels."""

Pixels = npt.NDArray[np.uint8]


def draw_garment(label: str, seed: int) -> Pixels:
    """A garment of its own width, height, angle and cloth, uint8 [28, 28] grey on black."""
    rng = np.random.default_rng((GARMENTS.index(label), seed))
    scale, angle = rng.uniform(0.7, 1.15, 2), np.radians(rng.uniform(-15, 15))
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    centre, size = _SIDE / 2 + rng.uniform(-2.5, 2.5, 2), _SIDE * _FINE
    canvas = np.zeros((size, size), np.uint8)
    for polygon in _OUTLINES[label]:
        corners = (np.array(polygon) + rng.uniform(-1.8, 1.8, (len(polygon), 2))) * scale @ turn.T + centre
        points = (corners * _FINE).astype(np.int32)
        cv2.fillPoly(canvas, [points], 255)
        cv2.polylines(canvas, [points], isClosed=True, color=255, thickness=_FINE)
    shape = cv2.resize(canvas, (_SIDE, _SIDE), interpolation=cv2.INTER_AREA) / 255
    rows = np.arange(_SIDE)[:, None]
    cloth = rng.uniform(50, 230) + rng.uniform(0, 30) * np.sin(rows * rng.uniform(0.3, 2.0) + rng.uniform(0, 6))
    return np.clip(shape * (cloth + rng.normal(0, 25, shape.shape)), 0, 255).astype(np.uint8)


def draw_garments(root: Path, *, count: int = 60) -> Path:
    """Fill `root` with a folder of `count` PNG images for each garment; the same arguments draw the same."""
    for label in GARMENTS:
        (root / label).mkdir(parents=True, exist_ok=True)
        for seed in range(count):
            assert cv2.imwrite(str(root / label / f"{seed:03d}.png"), draw_garment(label, seed))
    return root
