"""`[tune]`: the section of a recipe that says what a search may try."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta

from eyas_device.support.toml import Section
from eyas_host.recipe.types import AtLeastOne, Count, Fraction, Positive, Rate

_FILLED = Meta(min_length=1)


class TuneSection(Section, frozen=True):
    """`[tune]`: what `eyas tune` tries; the grid all combinations, TPE what lies between the least and the most."""

    rates: Annotated[tuple[Rate, ...], _FILLED] = (1e-4, 3e-4, 1e-3)
    """teacher.rate."""
    batches: Annotated[tuple[AtLeastOne, ...], _FILLED] = (16, 32)
    """teacher.batch."""
    unfreeze: Annotated[tuple[Annotated[str, Meta(pattern=r"^(all|[0-9]+)$")], ...], _FILLED] = ("2", "all")
    """teacher.unfreeze: freeze plans, by how many of the last blocks train."""
    layer_decays: tuple[Rate, ...] = ()
    """teacher.layer_decay; none: it stays as it is."""
    weight_decays: tuple[Fraction, ...] = ()
    """teacher.weight_decay; none: it stays as it is."""
    student_rates: Annotated[tuple[Rate, ...], _FILLED] = (1e-3, 3e-3, 1e-2)
    """student.rate."""
    kd_ratios: Annotated[tuple[Fraction, ...], _FILLED] = (0.5, 0.9)
    """student.kd_ratio."""
    temperatures: Annotated[tuple[Positive, ...], _FILLED] = (1.0, 2.0, 4.0)
    """student.temperature."""
    epochs: AtLeastOne = 3
    """Length of a trial."""
    trials: AtLeastOne = 20
    """Finished trials that TPE ends with; the grid ends with its last combination."""
    pruner: Literal["median", "hyperband", "none"] = "median"
    """Which of TPE's trials end early: what is behind the median of the trials so far, or what Hyperband drops."""
    finals: Count = 3
    """The best trials that are trained in full and compared."""
    final_epochs: Count = 0
    """Length of their training; 0: as the recipe's."""
