"""`[augment]`: random changes to training images."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta

from eyas_device.support.toml import Section
from eyas_host.recipe.cost import CostSection as CostSection
from eyas_host.recipe.training import StudentSection as StudentSection
from eyas_host.recipe.training import TeacherSection as TeacherSection
from eyas_host.recipe.tune import TuneSection as TuneSection
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
    """`[augment]`: how training images may be varied; only what the real camera could see."""

    forbid: tuple[Augmentation, ...] = ()
    """What the domain rules out, e.g. ["horizontal_flip"] for text and chest X-rays: never drawn, whatever else is
    set; also the steps of RandAugment by name."""
    horizontal_flip: bool = True
    vertical_flip: bool = False
    quarter_turns: bool = False
    """Rotations by 90, 180 and 270 degrees."""
    rotate_degrees: Annotated[float, Meta(ge=0.0, le=180.0)] = 5.0
    crop_scale: Rate = 0.7
    """Smallest part of the image's area that a random crop keeps."""
    brightness: Fraction = 0.2
    contrast: Fraction = 0.2
    randaugment: Annotated[int, Meta(ge=0, le=8)] = 0
    """Steps of RandAugment a view, of light, colour and sharpness alone: geometry is what is set above."""
    magnitude: Annotated[int, Meta(ge=0, le=30)] = 9
    """Strength of those steps, 0 to 30."""
    cutmix: Fraction = 0.0
    """Part of the distillation views in which a patch of another image is pasted; the teacher answers for the mix."""
    mixup: Fraction = 0.0
    """Part of the distillation views that are blended with another image; the teacher answers for the mix."""
    warm_up: Count = 0
    """Teacher epochs over which rotation, crop, light and RandAugment rise to full strength (0: full at once)."""
