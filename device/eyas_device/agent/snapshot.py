"""Snapshots on disk of what the camera and the model see, for the installation on site and for labelling.

<time>-frame.jpg     the frame as the camera delivered it (.png if it delivered pixels); with `rotate`, `flip` or
                     `region` of the configuration, what they give, as .png
<time>-input.png     exactly the pixels that went into the model
<time>.json          the prediction, the model, and the image's OOD quantile
"""

from __future__ import annotations

from datetime import datetime, timezone
from pathlib import Path

import cv2
import msgspec
import numpy as np

from eyas_device.camera import Frame
from eyas_device.errors import EyasError
from eyas_device.ood import describe, distance, ood_quantile
from eyas_device.predict import Classifier
from eyas_device.preprocess import Pixels, prepare
from eyas_device.support.files import atomic_write
from eyas_device.support.redact import redact

_MODE = 0o600
"""Images are private: others on the device may not read them."""
_ENDINGS = {b"\xff\xd8": ".jpg", b"\x89P": ".png", b"BM": ".bmp", b"RI": ".webp", b"II": ".tif", b"MM": ".tif"}


class SnapshotError(EyasError, OSError):
    """A snapshot cannot be written."""


class Snapshot(msgspec.Struct, frozen=True):
    """A snapshot's files and the model's prediction."""

    frame: str
    """File name of the frame."""
    input: str
    """File name of the model's input."""
    source: str
    time: float
    """Time of the capture, seconds since 1970."""
    size: tuple[int, int]
    """Width and height of the decoded frame, pixels."""
    model: str
    """Name, version, artefact and runtime."""
    label: str
    confidence: float
    uncertain: bool
    probabilities: dict[str, float]
    ood_quantile: float | None
    """Fraction of the validation images that are nearer to the training images than this one, 0..1."""


def take(frame: Frame, classifier: Classifier, folder: Path) -> Snapshot:
    """Write a snapshot into `folder`, which is created if missing; each file is written atomically, for its owner only.

    Raises `ImageError` for a frame that cannot be decoded and `SnapshotError` if a file cannot be written.
    """
    spec, manifest = classifier.spec, classifier.bundle.manifest
    pixels = frame.pixels(spec)
    model_input = prepare(pixels, spec)
    prediction = classifier.predict(pixels)
    reference = classifier.bundle.reference()
    stem = datetime.fromtimestamp(frame.time, timezone.utc).strftime("%Y%m%dT%H%M%S.%fZ")
    image = frame.image if frame.view is None else frame.pixels(spec.at_full_scale())
    encoded = image if isinstance(image, bytes) else _png(image)
    snapshot = Snapshot(
        frame=f"{stem}-frame{_ENDINGS.get(encoded[:2], '.bin')}",
        input=f"{stem}-input.png",
        source=redact(frame.source),
        time=frame.time,
        size=(pixels.shape[1], pixels.shape[0]),
        model=str(classifier),
        label=prediction.label,
        confidence=round(prediction.confidence, 4),
        uncertain=prediction.uncertain,
        probabilities={
            label: round(float(p), 4) for label, p in zip(manifest.labels, prediction.probabilities, strict=True)
        },
        ood_quantile=None
        if reference is None
        else round(ood_quantile(distance(describe(model_input), reference), reference), 3),
    )
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        description = msgspec.json.format(msgspec.json.encode(snapshot)) + b"\n"
        for name, data in (
            (snapshot.frame, encoded),
            (snapshot.input, _png(model_input)),
            (f"{stem}.json", description),
        ):
            atomic_write(folder / name, data, mode=_MODE)
    except OSError as error:
        raise SnapshotError(
            f"{folder}: a snapshot cannot be written ({error.strerror}); check free space and permissions"
        ) from None
    return snapshot


def _png(pixels: Pixels) -> bytes:
    return bytes(np.asarray(cv2.imencode(".png", pixels)[1]).tobytes())
