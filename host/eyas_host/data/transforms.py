"""Views: augmented images as the camera would deliver them, made once and used again.

A view is geometry on the full image (flips, turns, rotation, crop), then the device's own `prepare`, then light
(brightness, contrast, RandAugment): what the model trains on went through the same resampling as what it will see.
"""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Iterable, Sequence

import cv2
import numpy as np
import numpy.typing as npt
import torch
from torchvision.transforms import v2

from eyas_device.preprocess import Pixels, Preprocessing, prepare
from eyas_host.recipe.augment import AugmentSection
from eyas_host.recipe.augment_rules import without_forbidden
from eyas_host.support.errors import DataError

Batch = npt.NDArray[np.uint8]
"""Prepared images: uint8 [n, size, size, 3], blue-green-red."""

LIGHT_STEPS = {
    "brightness": "Brightness",
    "contrast": "Contrast",
    "saturation": "Color",
    "sharpness": "Sharpness",
    "posterize": "Posterize",
    "solarize": "Solarize",
    "autocontrast": "AutoContrast",
    "equalize": "Equalize",
}
"""Our names of RandAugment's steps -> torchvision's."""


IN_MEMORY = 1 << 30
"""Bytes of prepared images from which on they lie in a file, whose pages the system takes back when it must."""


def prepared(pixels: Iterable[Pixels], spec: Preprocessing) -> Batch:
    """Images as the device prepares them, without augmentation; many of them in a file without a name (`TMPDIR`).

    Raises `DataError` if there is no room for that file.
    """
    if not isinstance(pixels, Sequence):
        pixels = list(pixels)
    batch = _room((len(pixels), spec.size, spec.size, 3))
    for place, image in enumerate(pixels):
        batch[place] = prepare(image, spec)
    return batch


def _room(shape: tuple[int, ...]) -> Batch:
    size = math.prod(shape)
    if size <= IN_MEMORY:
        return np.empty(shape, dtype=np.uint8)
    folder = os.environ.get("TMPDIR", "/var/tmp")
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            os.posix_fallocate(file.fileno(), 0, size)  # a hole that finds no room later would kill the process
            return np.memmap(file, dtype=np.uint8, mode="r+", shape=shape)
    except OSError as error:
        raise DataError(
            f"{folder}: {size / 1e9:,.3g} GB for prepared images cannot be written ({error.strerror}); free some "
            "room or set TMPDIR to a folder that has it"
        ) from None


class Augmenter:
    """Draws views of images; the same seed draws the same views."""

    def __init__(self, settings: AugmentSection, spec: Preprocessing) -> None:
        self.settings = without_forbidden(settings)
        self.spec = spec

    def strength(self, epoch: int) -> float:
        """How strong epoch number `epoch` (from 0) is augmented, 0..1: it rises over the `warm_up` epochs."""
        return min(1.0, (epoch + 1) / (self.settings.warm_up + 1))

    def view(self, image: Pixels, rng: np.random.Generator, strength: float = 1.0) -> Pixels:
        """One view, uint8 [size, size, 3]."""
        settings = self.settings
        if settings.quarter_turns:
            image = np.rot90(image, int(rng.integers(4)))
        if settings.horizontal_flip and rng.random() < 0.5:
            image = image[:, ::-1]
        if settings.vertical_flip and rng.random() < 0.5:
            image = image[::-1]
        image = self._crop(self._rotate(np.ascontiguousarray(image), rng, strength), rng, strength)
        seen = prepare(np.ascontiguousarray(image), self.spec)
        tensor = torch.from_numpy(seen).permute(2, 0, 1)
        with torch.random.fork_rng(devices=[]):  # torchvision knows no other random state than torch's own
            torch.manual_seed(int(rng.integers(2**31)))
            light = v2.ColorJitter(brightness=settings.brightness * strength, contrast=settings.contrast * strength)
            tensor = light(tensor)
            if settings.randaugment:
                steps = light_steps(settings.randaugment, round(settings.magnitude * strength), settings.forbid)
                tensor = steps(tensor.flip(0)).flip(0)  # red-green-blue in between
        return np.ascontiguousarray(tensor.permute(1, 2, 0).numpy())

    def views(
        self,
        images: Sequence[Pixels],
        seed: Sequence[int],
        rows: Iterable[int] | None = None,
        *,
        strength: float = 1.0,
        mixed: bool = True,
    ) -> Batch:
        """One view of each image, or of those at `rows`, uint8 [rows, size, size, 3].

        A view follows from (`seed`, row) alone, whatever is drawn before or beside it. Some are mixed with the view of
        another image (CutMix, then mixup) unless `mixed` is off, as it must be where nobody answers for the mix:
        training on the labels of the images.
        """
        wanted = range(len(images)) if rows is None else [int(row) for row in rows]
        batch = np.empty((len(wanted), self.spec.size, self.spec.size, 3), dtype=np.uint8)
        for place, row in enumerate(wanted):
            batch[place] = self._drawn(images, seed, row, strength, mixed)
        return batch

    def _drawn(self, images: Sequence[Pixels], seed: Sequence[int], row: int, strength: float, mixed: bool) -> Pixels:
        rng = np.random.default_rng((*seed, row))
        view = self.view(images[row], rng, strength)
        if mixed and rng.random() < self.settings.cutmix:
            top, left, height, width = _box(self.spec.size, rng)
            other = self._drawn(images, seed, int(rng.integers(len(images))), strength, mixed=False)
            view[top : top + height, left : left + width] = other[top : top + height, left : left + width]
        if mixed and rng.random() < self.settings.mixup:
            share = float(rng.uniform())  # Beta(1, 1): Zhang et al., "mixup", 2018; the teacher answers for any
            other = self._drawn(images, seed, int(rng.integers(len(images))), strength, mixed=False)
            view = np.rint(share * view.astype(np.float32) + (1 - share) * other).astype(np.uint8)
        return view

    def _rotate(self, image: Pixels, rng: np.random.Generator, strength: float) -> Pixels:
        if not self.settings.rotate_degrees:
            return image
        height, width = image.shape[:2]
        angle = float(rng.uniform(-1, 1)) * self.settings.rotate_degrees * strength
        matrix = cv2.getRotationMatrix2D(((width - 1) / 2, (height - 1) / 2), angle, 1.0)
        turned = cv2.warpAffine(image, matrix, (width, height), borderMode=cv2.BORDER_REFLECT_101)
        return np.asarray(turned, dtype=np.uint8)

    def _crop(self, image: Pixels, rng: np.random.Generator, strength: float) -> Pixels:
        smallest = self.settings.crop_scale + (1.0 - self.settings.crop_scale) * (1.0 - strength)
        scale = float(rng.uniform(smallest, 1.0)) ** 0.5
        height, width = image.shape[:2]
        keep_h, keep_w = max(1, round(height * scale)), max(1, round(width * scale))
        top = int(rng.integers(height - keep_h + 1))
        left = int(rng.integers(width - keep_w + 1))
        return image[top : top + keep_h, left : left + keep_w]


def light_steps(steps: int, magnitude: int, forbid: Sequence[str] = ()) -> v2.RandAugment:
    """RandAugment (Cubuk et al., 2020) of light, colour and sharpness alone, without what is forbidden.

    Geometry is left to the settings that allow it by name: a shear or a shift is not what every camera could see.
    """
    names = {"Identity"} | {step for name, step in LIGHT_STEPS.items() if name not in forbid}
    augment = v2.RandAugment(num_ops=steps, magnitude=magnitude)
    augment._AUGMENTATION_SPACE = {name: how for name, how in augment._AUGMENTATION_SPACE.items() if name in names}
    return augment


def _box(size: int, rng: np.random.Generator) -> tuple[int, int, int, int]:
    """Top, left, height and width of a pasted patch; its area is uniform (Yun et al., "CutMix", 2019)."""
    side = float(rng.uniform()) ** 0.5
    height = width = max(1, round(size * side))
    return int(rng.integers(size - height + 1)), int(rng.integers(size - width + 1)), height, width
