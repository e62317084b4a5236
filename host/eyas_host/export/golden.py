"""Golden images of a bundle, and their reference probabilities.

A golden image has to go through everything a frame goes through: decoding, cropping, resizing, inference. It is stored
as a JPEG file little larger than the model's input, so that a device with little memory checks it in passing and no
customer's image lies on every camera at full resolution.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt

from eyas_device.preprocess import Pixels, Preprocessing

MAX_BYTES = 4 << 20
"""Size of all decoded golden images together."""
_OVERSIZE = 1.5
"""Side of a golden image over that of the model's input, so that it is still resized."""
_JPEG_QUALITY = 95


def golden_rows(probabilities: npt.NDArray[np.floating], count: int) -> list[int]:
    """Rows spread evenly from low to high confidence; the least confident tenth is left out."""
    order = np.argsort(np.sort(probabilities, axis=1)[:, -1])
    ranks = np.linspace(len(order) // 10, len(order) - 1, min(count, len(order))).astype(int)
    return [int(order[rank]) for rank in dict.fromkeys(ranks)]


def golden_image(pixels: Pixels, spec: Preprocessing, count: int) -> bytes:
    """The JPEG file of one of `count` golden images: `pixels` shrunk to 1.5 x the model's input, or to its share.

    A smaller image stays as it is.
    """
    height, width = pixels.shape[:2]
    side = max(height, width) if spec.fit == "pad" else min(height, width)
    wanted = _OVERSIZE * spec.size / spec.crop_fraction
    scale = min(1.0, wanted / side, math.sqrt(MAX_BYTES / count / (3 * height * width)))
    if scale < 1.0:
        size = (max(1, int(width * scale)), max(1, int(height * scale)))
        pixels = np.asarray(cv2.resize(pixels, size, interpolation=cv2.INTER_AREA), dtype=np.uint8)
    return bytes(cv2.imencode(".jpg", pixels, [cv2.IMWRITE_JPEG_QUALITY, _JPEG_QUALITY])[1])


def write_golden(path: Path, images: Sequence[bytes], probabilities: Mapping[str, npt.NDArray[np.floating]]) -> None:
    """Write encoded images and every artefact's probabilities [n, classes] as `golden.npz`."""
    arrays: dict[str, npt.NDArray[np.generic]] = {
        f"image_{number:02d}": np.frombuffer(image, dtype=np.uint8) for number, image in enumerate(images)
    }
    arrays |= {f"p.{name}": np.asarray(p, dtype=np.float32) for name, p in probabilities.items()}
    with path.open("wb") as stream:
        np.savez_compressed(stream, **arrays)  # type: ignore[arg-type]
