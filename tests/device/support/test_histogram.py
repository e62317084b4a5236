"""The logarithmic histogram against exact quantiles, for both bin widths in use."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from eyas_device.support.histogram import LogHistogram


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


@given(st.dictionaries(st.integers(0, 450), st.integers(1, 1000), min_size=19, max_size=200))
def test_folded_bins_keep_every_count(bins: dict[int, int]) -> None:
    folded = LogHistogram(bins=bins).folded(18)
    assert len(folded) == 18
    assert sum(folded.values()) == sum(bins.values())
    assert set(folded) <= set(bins)
