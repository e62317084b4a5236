"""Cases whose right answer is known: rare classes, an easy set, a growing one, and cameras that look at one thing."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import cv2
import numpy as np
import torch
from torch import Tensor

from eyas_device.preprocess import Pixels
from eyas_host.data.duplicates import perceptual_hash
from eyas_host.data.file_info import FileInfo
from eyas_host.data.index import Index
from eyas_host.data.manifest import SplitManifest
from eyas_host.data.sources import LabelledImage
from eyas_host.data.split import split_index
from eyas_host.evaluation.calibration import fit_calibration
from eyas_host.recipe.data import DataSection
from eyas_host.recipe.types import LossName
from eyas_host.train.losses import balanced_class_weights, label_loss

_SIZE = 200, 160


def rare_class_gap(loss: LossName, *, common: int = 9_900, rare: int = 100, distance: float = 4.0) -> float:
    """Balanced accuracy below the best one, of a classifier trained with class weights and label smoothing .05.

    Both classes are normal, `distance` standard deviations apart; the training images are the distributions' quantiles,
    so that only the loss can be wrong. The best threshold lies in the middle.
    """
    normal = torch.distributions.Normal(torch.tensor(0.0, dtype=torch.float64), 1.0)
    sides = [normal.icdf((torch.arange(n, dtype=torch.float64) + 0.5) / n) for n in (common, rare)]
    x, labels = torch.cat([sides[0], sides[1] + distance]), torch.tensor([0] * common + [1] * rare)
    line = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    criterion = label_loss(loss, class_weights=balanced_class_weights(labels, 2), label_smoothing=0.05)
    optimizer = torch.optim.LBFGS([line], max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        value: Tensor = criterion(torch.stack([line[0] + line[1] * x, line[2] + line[3] * x], dim=1), labels)
        value.backward()
        return value

    optimizer.step(closure)
    threshold = ((line[0] - line[2]) / (line[3] - line[1])).detach()
    reached = (normal.cdf(threshold) + 1 - normal.cdf(threshold - distance)) / 2
    return float(normal.cdf(torch.tensor(distance / 2)) - reached)


def easy_temperature(images: int) -> float:
    """Calibration temperature of a network that is right on each of `images`, by a wide margin."""
    rng = np.random.default_rng(1)
    targets = rng.integers(2, size=images)
    logits = rng.normal(0, 0.4, (images, 2)) + 4 * np.eye(2)[targets]
    assert (logits.argmax(axis=1) == targets).all()
    return fit_calibration(logits, targets).temperature


def moved_test_images(count: int, more: int, *, every: int, seed: int) -> int:
    """Of `count` images, each `every`-th of the rare class: test images that change sides when `more` are added."""
    before, after = (_sides(split_index(_stream(total, every), DataSection(), seed)) for total in (count, count + more))
    return sum(side == "test" != after[sha] for sha, side in before.items())


def line_camera(count: int) -> Iterator[tuple[str, Pixels]]:
    """One part at one place, +-2 px, +-10 % light, noise; every second one has a scratch."""
    rng = np.random.default_rng(0)
    base = cv2.resize(rng.integers(0, 256, (8, 10, 3), dtype=np.uint8), _SIZE, interpolation=cv2.INTER_CUBIC)
    for number in range(count):
        shift = np.array([[1, 0, rng.uniform(-2, 2)], [0, 1, rng.uniform(-2, 2)]])
        frame = cv2.warpAffine(base, shift, _SIZE, borderMode=cv2.BORDER_REFLECT)
        if number % 2 == 0:
            x, y = rng.integers(20, 140, 2).tolist()
            cv2.line(frame, (x, y), (x + 20, y + int(rng.integers(-15, 15))), (250, 250, 250), 2)
        light = frame * rng.uniform(0.9, 1.1) + rng.normal(0, 6, frame.shape)
        yield ("ok" if number % 2 else "defective"), np.clip(light, 0, 255).astype(np.uint8)


def black_frames(count: int = 40) -> Iterator[tuple[str, Pixels]]:
    """One small bright object, round or square, on black."""
    rng = np.random.default_rng(1)
    for number in range(count):
        frame = np.zeros((_SIZE[1], _SIZE[0], 3), np.uint8)
        x, y = rng.integers(20, 140, 2).tolist()
        if number % 2:
            cv2.circle(frame, (x, y), 4, (255, 255, 255), -1)
        else:
            cv2.rectangle(frame, (x - 4, y - 4), (x + 4, y + 4), (255, 255, 255), -1)
        yield "ab"[number % 2], frame


def fraction_of_test(frames: Iterator[tuple[str, Pixels]]) -> float:
    """The fraction of images that the default split gives to the test set; raises if it refuses them."""
    manifest = split_index(_photographed(frames), DataSection(), 0)
    return len(manifest.test) / (len(manifest.train) + len(manifest.validation) + len(manifest.test))


def _stream(count: int, every: int) -> Index:
    """The first `count` images of one endless stream."""
    return Index(images=tuple(_image(n, "ab"[n % every == 0]) for n in range(count)), labels=("a", "b"))


def _image(number: int, label: str) -> LabelledImage:
    return LabelledImage(path=str(number), label=label, sha256=hashlib.sha256(str(number).encode()).hexdigest())


def _photographed(frames: Iterator[tuple[str, Pixels]]) -> Index:
    taken = list(frames)
    images = tuple(_image(number, label) for number, (label, _) in enumerate(taken))
    files = {
        image.sha256: FileInfo(*_SIZE, "colour", 8, perceptual_hash(frame))
        for image, (_, frame) in zip(images, taken, strict=True)
    }
    return Index(images=images, labels=tuple(sorted({image.label for image in images})), files=files)


def _sides(manifest: SplitManifest) -> dict[str, str]:
    return {i.sha256: side for side in ("train", "validation", "test") for i in getattr(manifest, side)}
