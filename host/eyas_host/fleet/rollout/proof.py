"""Which of two versions is better, from labelled disagreements: a bet that may be looked at at any time.

On probation both versions predict the same frame. Where they agree, a label would tell nothing of which is better;
where they disagree and one of them is right, a bettor stakes a part of its money on the new version. If the new version
is no better, the bettor wins at most every other time, and its money is a supermartingale: by Ville's inequality it
ever grows to 1 / alpha with a probability of at most alpha, however often and whenever one looks, and whatever made one
look. The bettor against the new version is its mirror.

A bettor that staked 2q - 1 would be best if the new version were right with probability q. Nobody knows q, so the money
is spread over all of them evenly; it depends on the two counts alone, not on their order.

Sources: Ville, "Étude critique de la notion de collectif", 1939; Shafer, "Testing by betting", JRSS A 2021; Ramdas et
al., "Game-theoretic statistics and safe anytime-valid inference", Statistical Science 2023.
"""

from __future__ import annotations

import math
from typing import Literal

import msgspec
import numpy as np

Verdict = Literal["promote", "hold", "roll back"]
_CHANCES = 0.5 + (np.arange(200) + 0.5) / 400
"""Probabilities q that the bettors believe in, evenly between 1/2 and 1."""


class Evidence(msgspec.Struct, frozen=True, kw_only=True):
    """What labelled disagreements say so far."""

    alpha: float = 0.05
    """Probability that a version that is no better is ever called better; and the mirror of it."""
    disagreements: int = 0
    """Frames with different labels that devices sent, those too close in time to an earlier one left out."""
    labelled: int = 0
    """Of them, those that people labelled."""
    new_right: int = 0
    """Labelled ones on which the new version is right."""
    previous_right: int = 0
    """Labelled ones on which the previous version is right."""

    @property
    def neither(self) -> int:
        """Labelled disagreements on which neither is right: they say nothing."""
        return self.labelled - self.new_right - self.previous_right

    @property
    def better(self) -> float:
        """Money of the bettor on the new version, who began with 1."""
        return _money(self.new_right, self.previous_right)

    @property
    def worse(self) -> float:
        """Money of the bettor on the previous version."""
        return _money(self.previous_right, self.new_right)

    @property
    def verdict(self) -> Verdict:
        """What follows from it."""
        if self.better >= 1 / self.alpha:
            return "promote"
        return "roll back" if self.worse >= 1 / self.alpha else "hold"

    def __str__(self) -> str:
        counted = (
            f"{self.labelled} of {self.disagreements} disagreements labelled: the new version is right on "
            f"{self.new_right}, the previous one on {self.previous_right}, neither on {self.neither}"
        )
        odds = f"evidence that it is better {self.better:.3g}, worse {self.worse:.3g} of {1 / self.alpha:.3g} needed"
        return f"{counted}; {odds}: {self.verdict}"


def log_wealth(wins: int, losses: int) -> float:
    """Natural logarithm of a bettor's money after so many bets won and lost; it began with 1."""
    logs = wins * np.log(2 * _CHANCES) + losses * np.log(2 * (1 - _CHANCES))
    high = float(logs.max())
    return high + math.log(float(np.exp(logs - high).mean()))


def _money(wins: int, losses: int) -> float:
    """A bettor's money, where it is more than a number can be as much as one can."""
    return math.exp(min(log_wealth(wins, losses), 700.0))


def labels_needed(chance: float, alpha: float = 0.05) -> float:
    """Decided disagreements until promotion, if the new version is right on a share `chance` of them.

    For a bettor that knows `chance`: ln(1 / alpha) / KL(chance || 1/2). One that does not needs somewhat more.

    Raises:
        ValueError: `chance` is not between 1/2 and 1.

    """
    if not 0.5 < chance < 1:
        raise ValueError(f"chance {chance:g}: a number between 1/2 and 1 is needed")
    divergence = chance * math.log(2 * chance) + (1 - chance) * math.log(2 * (1 - chance))
    return math.log(1 / alpha) / divergence
