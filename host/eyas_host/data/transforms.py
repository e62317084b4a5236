"""Augmented views of images, resampled as on the device.

A view is a rotated crop that is resampled once, as the device prepares an image (`data.geometry`), then flips, quarter
turns and photometric changes (brightness, contrast, RandAugment).
"""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torchvision.transforms import v2

from eyas_device.preprocess import Pixels, Preprocessing, prepare
from eyas_host.data.geometry import Crop, prepare_crop
from eyas_host.data.mixing import draw_mix, soft_labels
from eyas_host.recipe.augment import AugmentSection
from eyas_host.recipe.augment_rules import without_forbidden
from eyas_host.support.errors import DataError

Batch = npt.NDArray[np.uint8]
"""Prepared images: uint8 [n, size, size, 3], blue-green-red."""

PHOTOMETRIC_OPS = {
    "brightness": "Brightness",
    "contrast": "Contrast",
    "saturation": "Color",
    "sharpness": "Sharpness",
    "posterize": "Posterize",
    "solarize": "Solarize",
    "autocontrast": "AutoContrast",
    "equalize": "Equalize",
}
"""Recipe's name of a photometric RandAugment operation -> torchvision's."""


_MIN_FACTOR = 0.02
"""Darkest brightness or lowest contrast, as a factor."""

MAX_IN_MEMORY_BYTES = 1 << 30
"""Size above which prepared images are memory-mapped from a file, so that the system can evict their pages."""


def prepared(pixels: Sequence[Pixels], spec: Preprocessing) -> Batch:
    """Images as the device prepares them, without augmentation; many of them in an unnamed file in `TMPDIR`.

    `pixels` are taken one by one, so that one decoded image of a data set is in memory at a time. Raises `DataError` if
    there is no space for that file.
    """
    batch = _allocate((len(pixels), spec.size, spec.size, 3))
    for index, image in enumerate(pixels):
        batch[index] = prepare(image, spec)
    return batch


def _allocate(shape: tuple[int, ...]) -> Batch:
    size = math.prod(shape)
    if size <= MAX_IN_MEMORY_BYTES:
        return np.empty(shape, dtype=np.uint8)
    folder = os.environ.get("TMPDIR", "/var/tmp")
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            os.posix_fallocate(file.fileno(), 0, size)  # a write to a sparse file on a full disk would kill the process
            return np.memmap(file, dtype=np.uint8, mode="r+", shape=shape)
    except OSError as error:
        raise DataError(
            f"{folder}: {size / 1e9:,.3g} GB for prepared images cannot be written ({error.strerror}); free some "
            "space or set TMPDIR to a folder on another disk"
        ) from None


class Augmenter:
    """Draws random views of images; the same seed draws the same views."""

    def __init__(self, settings: AugmentSection, spec: Preprocessing) -> None:
        self.settings = without_forbidden(settings)
        self.spec = spec

    def strength(self, epoch: int) -> float:
        """Strength of the augmentation, 0..1, in epoch `epoch` (from 0); it ramps up over the `warm_up` epochs."""
        return min(1.0, (epoch + 1) / (self.settings.warm_up + 1))

    def view(self, image: Pixels, rng: np.random.Generator, strength: float = 1.0) -> Pixels:
        """One view, uint8 [size, size, 3]."""
        settings = self.settings
        turns = int(rng.integers(4)) if settings.quarter_turns else 0
        mirrored = settings.horizontal_flip and rng.random() < 0.5
        upside_down = settings.vertical_flip and rng.random() < 0.5
        resized = prepare_crop(image, self._draw_crop(image, rng, strength), self.spec)
        resized = np.rot90(resized, turns)[:: -1 if upside_down else 1, :: -1 if mirrored else 1]
        tensor = torch.from_numpy(np.ascontiguousarray(resized)).permute(2, 0, 1).flip(0)  # torchvision expects RGB
        tensor = v2.functional.adjust_brightness(tensor, _draw_factor(settings.brightness * strength, rng))
        tensor = v2.functional.adjust_contrast(tensor, _draw_factor(settings.contrast * strength, rng))
        if settings.randaugment:
            with torch.random.fork_rng(devices=[]):  # torchvision only draws from torch's global generator
                # the processor's alone: torch.manual_seed would restart dropout on a GPU with every view
                torch.default_generator.manual_seed(int(rng.integers(2**31)))
                augment = photometric_randaugment(
                    settings.randaugment, round(settings.magnitude * strength), settings.forbid
                )
                tensor = augment(tensor)
        return np.ascontiguousarray(tensor.flip(0).permute(1, 2, 0).numpy())

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

        A view depends only on (`seed`, row). Some views are mixed with a view of another image (CutMix, then mixup)
        unless `mixed` is off; `labels` are then those of the mixture.
        """
        wanted = range(len(images)) if rows is None else [int(row) for row in rows]
        batch = np.empty((len(wanted), self.spec.size, self.spec.size, 3), dtype=np.uint8)
        for index, row in enumerate(wanted):
            batch[index] = self._draw(images, seed, row, strength, mixed)
        return batch

    def _draw(self, images: Sequence[Pixels], seed: Sequence[int], row: int, strength: float, mixed: bool) -> Pixels:
        rng = np.random.default_rng((*seed, row))
        view = self.view(images[row], rng, strength)
        if not mixed:
            return view
        mix = draw_mix(self.settings, self.spec.size, seed, row, len(images))
        return mix.apply(view, lambda other: self._draw(images, seed, other, strength, mixed=False))

    def labels(
        self, targets: npt.NDArray[np.int64], classes: int, seed: Sequence[int], rows: Iterable[int]
    ) -> npt.NDArray[np.float32]:
        """Soft labels [rows, classes] of the mixed views at `rows` with the same seed; `targets` of all images."""
        return soft_labels(self.settings, self.spec.size, seed, rows, targets, classes)

    def _draw_crop(self, image: Pixels, rng: np.random.Generator, strength: float) -> Crop:
        degrees = 0.0
        if self.settings.rotate_degrees:
            degrees = float(rng.uniform(-1, 1)) * self.settings.rotate_degrees * strength
        smallest = self.settings.crop_scale + (1.0 - self.settings.crop_scale) * (1.0 - strength)
        scale = float(rng.uniform(smallest, 1.0)) ** 0.5
        height, width = image.shape[:2]
        keep_h, keep_w = max(1, round(height * scale)), max(1, round(width * scale))
        top = int(rng.integers(height - keep_h + 1))
        left = int(rng.integers(width - keep_w + 1))
        return Crop(top, left, keep_h, keep_w, degrees)


def _draw_factor(change: float, rng: np.random.Generator) -> float:
    """A factor from 1 - change to 1 + change whose logarithm is uniform.

    Uniform factors from 0.4 to 1.6 would be below 0.5 only once in twelve, these once in six.
    """
    low, high = math.log(max(1.0 - change, _MIN_FACTOR)), math.log(1.0 + change)
    return math.exp(low + (high - low) * float(rng.random()))


def photometric_randaugment(operations: int, magnitude: int, forbid: Sequence[str] = ()) -> v2.RandAugment:
    """RandAugment (Cubuk et al., 2020) with photometric operations only, without those in `forbid`.

    Geometry is left to the explicit settings: not every camera could see a shear or a translation.
    """
    names = {"Identity"} | {op for name, op in PHOTOMETRIC_OPS.items() if name not in forbid}
    augment = v2.RandAugment(num_ops=operations, magnitude=magnitude)
    augment._AUGMENTATION_SPACE = {name: op for name, op in augment._AUGMENTATION_SPACE.items() if name in names}
    return augment
