"""The logarithmic histogram against exact quantiles, for both bin widths in use."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from eyas_device.support.histogram import LogHistogram
from eyas_device.telemetry.aggregate import MAX_BINS
from eyas_device.telemetry.messages import GROWTH


@pytest.mark.parametrize("growth", [1.01, 1.05])
@given(times=st.lists(st.floats(0.02, 1e4), min_size=1, max_size=60))
def test_quantiles_are_within_half_a_bin(growth: float, times: list[float]) -> None:
    histogram = LogHistogram(growth)
    for value in times:
        histogram.add(value)
    for fraction in (0.5, 0.9, 0.99):
        exact = float(np.quantile(times, fraction, method="inverted_cdf"))
        assert histogram.quantile(fraction) == pytest.approx(exact, rel=(growth - 1) / 2 + 1e-3)
    assert histogram.summary()["max"] == pytest.approx(max(times), abs=1e-3)


@pytest.mark.parametrize(("milliseconds", "number"), [(0.0, 0), (-1.0, 0), (float("nan"), 0), (0.01, 0), (1e30, 450)])
def test_odd_durations_have_a_bin(milliseconds: float, number: int) -> None:
    histogram = LogHistogram(1.05)
    histogram.add(milliseconds)
    assert dict(histogram.bins) == {number: 1}


def test_an_empty_histogram_has_no_quantiles() -> None:
    assert LogHistogram().summary() == {} and LogHistogram().quantile(0.5) == 0.0


@given(st.dictionaries(st.integers(0, 450), st.integers(1, 1000), min_size=19, max_size=200), st.integers(2, 150))
def test_folded_bins_keep_every_count_and_the_longest(bins: dict[int, int], max_bins: int) -> None:
    folded = LogHistogram(bins=bins).folded(max_bins)
    assert len(folded) == min(max_bins, len(bins))
    assert sum(folded.values()) == sum(bins.values())
    assert list(folded) == sorted(folded)
    assert min(bins) <= min(folded) and max(folded) == max(bins)
    if len(bins) <= max_bins:
        assert folded == bins


@given(st.lists(st.integers(1, 50), min_size=40, max_size=400))
def test_only_what_lies_below_the_median_or_at_the_end_is_joined(counts: list[int]) -> None:
    """The cumulative counts from p40 to p99 stay those of all durations, though most lower bins are joined."""
    cumulative, total = np.cumsum(counts), sum(counts)
    max_bins = int((cumulative >= 0.3 * total).sum()) + 4
    folded = LogHistogram(bins=dict(enumerate(counts))).folded(max_bins)
    assert len(folded) == min(max_bins, len(counts))
    for number in np.flatnonzero((cumulative >= 0.4 * total) & (cumulative <= 0.99 * total)):
        assert sum(count for bin_, count in folded.items() if bin_ <= number) == cumulative[number]


_SPREADS = {
    "log-normal": lambda rng, n, width: 20 * np.exp(rng.normal(0, 0.2 + 1.3 * width, n)),
    "Pareto": lambda rng, n, width: 5 * (1 + rng.pareto(3.0 - 1.9 * width, n)),
    "hiccups": lambda rng, n, width: np.where(
        rng.random(n) < 0.02 + 0.1 * width, rng.uniform(60, 400, n), 20 * np.exp(rng.normal(0, 0.08, n))
    ),
}


@pytest.mark.parametrize(("windows", "examples"), [(1, 60), (8, 40), (300, 6)])
@pytest.mark.parametrize("spread", _SPREADS)
def test_quantiles_of_folded_and_merged_histograms_are_within_half_a_bin(
    spread: str, windows: int, examples: int
) -> None:
    """Of all durations in all windows, whatever of their tails was folded in each."""

    @settings(max_examples=examples, deadline=None)
    @given(seed=st.integers(0, 2**32 - 1), width=st.floats(0, 1), frames=st.sampled_from([20, 100, 300, 900]))
    @example(seed=0, width=1.0, frames=900)
    def check(seed: int, width: float, frames: int) -> None:
        rng = np.random.default_rng(seed)
        parts = [_SPREADS[spread](rng, frames if windows < 99 else 300, width) for _ in range(windows)]
        merged: Counter[int] = Counter()
        for part in parts:
            histogram = LogHistogram(GROWTH)
            for value in part:
                histogram.add(float(value))
            merged.update(histogram.folded(MAX_BINS))
        times = np.concatenate(parts)
        found = LogHistogram(GROWTH, bins=merged, max_ms=float(times.max())).summary()
        for name, fraction in (("p50", 0.5), ("p90", 0.9), ("p99", 0.99)):
            assert found[name] == pytest.approx(np.quantile(times, fraction, method="inverted_cdf"), rel=0.025)
        assert found["max"] == pytest.approx(times.max(), abs=1e-3)

    check()
