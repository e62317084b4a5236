"""`[tune]`: the search space of `eyas tune`."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta

from eyas_device.support.toml import Section
from eyas_host.recipe.types import AtLeastOne, Count, Fraction, Positive, Rate

_NON_EMPTY = Meta(min_length=1)


class TuneSection(Section, frozen=True):
    """`[tune]`: values that `eyas tune` tries: the grid every combination, TPE anything between minimum and maximum."""

    rates: Annotated[tuple[Rate, ...], _NON_EMPTY] = (1e-4, 3e-4, 1e-3)
    """teacher.rate."""
    batches: Annotated[tuple[AtLeastOne, ...], _NON_EMPTY] = (16, 32)
    """teacher.batch."""
    unfreeze: Annotated[tuple[Annotated[str, Meta(pattern=r"^(all|[0-9]+)$")], ...], _NON_EMPTY] = ("2", "all")
    """teacher.unfreeze: number of last blocks that train."""
    layer_decays: tuple[Rate, ...] = ()
    """teacher.layer_decay; empty: not searched."""
    weight_decays: tuple[Fraction, ...] = ()
    """teacher.weight_decay; empty: not searched."""
    student_rates: Annotated[tuple[Rate, ...], _NON_EMPTY] = (1e-3, 3e-3, 1e-2)
    """student.rate."""
    kd_ratios: Annotated[tuple[Fraction, ...], _NON_EMPTY] = (0.5, 0.9)
    """student.kd_ratio."""
    temperatures: Annotated[tuple[Positive, ...], _NON_EMPTY] = (1.0, 2.0, 4.0)
    """student.temperature."""
    epochs: AtLeastOne = 3
    """Epochs of a trial."""
    trials: AtLeastOne = 20
    """Number of finished TPE trials; the grid ends with its last combination."""
    pruner: Literal["median", "hyperband", "none"] = "median"
    """Pruner that ends TPE trials early: those below the median of earlier trials, or those that Hyperband drops."""
    finals: Count = 3
    """Number of best trials to train in full and compare."""
    final_epochs: Count = 0
    """Epochs of a final; 0: as in the recipe."""
