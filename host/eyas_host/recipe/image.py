"""`[image]`: size and preprocessing."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta

from eyas_device.preprocess import Preprocessing
from eyas_device.support.toml import Section
from eyas_host.recipe.types import Rate


class ImageSection(Section, frozen=True):
    """`[image]`: the model's input; becomes the bundle's preprocessing."""

    size: Annotated[int, Meta(ge=32, le=1024)] = 128
    """Side of the square input, pixels."""
    fit: Literal["crop", "stretch", "pad"] = "crop"
    """`crop` cuts the longer side, `pad` adds grey, `stretch` ignores the aspect ratio."""
    interpolation: Literal["area", "linear"] = "area"
    """`area` averages when it shrinks an image; `linear` is cheaper on large frames."""
    crop_fraction: Rate = 1.0
    """Central fraction of the image that is kept before `fit`."""
    decode: Literal["full", "reduced"] = "full"
    """`reduced`: decode JPEGs at 1/2, 1/4 or 1/8 scale where that still covers `size`, on the host and the device."""
    bits: Literal[0, 9, 10, 11, 12, 13, 14, 15, 16] = 0
    """Bits that the values of 16-bit images use (12 for a camera of 12 bits); 0: all 16, and `split` checks that."""

    def preprocessing(self) -> Preprocessing:
        """The device's `Preprocessing` with these settings."""
        return Preprocessing(
            size=self.size,
            fit=self.fit,
            interpolation=self.interpolation,
            crop_fraction=self.crop_fraction,
            decode=self.decode,
            bits=self.bits or 16,
        )
