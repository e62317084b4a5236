"""The detectors do what their formulas say, device by device, and hold their rates of false alarms."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from eyas_host.fleet.drift.detectors import (
    ALLOWANCES,
    DIRECTION_ALLOWANCE,
    EXPONENTS,
    HORIZON,
    benjamini_hochberg,
    cusum,
    direction_cusum,
    e_value,
    evidence,
)

SEEDS = st.integers(0, 2**32 - 1)


def with_gaps(rng: np.random.Generator, values: np.ndarray) -> np.ndarray:
    values[rng.random(values.shape) < 0.1] = np.nan
    return values


@given(SEEDS)
def test_cusum_equals_a_loop_over_numbers(seed: int) -> None:
    rng = np.random.default_rng(seed)
    stream = with_gaps(rng, rng.normal(rng.normal(0, 0.5), 1, (30, 3, 2)))
    state = np.zeros((3, 2, 2, len(ALLOWANCES)))
    plain = np.zeros(state.shape)
    for scores in stream:
        state = cusum(state, scores)
        for device, measure, side, k in np.ndindex(plain.shape):
            score = float(scores[device, measure])
            if not math.isnan(score):
                signed = score if side == 0 else -score
                plain[device, measure, side, k] = max(plain[device, measure, side, k] + signed - ALLOWANCES[k], 0.0)
    assert np.array_equal(state, plain)


@given(SEEDS)
def test_direction_cusum_equals_a_loop_over_numbers(seed: int) -> None:
    rng = np.random.default_rng(seed)
    stream = rng.normal(rng.normal(0, 0.5), 1, (20, 3, 4))
    stream[rng.random((20, 3)) < 0.1, 0] = np.nan
    state, plain = np.zeros((3, 4)), [[0.0] * 4 for _ in range(3)]
    for scores in stream:
        state = direction_cusum(state, scores)
        for device in range(3):
            total = [s + float(x) for s, x in zip(plain[device], scores[device], strict=True)]
            length = math.sqrt(sum(t * t for t in total))
            if not math.isnan(length):
                factor = 1 - DIRECTION_ALLOWANCE / length if length > DIRECTION_ALLOWANCE else 0.0
                plain[device] = [t * factor for t in total]
    assert np.allclose(state, plain, rtol=1e-12, atol=1e-12)


@given(SEEDS)
def test_evidence_equals_the_sum_over_all_beginnings(seed: int) -> None:
    """A second formulation: wealth = sum over begins s of 1 / HORIZON times the product of the bets since s."""
    rng = np.random.default_rng(seed)
    stream = with_gaps(rng, rng.uniform(1e-4, 1, (15, 2, 1, 2)))
    state = np.full((2, 1, 2, len(EXPONENTS)), -np.inf)
    for tails in stream:
        state = evidence(state, tails)
    for device, measure, side, number in np.ndindex(state.shape):
        own, kappa = stream[:, device, measure, side], EXPONENTS[number]
        bets = [kappa * p ** (kappa - 1) for p in own if not math.isnan(p)]
        wealth = sum(math.prod(bets[begin:]) for begin in range(len(bets))) / HORIZON
        found = state[device, measure, side, number]
        assert math.isclose(math.exp(found), wealth, rel_tol=1e-9) or (wealth == 0 and found == -np.inf)
    expected = [np.exp(state[device]).mean() for device in range(2)]
    assert np.allclose(e_value(state), expected)


def test_a_bet_is_fair() -> None:
    for kappa in EXPONENTS:
        q = (np.arange(1000) + 0.5) / 1000  # p = q^(1 / kappa), so that no mass is lost near 0
        p = q ** (1 / kappa)
        assert (kappa * p ** (kappa - 1) * q ** (1 / kappa - 1) / kappa).mean() == pytest.approx(1)


def test_evidence_alarms_falsely_within_its_rate() -> None:
    """2,000 devices, uniform p-values, a peek at each of 300 steps: no more than alpha reach 1 / alpha."""
    rng = np.random.default_rng(5)
    state = np.full((2000, 2, 2, len(EXPONENTS)), -np.inf)
    highest = np.zeros(2000)
    for _ in range(300):
        state = evidence(state, rng.random((2000, 2, 2)))
        highest = np.maximum(highest, e_value(state) * HORIZON / 300)  # as if the horizon were these 300 steps
    assert (highest >= 20).mean() <= 0.05
    assert (highest >= 2).mean() > 0.05  # the simulation can show a violation


def test_evidence_grows_with_drift() -> None:
    rng = np.random.default_rng(6)
    state = np.full((50, 1, 2, len(EXPONENTS)), -np.inf)
    for _ in range(100):
        small = rng.random((50, 1, 2))
        small[..., 0] **= 4
        state = evidence(state, small)
    assert np.median(e_value(state)) > 1e6


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=12), st.floats(0.01, 0.5))
def test_e_bh_is_the_largest_set_that_supports_itself(values: list[float], alpha: float) -> None:
    found = benjamini_hochberg(np.array(values), alpha)
    sizes = [k for k in range(1, len(values) + 1) if sorted(values)[-k] >= len(values) / (alpha * k)]
    assert found.sum() >= max(sizes, default=0)
    if sizes:
        bound = sorted(values)[-max(sizes)]
        assert [bool(x) for x in found] == [value >= bound for value in values]
    else:
        assert not found.any()


def test_e_bh_holds_its_false_discovery_rate_among_dependent_devices() -> None:
    rng = np.random.default_rng(7)
    rates = []
    for _ in range(2000):
        p = np.full(40, rng.random())  # all true nulls share one p-value
        e = 0.5 * p**-0.5
        e[:5] = 1e4
        chosen = benjamini_hochberg(e, 0.1)
        rates.append(chosen[5:].sum() / max(1, chosen.sum()))
    assert np.mean(rates) <= 0.1
