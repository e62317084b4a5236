"""What cameras of the demonstration see: pieces of real photographs, by day and night, before and after a change."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import numpy.typing as npt
import skimage.data

from eyas_device.bundle import Bundle
from eyas_device.ood import describe
from eyas_device.predict import Classifier, Prediction
from eyas_device.preprocess import prepare
from eyas_device.telemetry.aggregate import project

LABELS = ("brick", "grass", "gravel", "tissue", "retina", "stars")
_PHOTOGRAPHS = dict(
    zip(LABELS, ("brick", "grass", "gravel", "immunohistochemistry", "retina", "hubble_deep_field"), strict=True)
)
_SIDE, _SHOWN = 40, 96
PER_LABEL = 140
FOR_TRAINING = 84
_LEAST = 3.0
"""Standard deviation of a piece's grey levels, at least: the retina's black frame shows nothing."""
LIGHTS = (0.72, 0.86, 1.0, 1.08)
"""Brightness from night to noon, as the cameras have it on every day."""
SOFT, FLAT = 0.8, 0.225
"""Of a change of season: sigma of the blur, pixels; share of the contrast that is lost to white."""
STEPS = 4
"""Steps in which a change comes."""
Pixels = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.floating[Any]]


class Condition(NamedTuple):
    """How a scene is seen."""

    light: int
    """Index of `LIGHTS`."""
    season: int = 0
    """Fog of another season, 0..`STEPS`."""
    dirt: int = 0
    """Dirt on this camera's lens, 0..`STEPS`."""


@cache
def _photograph(name: str) -> Pixels:
    """As a monochrome camera has it: some of these photographs have no colour, and colour would tell them apart."""
    image: Pixels = getattr(skimage.data, name)()
    grey = image if image.ndim == 2 else cv2.cvtColor(np.ascontiguousarray(image[..., :3]), cv2.COLOR_RGB2GRAY)
    return np.dstack([grey] * 3)


@cache
def patches(label: str) -> tuple[Pixels, ...]:
    """Pieces of one photograph, without overlap, uint8 [96, 96, 3] BGR; always the same, in the same order."""
    image = _photograph(_PHOTOGRAPHS[label])
    rows, columns = (range(0, side - _SIDE + 1, _SIDE) for side in image.shape[:2])
    corners = [(y, x) for y in rows for x in columns if image[y : y + _SIDE, x : x + _SIDE].std() > _LEAST]
    chosen = np.random.default_rng(LABELS.index(label)).permutation(len(corners))[:PER_LABEL]
    found = []
    for row in chosen.tolist():
        y, x = corners[row]
        piece = image[y : y + _SIDE, x : x + _SIDE]
        found.append(np.asarray(cv2.resize(piece, (_SHOWN, _SHOWN), interpolation=cv2.INTER_CUBIC), np.uint8))
    return tuple(found)


def write_images(folder: Path, each: int = FOR_TRAINING) -> Path:
    """The data set of the first version: class folders, as the cameras saw them at any time of a usual day."""
    for label in LABELS:
        (folder / label).mkdir(parents=True, exist_ok=True)
        for number, image in enumerate(patches(label)[:each]):
            for light in (number % len(LIGHTS), (number + 2) % len(LIGHTS)):
                seen = show(image, Condition(light), seed=number + light)
                if not cv2.imwrite(str(folder / label / f"{number:03}-{light}.png"), seen):
                    raise OSError(f"{folder}: cannot be written")
    return folder


def scenes(each: int = PER_LABEL - FOR_TRAINING) -> tuple[tuple[str, int], ...]:
    """Label and number of `each` pieces of a label that no version was trained on before a camera sent one."""
    ends = {label: min(FOR_TRAINING + each, len(patches(label))) for label in LABELS}
    return tuple((label, number) for label, end in ends.items() for number in range(FOR_TRAINING, end))


def show(image: Pixels, condition: Condition, seed: int) -> Pixels:
    """A scene as a camera has it, uint8 [h, w, 3] BGR."""
    pixels = image.astype(np.float32)
    strength = condition.season / STEPS
    if strength:  # fog: soft, flat and bright
        pixels = np.asarray(cv2.GaussianBlur(pixels, (0, 0), 0.1 + SOFT * strength))
        pixels = pixels + strength * FLAT * (200 - pixels)
    if condition.dirt:
        rows, columns = np.mgrid[: pixels.shape[0], : pixels.shape[1]]
        far = np.hypot(rows - 0.62 * pixels.shape[0], columns - 0.4 * pixels.shape[1]) / pixels.shape[0]
        cover = (np.clip(1.3 - 2.2 * far, 0, 1) * 0.9 * condition.dirt / STEPS)[..., None].astype(np.float32)
        pixels = pixels * (1 - cover) + 58 * cover
    noise = np.random.default_rng(seed).normal(0, 3, pixels.shape).astype(np.float32)
    return np.asarray(np.clip(pixels * LIGHTS[condition.light] + noise, 0, 255), np.uint8)


class Seen(NamedTuple):
    """What a version makes of a scene."""

    prediction: Prediction
    projection: Floats | None
    """Of the image's descriptor on the version's reference."""


class Version:
    """A compiled bundle, and what it predicts; each scene in each condition is predicted once."""

    def __init__(self, folder: Path) -> None:
        self.bundle = Bundle.open(folder)
        self.name = f"{self.bundle.manifest.name} {self.bundle.manifest.version}"
        self.digest = self.bundle.identity[:12]
        self._classifier = Classifier.load(self.bundle, "litert")
        self._reference = self.bundle.reference()
        self._seen: dict[tuple[str, int, Condition], Seen] = {}

    @property
    def artefact(self) -> str:
        """What runs."""
        return self._classifier.artefact.name

    def see(self, label: str, number: int, condition: Condition) -> Seen:
        """Predict a scene."""
        key = (label, number, condition)
        if key not in self._seen:
            pixels = show(patches(label)[number], condition, seed=number)
            projection = None
            if self._reference is not None:
                described = describe(prepare(pixels, self.bundle.manifest.preprocessing))
                projection = project(described, self._reference)
            self._seen[key] = Seen(self._classifier.predict(pixels), projection)
        return self._seen[key]

    def accuracy(self, conditions: Sequence[Condition]) -> float:
        """Share of all scenes in some conditions that it labels rightly."""
        found = [
            self.see(label, number, condition).prediction.label == label
            for label, number in scenes()
            for condition in conditions
        ]
        return float(np.mean(found))
