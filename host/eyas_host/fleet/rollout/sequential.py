"""A sequential randomization test: may be looked at again and again, and holds its rate of false alarms.

Which devices got the new version was drawn by a hash, so without an effect every other draw was as likely, with the
same figures of every device. A set of draws is fixed at the first look, the real one among them. At each look the most
extreme ones of those that have not stopped yet stop, until the share that may have stopped by then is used up; the test
alarms when the real draw does. So it alarms falsely with probability `alpha` at most over all looks together, whatever
the distribution of the figures, their correlation in time, and the number of looks; only draws count, never frames.

Sources: Lan & DeMets, "Discrete sequential boundaries for clinical trials", Biometrika 1983 (spending of alpha);
Hemerik & Goeman, "Exact testing with random permutations", TEST 2018 (the real draw among random ones).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Bools = npt.NDArray[np.bool_]
Floats = npt.NDArray[np.float64]

MAX_DRAWS = 2000
"""Draws that are compared; where fewer are possible, all of them."""


def possible_draws(treated: Sequence[bool], strata: Sequence[str]) -> int:
    """Number of draws with as many treated devices in each stratum."""
    total = 1
    for stratum in sorted(set(strata)):
        own = [is_treated for is_treated, name in zip(treated, strata, strict=True) if name == stratum]
        total *= math.comb(len(own), sum(own))
    return total


def draws(treated: Sequence[bool], strata: Sequence[str], seed: int) -> Bools:
    """Draws of treated devices, shape (draws, devices), the real one first; the same for the same arguments."""
    real = np.asarray(treated, bool)
    members = [np.flatnonzero(np.asarray(strata) == stratum) for stratum in sorted(set(strata))]
    if possible_draws(treated, strata) <= MAX_DRAWS:
        return _all_draws(real, members)
    generator = np.random.default_rng(seed)
    found = np.tile(real, (MAX_DRAWS, 1))
    for row in found[1:]:
        for own in members:
            row[own] = generator.permutation(row[own])
    return found


def spent(look: int, alpha: float) -> float:
    """Share of the draws that may have stopped by a look, numbered from 1; half of `alpha` at the first."""
    return alpha * look / (look + 1)


def stop(values: Floats, treated: Bools, stopped: Bools, look: int, alpha: float) -> Bools:
    """Look once: which draws have stopped by now; the test alarms if the first one has.

    Args:
        values: Figure of each device, larger is worse; NaN where there is none. Shape (devices,).
        treated: The draws, shape (draws, devices).
        stopped: Which draws stopped at earlier looks, shape (draws,).
        look: Number of the look, from 1.
        alpha: Rate of false alarms over all looks.

    Returns:
        Which draws have stopped, shape (draws,).

    """
    budget = math.floor(spent(look, alpha) * len(stopped) + 1e-9) - int(stopped.sum())
    if budget <= 0:
        return stopped
    statistic = treated @ _centred_ranks(values)
    active = np.where(stopped, -np.inf, statistic)
    order = np.sort(active)[::-1]
    bound = order[budget] if budget < len(order) else -np.inf
    within: Bools = active > max(bound, 0.0) + 1e-9  # draws of one rank stop together or not at all
    return stopped | within


def _all_draws(real: Bools, members: Sequence[npt.NDArray[np.intp]]) -> Bools:
    each = [list(itertools.combinations(own, int(real[own].sum()))) for own in members]
    rows = [real]
    for choice in itertools.product(*each):
        row = np.zeros(len(real), bool)
        row[[index for chosen in choice for index in chosen]] = True
        if not np.array_equal(row, real):
            rows.append(row)
    return np.array(rows)


def _centred_ranks(values: Floats) -> Floats:
    """Ranks minus their mean, ties sharing theirs; 0 where there is no figure."""
    ranks = np.zeros(len(values))
    present = np.flatnonzero(np.isfinite(values))
    if len(present):
        _, index, counts = np.unique(values[present], return_inverse=True, return_counts=True)
        ends = np.cumsum(counts)
        ranks[present] = (ends - (counts - 1) / 2)[index] - (len(present) + 1) / 2
    return ranks
