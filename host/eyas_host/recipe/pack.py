"""`[pack]`: contents of the bundle."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta

from eyas_device.support.toml import Section
from eyas_host.recipe.types import Fraction

VERSION = r"^\d+\.\d+\.\d+([-+.][0-9A-Za-z.-]+)?$"
"""What the version of a bundle looks like."""


class PackSection(Section, frozen=True):
    """`[pack]`: contents of the bundle."""

    version: Annotated[str, Meta(pattern=VERSION)] = "1.0.0"
    """Semantic version of the bundle."""
    golden: Annotated[int, Meta(ge=1, le=64)] = 12
    """Validation images on which every device must reproduce the workstation's predictions."""
    threshold: Fraction = 0.6
    """Predictions below this calibrated confidence are reported as uncertain."""
    images: Literal["allowed", "never"] = "allowed"
    """`never`: no device sends an image, whatever its configuration says; part of the bundle."""
