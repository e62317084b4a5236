"""Image sets and streams of a camera for the OOD benchmark: solar cells by a bundle, textures by a quick head."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import numpy.typing as npt
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from eyas_device.bundle import Bundle
from eyas_device.predict import Classifier
from eyas_device.preprocess import Pixels, Preprocessing, prepare
from eyas_host.bundle.reference import Groups, sub_populations
from eyas_host.data.split import Split
from eyas_host.evaluation.inference import to_tensor
from eyas_host.models.factory import build

Floats = npt.NDArray[np.floating[Any]]
_SIDE = 40
_TEXTURES = ("brick", "grass", "gravel", "immunohistochemistry", "hubble_deep_field", "retina")
_OTHERS = ("camera", "astronaut", "coffee", "chelsea", "coins", "moon", "rocket", "page")


class ImageSet(NamedTuple):
    """Images of a model's own kind, and the model."""

    name: str
    spec: Preprocessing
    train: Sequence[Pixels]
    validation: Sequence[Pixels]
    test: Sequence[Pixels]
    targets: npt.NDArray[np.int64]
    """Label number of each test image."""
    kinds: tuple[str, ...]
    """Sub-population of each test image."""
    groups: tuple[Groups, Groups]
    labels: npt.NDArray[np.int64]
    """Label number of each training image."""
    predict: Callable[[Sequence[Pixels]], Floats]
    """Calibrated probabilities, float [n, classes]."""


def solar_cells(run: Path, limit: int) -> ImageSet:
    """The demonstration, by the packed model; every so many of the test images."""
    bundle = Bundle.open(run / "bundle")
    spec = bundle.manifest.preprocessing
    split = Split.load(run, spec)
    test = split.open_test("benchmarks/ood.py", early=True)
    rows = list(range(0, len(test), max(1, len(test) // limit)))
    classifier = Classifier.load(bundle)

    def predict(images: Sequence[Pixels]) -> Floats:
        return np.stack([classifier.predict(image).probabilities for image in images])

    kinds = sub_populations(test.images)[0]
    return ImageSet(
        "solar_cells",
        spec,
        split.train.pixels,
        split.validation.pixels,
        [np.array(test.pixels[row]) for row in rows],
        test.targets[rows],
        tuple(kinds[row] for row in rows),
        (sub_populations(split.train.images), sub_populations(split.validation.images)),
        split.train.targets,
        predict,
    )


def textures(limit: int) -> ImageSet:
    """Patches of six images that scikit-image ships, by logistic regression on the pretrained student's features."""
    generator = np.random.default_rng(0)
    parts: dict[str, list[tuple[Pixels, int]]] = {"train": [], "validation": [], "test": []}
    for label, name in enumerate(_TEXTURES):
        image = _photograph(name)
        corners = [
            (y, x)
            for y in range(0, image.shape[0] - _SIDE + 1, _SIDE)
            for x in range(0, image.shape[1] - _SIDE + 1, _SIDE)
        ]
        chosen = generator.permutation(len(corners))[:144]
        for number, row in enumerate(chosen.tolist()):
            y, x = corners[row]
            part = ("train", "train", "validation", "test")[number % 4]
            parts[part].append((image[y : y + _SIDE, x : x + _SIDE].copy(), label))
    spec = Preprocessing(size=128)
    network = build("mobilenetv3_small_100", len(_TEXTURES), "pretrained")[0].eval()

    @torch.inference_mode()
    def features(images: Sequence[Pixels]) -> Floats:
        pixels = np.stack([prepare(image, spec) for image in images])
        batches = (pixels[first : first + 64] for first in range(0, len(pixels), 64))
        return np.concatenate([network.pooled(to_tensor(batch, torch.device("cpu"))).numpy() for batch in batches])

    train, validation, test = ([image for image, _ in parts[name]] for name in parts)
    labels = {name: [label for _, label in rows] for name, rows in parts.items()}
    head = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=2000))
    head.fit(features(train), labels["train"])
    names = {name: [_TEXTURES[label] for label in rows] for name, rows in labels.items()}
    return ImageSet(
        "textures",
        spec,
        train,
        validation,
        test[:: max(1, len(test) // limit)],
        np.array(labels["test"][:: max(1, len(test) // limit)]),
        tuple(names["test"][:: max(1, len(test) // limit)]),
        ((names["train"],), (names["validation"],)),
        np.array(labels["train"]),
        lambda images: np.asarray(head.predict_proba(features(images))),
    )


def other_photographs(count: int) -> list[Pixels]:
    """Square crops, of half the shorter side, of photographs that scikit-image ships; none is in the textures."""
    generator, crops = np.random.default_rng(1), []
    for number in range(count):
        image = _photograph(_OTHERS[number % len(_OTHERS)])
        side = min(image.shape[:2]) // 2
        y, x = (int(generator.integers(0, length - side + 1)) for length in image.shape[:2])
        crops.append(image[y : y + side, x : x + side].copy())
    return crops


def _photograph(name: str) -> Pixels:
    from skimage import data

    image = np.asarray(getattr(data, name)())
    if image.ndim == 2:
        return np.asarray(cv2.cvtColor(image, cv2.COLOR_GRAY2BGR))
    return np.ascontiguousarray(image[..., 2::-1])
