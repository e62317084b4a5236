"""`[image]`: size and preprocessing."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta

from eyas_device.preprocess import Preprocessing
from eyas_device.support.toml import Section
from eyas_host.recipe.cost import CostSection as CostSection
from eyas_host.recipe.training import StudentSection as StudentSection
from eyas_host.recipe.training import TeacherSection as TeacherSection
from eyas_host.recipe.tune import TuneSection as TuneSection
from eyas_host.recipe.types import Rate


class ImageSection(Section, frozen=True):
    """`[image]`: what the model sees; becomes the bundle's preprocessing."""

    size: Annotated[int, Meta(ge=32, le=1024)] = 128
    """Side of the square input, pixels."""
    fit: Literal["crop", "stretch", "pad"] = "crop"
    interpolation: Literal["area", "linear"] = "area"
    crop_fraction: Rate = 1.0
    decode: Literal["full", "reduced"] = "full"
    """`reduced` decodes JPEGs at 1/2, 1/4 or 1/8 of their scale where that covers the size, here and on the device."""

    def preprocessing(self) -> Preprocessing:
        """The same settings as the device's contract."""
        return Preprocessing(
            size=self.size,
            fit=self.fit,
            interpolation=self.interpolation,
            crop_fraction=self.crop_fraction,
            decode=self.decode,
        )
