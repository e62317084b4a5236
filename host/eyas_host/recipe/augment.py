"""`[augment]`: augmentation of training images."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta

from eyas_device.support.toml import Section
from eyas_host.recipe.types import Count, Fraction, Rate

Augmentation = Literal[
    "horizontal_flip",
    "vertical_flip",
    "quarter_turns",
    "rotate_degrees",
    "crop_scale",
    "brightness",
    "contrast",
    "randaugment",
    "saturation",
    "sharpness",
    "posterize",
    "solarize",
    "autocontrast",
    "equalize",
    "cutmix",
    "mixup",
]


class AugmentSection(Section, frozen=True):
    """`[augment]`: augmentation of training images; only variations that the real camera could see."""

    forbid: tuple[Augmentation, ...] = ()
    """Augmentations that the domain rules out, e.g. ["horizontal_flip"] for text and chest X-rays: never applied,
    whatever else is set; RandAugment's operations too, by name."""
    horizontal_flip: bool = True
    """Mirror left and right at random."""
    vertical_flip: bool = False
    """Mirror top and bottom at random."""
    quarter_turns: bool = False
    """Rotations by 90, 180 and 270 degrees."""
    rotate_degrees: Annotated[float, Meta(ge=0.0, le=180.0)] = 5.0
    """Largest random rotation to either side, degrees."""
    crop_scale: Rate = 0.7
    """Smallest fraction of the image's area that a random crop keeps."""
    brightness: Fraction = 0.6
    """Largest random change of brightness, as a fraction: 0.6 covers factors from 0.4 to 1.6, as lamps and exposure
    make them."""
    contrast: Fraction = 0.3
    """Largest random change of contrast, as a fraction."""
    randaugment: Annotated[int, Meta(ge=0, le=8)] = 0
    """RandAugment operations per view, photometric ones only: geometry is set by the keys above."""
    magnitude: Annotated[int, Meta(ge=0, le=30)] = 9
    """RandAugment's magnitude, 0 to 30."""
    cutmix: Fraction = 0.0
    """Fraction of the distillation views that get a patch of another image; the teacher labels the mix."""
    mixup: Fraction = 0.0
    """Fraction of the distillation views that are blended with another image; the teacher labels the mix."""
    warm_up: Count = 0
    """Teacher epochs over which rotation, crop, brightness, contrast and RandAugment ramp up (0: full strength at
    once)."""
