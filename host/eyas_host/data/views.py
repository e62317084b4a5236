"""Views: augmented pictures as the camera would deliver them, made once and used again.

A view is geometry on the full picture (flips, turns, rotation, crop), then the device's own `prepare`, then light
(brightness, contrast): what the model trains on went through the same resampling as what it will see.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import cv2
import numpy as np
import numpy.typing as npt
import torch
from torchvision.transforms import v2

from eyas_device.preprocess import Pixels, Preprocessing, prepare
from eyas_host.recipe import AugmentSection

Batch = npt.NDArray[np.uint8]
"""Prepared pictures: uint8 [n, size, size, 3], blue-green-red."""


def prepared(pixels: Iterable[Pixels], spec: Preprocessing) -> Batch:
    """Pictures as the device prepares them, without augmentation."""
    return np.stack([prepare(picture, spec) for picture in pixels])


class Augmenter:
    """Draws views of pictures; the same seed draws the same views."""

    def __init__(self, settings: AugmentSection, spec: Preprocessing) -> None:
        self.settings = settings
        self.spec = spec
        self._light = v2.ColorJitter(brightness=settings.brightness, contrast=settings.contrast)

    def view(self, picture: Pixels, rng: np.random.Generator) -> Pixels:
        """One view, uint8 [size, size, 3]."""
        settings = self.settings
        if settings.quarter_turns:
            picture = np.rot90(picture, int(rng.integers(4)))
        if settings.horizontal_flip and rng.random() < 0.5:
            picture = picture[:, ::-1]
        if settings.vertical_flip and rng.random() < 0.5:
            picture = picture[::-1]
        picture = self._crop(self._rotate(np.ascontiguousarray(picture), rng), rng)
        seen = prepare(np.ascontiguousarray(picture), self.spec)
        torch.manual_seed(int(rng.integers(2**31)))
        tensor = torch.from_numpy(seen).permute(2, 0, 1)
        return np.ascontiguousarray(self._light(tensor).permute(1, 2, 0).numpy())

    def views(self, pictures: Sequence[Pixels], seed: Sequence[int]) -> Batch:
        """One view of each picture, uint8 [pictures, size, size, 3], some of them mixed (CutMix)."""
        rng = np.random.default_rng(seed)
        batch = np.stack([self.view(picture, rng) for picture in pictures])
        mixed = np.flatnonzero(rng.random(len(batch)) < self.settings.cutmix)
        originals = batch.copy()
        for place in mixed:
            top, left, height, width = _box(self.spec.size, rng)
            other = originals[rng.integers(len(batch))]
            batch[place, top : top + height, left : left + width] = other[top : top + height, left : left + width]
        return batch

    def _rotate(self, picture: Pixels, rng: np.random.Generator) -> Pixels:
        if not self.settings.rotate_degrees:
            return picture
        height, width = picture.shape[:2]
        angle = float(rng.uniform(-1, 1)) * self.settings.rotate_degrees
        matrix = cv2.getRotationMatrix2D(((width - 1) / 2, (height - 1) / 2), angle, 1.0)
        turned = cv2.warpAffine(picture, matrix, (width, height), borderMode=cv2.BORDER_REFLECT_101)
        return np.asarray(turned, dtype=np.uint8)

    def _crop(self, picture: Pixels, rng: np.random.Generator) -> Pixels:
        scale = float(rng.uniform(self.settings.crop_scale, 1.0)) ** 0.5
        height, width = picture.shape[:2]
        keep_h, keep_w = max(1, round(height * scale)), max(1, round(width * scale))
        top = int(rng.integers(height - keep_h + 1))
        left = int(rng.integers(width - keep_w + 1))
        return picture[top : top + keep_h, left : left + keep_w]


def _box(size: int, rng: np.random.Generator) -> tuple[int, int, int, int]:
    """Top, left, height and width of a pasted patch; its area is uniform (Yun et al., "CutMix", 2019)."""
    side = float(rng.uniform()) ** 0.5
    height = width = max(1, round(size * side))
    return int(rng.integers(size - height + 1)), int(rng.integers(size - width + 1)), height, width
