"""Golden images of a bundle, and the predictions that are recorded for them.

A golden image has to go through everything a frame goes through: decoding, cropping, resizing, inference. It is stored
as a JPEG file little larger than the model's input, so that a device with little memory checks it in passing and no
customer's image lies on every camera at full resolution.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import cv2
import msgspec
import numpy as np
import numpy.typing as npt

from eyas_device.bundle import Manifest, PredictionSettings
from eyas_device.predict import labels_of
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


def write_golden(
    path: Path, images: Sequence[bytes], probabilities: Mapping[str, npt.NDArray[np.floating]], manifest: Manifest
) -> None:
    """Write `golden.npz`: encoded images, and for every artefact what it gives for them.

    Args:
        path: The file.
        images: Encoded images.
        probabilities: Artefact -> calibrated probabilities [n, classes].
        manifest: The bundle's manifest, complete but for its `golden`; its settings are recorded too.

    """
    arrays: dict[str, npt.NDArray[np.generic]] = {
        f"image_{number:02d}": np.frombuffer(image, dtype=np.uint8) for number, image in enumerate(images)
    }
    settings = msgspec.json.encode(PredictionSettings.of(manifest))
    arrays["settings"] = np.frombuffer(settings, dtype=np.uint8)
    for name, values in probabilities.items():
        recorded = np.asarray(values, dtype=np.float32)
        labels, uncertain = labels_of(recorded, manifest)
        arrays[f"p.{name}"] = recorded
        arrays[f"label.{name}"] = np.asarray(labels, dtype=np.str_)
        arrays[f"uncertain.{name}"] = np.asarray(uncertain, dtype=np.bool_)
    with path.open("wb") as stream:
        np.savez_compressed(stream, **arrays)  # type: ignore[arg-type]
