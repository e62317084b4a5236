"""`[accept]`: what the model must reach on the held-out test set to ship."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta

from eyas_device.support.toml import Section
from eyas_host.recipe.types import Fraction, Rate

BelowOne = Annotated[float, Meta(ge=0.0, lt=1.0)]
"""No number of images proves that a model is always right."""


class AcceptSection(Section, frozen=True):
    """`[accept]`: what the model must reach on the held-out test set to ship; the report's verdict follows from it."""

    min_balanced_accuracy: BelowOne | None = None
    """Minimum balanced accuracy; without it only chance has to be beaten."""
    positive_class: str = ""
    """Class that must not be missed; empty: the one whose miss costs most by the `[cost]` table."""
    min_recall: BelowOne | None = None
    """Minimum recall of the positive class."""
    min_worst_recall: BelowOne = 0.5
    """Minimum recall of each class (0: not asked)."""
    max_cost_ratio: Rate = 1.0
    """Maximum mean cost per image, as a fraction of the best constant prediction's; applies with a `[cost]` table."""
    max_int8_loss: Rate = 0.05
    """Maximum balanced accuracy that int8 may lose on the test set (1: not asked); `[gate] max_drop` bounds the loss on
    validation."""
    min_ood_coverage: Fraction | None = None
    """Minimum fraction of the changes of light, focus and view costing ten points or more that devices must notice."""
