"""Does the camera see what the model was trained on? A distance from the training images, calibrated on validation.

A classifier answers any image, also one of a wall. Each bundle carries a reference: the mean and the principal
directions of a descriptor of the prepared training images, and how far the validation images lie from it. The
descriptor is made of the pixels alone (layout, edges, sharpness), so it is the same for every runtime and precision and
costs well under a millisecond, once a second.

Source: the distance is Mahalanobis' within the principal subspace plus the residual outside of it, as in Moghaddam &
Pentland, "Probabilistic Visual Learning for Object Representation", 1997.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from time import monotonic

import cv2
import msgspec
import numpy as np

from eyas_device.agent.loop import FramePrediction, Listener
from eyas_device.bundle import Bundle, Floats, Reference
from eyas_device.errors import ImageError
from eyas_device.predict import Classifier
from eyas_device.preprocess import Pixels, prepare

_EVERY_S = 1.0
_REMEMBERED = 30
_ENOUGH = 5
BEYOND = 0.95
"""A camera is unfamiliar if the median of its last images lies farther away than this part of validation: hardly ever
by chance where the scene changes, once in twenty where it never does."""


def describe(image: Pixels) -> Floats:
    """The descriptor of a prepared image, uint8 [size, size, 3]: float32 [324].

    A thumbnail of 8 x 8 colours, edge directions (8) in 4 x 4 fields, and brightness, contrast and sharpness.
    """
    thumbnail = cv2.resize(image, (8, 8), interpolation=cv2.INTER_AREA).astype(np.float32).ravel() / 255.0
    grey = cv2.resize(cv2.cvtColor(image, cv2.COLOR_BGR2GRAY), (64, 64), interpolation=cv2.INTER_AREA)
    light = grey.astype(np.float32) / 255.0
    across, down = cv2.Sobel(light, cv2.CV_32F, 1, 0), cv2.Sobel(light, cv2.CV_32F, 0, 1)
    strength = np.hypot(across, down)
    direction = np.minimum((np.arctan2(down, across) % math.pi) * (8 / math.pi), 7.999).astype(np.int64)
    field = np.arange(64) // 16
    place = (field[:, None] * 4 + field[None, :]) * 8 + direction
    edges = np.bincount(place.ravel(), weights=strength.ravel(), minlength=128) / 256.0
    fine = cv2.Laplacian(cv2.cvtColor(image, cv2.COLOR_BGR2GRAY), cv2.CV_32F)
    whole = [light.mean(), light.std(), math.log(1e-3 + strength.mean()), math.log(1.0 + np.abs(fine).mean())]
    return np.concatenate([thumbnail, np.sqrt(edges), whole]).astype(np.float32)


def distance(descriptor: Floats, reference: Reference) -> float:
    """How far an image lies from the training images, in units of their own spread; 0 is the middle."""
    centred = (descriptor - reference.mean) / reference.scale
    along = reference.components @ centred
    outside = centred - reference.components.T @ along
    inside = float(np.square(along / reference.spread).sum())
    return math.sqrt((inside + float(np.square(outside).sum()) / reference.residual) / (len(reference.spread) + 1))


def beyond(value: float, reference: Reference) -> float:
    """Part of the validation images that lie nearer than `value`, 0..1."""
    return float(np.searchsorted(reference.distances, value, side="left") / len(reference.distances))


class Judgement(msgspec.Struct, frozen=True):
    """What the last images of a camera said."""

    images: int
    beyond: float
    """Part of the validation images that lie nearer to the training images than this camera's median, 0..1."""

    @property
    def enough(self) -> bool:
        """Whether there were enough images to judge."""
        return self.images >= _ENOUGH

    @property
    def unfamiliar(self) -> bool:
        """Whether this camera does not see what the model was trained on."""
        return self.enough and self.beyond > BEYOND

    def __str__(self) -> str:
        if not self.enough:
            return f"not judged yet: {self.images} of {_ENOUGH} images"
        if not self.unfamiliar:
            return f"familiar: farther away than {self.beyond:.0%} of the validation images"
        return "unfamiliar: this camera does not see what the model was trained on (check view, light and focus)"


class OodDetector(Listener):
    """Looks at one answered frame a second and judges the last thirty."""

    def __init__(self, bundle: Bundle) -> None:
        self.told: list[Callable[[Floats], None]] = []
        """Each is called with the descriptor of a frame that was measured."""
        self._settle(bundle)
        self._due = 0.0

    def swapped(self, classifier: Classifier) -> None:
        """Judge by the new model's reference."""
        self._settle(classifier.bundle)

    def answered(self, answer: FramePrediction) -> None:
        """Measure the frame if a second has passed."""
        if self._reference is None or (now := monotonic()) < self._due:
            return
        self._due = now + _EVERY_S
        try:
            self.look(answer.frame.pixels(self._spec))
        except ImageError:
            return  # it was answered, so this cannot be; and it is no reason to stop

    def look(self, frame: Pixels) -> None:
        """Measure one frame, uint8 [h, w, 3] BGR."""
        if self._reference is None:
            return
        described = describe(prepare(frame, self._spec))
        self._distances.append(distance(described, self._reference))
        for tell in self.told:
            tell(described)

    def judgement(self) -> Judgement | None:
        """What the last images say; None if the bundle has no reference."""
        if self._reference is None:
            return None
        measured = list(self._distances)
        middle = beyond(float(np.median(measured)), self._reference) if measured else 0.0
        return Judgement(images=len(measured), beyond=middle)

    def _settle(self, bundle: Bundle) -> None:
        self._reference = bundle.reference()
        self._spec = bundle.manifest.preprocessing
        self._distances: deque[float] = deque(maxlen=_REMEMBERED)
