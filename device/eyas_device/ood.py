"""Out-of-distribution (OOD) detection: distance from the training images, calibrated on the validation images.

A classifier labels any image, also one of a wall. Each bundle therefore carries a reference: the mean and the principal
directions of a descriptor of the prepared training images, and the distances of the validation images from it. The
descriptor depends on the pixels alone (layout, edges, sharpness), so it is the same for every runtime and precision. It
costs well under a millisecond.

Source: the distance is Mahalanobis' within the principal subspace plus the residual outside of it, as in Moghaddam &
Pentland, "Probabilistic Visual Learning for Object Representation", 1997.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable

import cv2
import msgspec
import numpy as np

from eyas_device.bundle import Bundle, Floats, Reference
from eyas_device.preprocess import Pixels, prepare

_HISTORY = 30
_MIN_IMAGES = 5
OOD_THRESHOLD = 0.95
"""A camera is out of distribution if the median of its last images is farther away than this fraction of the validation
images. False alarms: hardly ever where the scene changes, one camera in twenty where it never does."""


def describe(image: Pixels) -> Floats:
    """The descriptor of a prepared image, uint8 [size, size, 3]: float32 [324].

    A thumbnail of 8 x 8 colours, 8 edge directions in 4 x 4 cells, and brightness, contrast and sharpness.
    """
    thumbnail = cv2.resize(image, (8, 8), interpolation=cv2.INTER_AREA).astype(np.float32).ravel() / 255.0
    grey = cv2.resize(cv2.cvtColor(image, cv2.COLOR_BGR2GRAY), (64, 64), interpolation=cv2.INTER_AREA)
    light = grey.astype(np.float32) / 255.0
    across, down = cv2.Sobel(light, cv2.CV_32F, 1, 0), cv2.Sobel(light, cv2.CV_32F, 0, 1)
    strength = np.hypot(across, down)
    direction = np.minimum((np.arctan2(down, across) % math.pi) * (8 / math.pi), 7.999).astype(np.int64)
    cell = np.arange(64) // 16
    bins = (cell[:, None] * 4 + cell[None, :]) * 8 + direction
    edges = np.bincount(bins.ravel(), weights=strength.ravel(), minlength=128) / 256.0
    fine = cv2.Laplacian(cv2.cvtColor(image, cv2.COLOR_BGR2GRAY), cv2.CV_32F)
    overall = [light.mean(), light.std(), math.log(1e-3 + strength.mean()), math.log(1.0 + np.abs(fine).mean())]
    return np.concatenate([thumbnail, np.sqrt(edges), overall]).astype(np.float32)


def distance(descriptor: Floats, reference: Reference) -> float:
    """Distance of an image from the mean of the training images, in units of their own spread."""
    centred = (descriptor - reference.mean) / reference.scale
    along = reference.components @ centred
    outside = centred - reference.components.T @ along
    inside = float(np.square(along / reference.spread).sum())
    return math.sqrt((inside + float(np.square(outside).sum()) / reference.residual) / (len(reference.spread) + 1))


def ood_quantile(value: float, reference: Reference) -> float:
    """Fraction of the validation images that are nearer to the training images than `value`, 0..1."""
    return float(np.searchsorted(reference.distances, value, side="left") / len(reference.distances))


class Judgement(msgspec.Struct, frozen=True):
    """Verdict on the last images of a camera."""

    images: int
    ood_quantile: float
    """Fraction of the validation images that are nearer to the training images than this camera's median, 0..1."""

    @property
    def enough(self) -> bool:
        """Whether there were enough images for a verdict."""
        return self.images >= _MIN_IMAGES

    @property
    def ood(self) -> bool:
        """Whether the camera is out of distribution: it does not see what the model was trained on."""
        return self.enough and self.ood_quantile > OOD_THRESHOLD

    def __str__(self) -> str:
        if not self.enough:
            return f"not judged yet: {self.images} of {_MIN_IMAGES} images"
        if not self.ood:
            return f"in distribution: farther away than {self.ood_quantile:.0%} of the validation images"
        return (
            "out of distribution: this camera does not see what the model was trained on (check view, light and focus)"
        )


class OodJudge:
    """Measures frames against a bundle's reference and judges the last thirty."""

    def __init__(self, bundle: Bundle | None = None) -> None:
        self.on_descriptor: list[Callable[[Floats], None]] = []
        """Called with the descriptor of each frame that was measured."""
        self._reference: Reference | None = None
        self._distances: deque[float] = deque(maxlen=_HISTORY)
        if bundle is not None:
            self.use_reference(bundle)

    def measure(self, frame: Pixels) -> None:
        """Measure one frame, uint8 [h, w, 3] BGR."""
        if self._reference is None:
            return
        described = describe(prepare(frame, self._spec))
        self._distances.append(distance(described, self._reference))
        for callback in self.on_descriptor:
            callback(described)

    def judgement(self) -> Judgement | None:
        """Verdict on the last images; None if the bundle has no reference."""
        reference, measured = self._reference, list(self._distances)  # another thread may set them
        if reference is None:
            return None
        quantile = ood_quantile(float(np.median(measured)), reference) if measured else 0.0
        return Judgement(images=len(measured), ood_quantile=quantile)

    def use_reference(self, bundle: Bundle) -> None:
        """Compare with this bundle's reference from now on."""
        self._reference = bundle.reference()
        self._spec = bundle.manifest.preprocessing
        self._distances = deque(maxlen=_HISTORY)
