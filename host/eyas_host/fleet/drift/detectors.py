"""Sequential detectors, one update for all devices at once. All state is passed in and returned; nothing is kept here.

- Page's CUSUM, two-sided, with three allowances: a small one for small shifts, a large one for large shifts (Page,
  "Continuous inspection schemes", Biometrika 1954).
- Crosier's multivariate CUSUM, a sequential Hotelling T² (Crosier, "Multivariate generalizations of cumulative sum
  quality-control schemes", Technometrics 1988).
- An e-detector: a mixture of test martingales that begin at each step, each a bet that scores are more extreme than on
  stable days (Vovk & Wang, "E-values: calibration, combination and applications", Annals of Statistics 2021, for the
  bets; Shin, Ramdas & Rinaldo, "E-detectors: a nonparametric framework for sequential change detection", 2023).

A NaN leaves the state of its measure as it is.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.floating]

ALLOWANCES = np.array([0.1, 0.5, 1.5])
"""Allowances k of the CUSUMs, in standard deviations of a step."""
DIRECTION_ALLOWANCE = 1.0
EXPONENTS = np.array([0.1, 0.3, 0.6])
"""Exponents of the bets p -> kappa p^(kappa - 1): their mean over a uniform p is 1."""
HORIZON = 8640
"""Steps, 30 days, over which the e-detector holds its rate of false alarms."""


def cusum(state: Floats, scores: Floats) -> Floats:
    """Update two-sided CUSUMs.

    Args:
        state: [devices, measures, 2, allowances], at least 0: sums of upward and of downward deviations.
        scores: [devices, measures]: standard normal on stable days; NaN where there is none.

    Returns:
        The next state.

    """
    signed = np.stack([scores, -scores], axis=2)[..., None]
    return np.where(np.isnan(signed), state, np.maximum(state + signed - ALLOWANCES.astype(state.dtype), 0))


def direction_cusum(state: Floats, scores: Floats) -> Floats:
    """Update multivariate CUSUMs.

    Args:
        state: [devices, directions].
        scores: [devices, directions], uncorrelated with variance 1 on stable days; NaN where there is none.

    Returns:
        The next state; its length is what alarms.

    """
    total = state + scores
    length = np.sqrt(np.square(total).sum(axis=1))
    with np.errstate(divide="ignore", invalid="ignore"):
        factor = np.where(length > DIRECTION_ALLOWANCE, 1 - DIRECTION_ALLOWANCE / length, 0)
    return np.where(np.isnan(length)[:, None], state, total * factor[:, None]).astype(state.dtype)


def evidence(state: Floats, tails: Floats) -> Floats:
    """Update the e-detectors of all bets.

    Without drift the mean of exp(state) grows by 1 / `HORIZON` a step at most, so that within `HORIZON` steps it
    reaches 1 / alpha with probability alpha at most (Ville's inequality).

    Args:
        state: [devices, measures, sides, exponents]: logarithms of the wealth; -inf in the beginning.
        tails: [devices, measures, sides]: p-values, uniform or larger without drift; NaN where there is none.

    Returns:
        The next state.

    """
    started = np.logaddexp(state, -np.log(HORIZON))
    kappa = EXPONENTS.astype(state.dtype)
    bet = np.log(kappa) + (kappa - 1) * np.log(tails)[..., None]
    return np.where(np.isnan(tails)[..., None], state, started + bet).astype(state.dtype)


def e_value(state: Floats) -> Floats:
    """The mean of all bets' wealth, [devices]: an e-value for each device."""
    flat = state.reshape(len(state), -1).astype(np.float64)
    high = np.maximum(flat.max(axis=1), -700.0)
    return np.asarray(np.exp(np.minimum(high, 600.0)) * np.exp(flat - high[:, None]).mean(axis=1))


def benjamini_hochberg(e_values: Floats, alpha: float) -> npt.NDArray[np.bool_]:
    """Which devices drift, with a false discovery rate of `alpha` at most, however dependent they are: e-BH.

    Source: Wang & Ramdas, "False discovery rate control with e-values", JRSS B 2022.
    """
    n = len(e_values)
    ordered = np.sort(e_values)[::-1]
    passes = np.flatnonzero(ordered * np.arange(1, n + 1) >= n / alpha)
    if not len(passes):
        return np.zeros(n, bool)
    return np.asarray(e_values >= ordered[passes[-1]])
