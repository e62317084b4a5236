"""What is measured of windows: right numbers, in whatever order they arrive, and nothing of those that lie."""

from __future__ import annotations

from functools import reduce
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from eyas_device.telemetry.messages import Sketch, Window, encode, merge
from eyas_host.fleet.drift.measures import (
    DIRECTIONS,
    MEASURES,
    SCALARS,
    SUMS,
    SmallWindow,
    confidence_bins,
    measure,
    most_frequent,
    names,
    sums_of,
)

LABELS = ("a", "b")


def window(rng: np.random.Generator, **more: Any) -> Window:
    counts = {label: int(rng.integers(0, 40)) for label in (*LABELS, "c")}
    frames = sum(counts.values()) or 1
    counts["a"] += frames - sum(counts.values())
    bins = {label: tuple(rng.multinomial(count, [0.1] * 10).tolist()) for label, count in counts.items()}
    n = int(rng.integers(2, 30))
    fields: dict[str, Any] = {
        "frames": frames,
        "counts": counts,
        "confidence_bins": bins,
        "confidence_sum": {label: round(float(count * rng.random()), 2) for label, count in counts.items()},
        "margin": tuple(rng.multinomial(frames, [0.1] * 10).tolist()),
        "entropy": tuple(rng.multinomial(frames, [0.1] * 10).tolist()),
        "sketch": Sketch(n=n, mean=tuple(rng.normal(size=8).tolist()), m2=tuple((n * rng.random(8)).tolist())),
        "ood_quantile": float(rng.random()),
    }
    return Window(**{**fields, **more})


@given(st.integers(0, 2**32 - 1), st.integers(1, 5))
def test_sums_of_windows_are_the_sums_of_the_merged_window(seed: int, count: int) -> None:
    rng = np.random.default_rng(seed)
    windows = [window(rng) for _ in range(count)]
    added = sum(np.array(sums_of(one, LABELS)) for one in windows)
    merged = sums_of(reduce(merge, windows), LABELS)
    assert merged is not None
    own = measure(np.array([merged]))[0]
    same = [number for number in range(MEASURES) if number not in (4, 5)]  # a merged window has the last distance only
    assert np.allclose(measure(np.array([added]))[0][same], own[same], atol=1e-3, equal_nan=True)


def test_the_measures_of_a_window_that_can_be_computed_by_hand() -> None:
    one = Window(
        frames=10,
        counts={"a": 8, "b": 2},
        confidence_bins={"a": (0, 1, 0, 0, 0, 7, 0, 0, 0, 0), "b": (2, 0, 0, 0, 0, 0, 0, 0, 0, 0)},
        confidence_sum={"a": 7.4, "b": 0.8},
        margin=(2, 0, 0, 0, 0, 0, 0, 0, 0, 8),
        entropy=(8, 0, 0, 0, 0, 0, 0, 0, 0, 2),
        sketch=Sketch(n=4, mean=(1.0,) * 8, m2=(8.0,) * 8),
        ood_quantile=0.25,
        ood_reason="darker than 99 % of the training images",
    )
    found = dict(zip(names(LABELS), measure(np.array([sums_of(one, LABELS)]))[0], strict=True))
    assert found["confidence"] == pytest.approx(0.82)
    assert found["low confidence"] == pytest.approx(0.3)
    assert found["margin"] == pytest.approx((2 * 0.05 + 8 * 0.95) / 10)
    assert found["entropy"] == pytest.approx((8 * 0.05 + 2 * 0.95) / 10)
    assert (found["distance"], found["out of distribution"]) == (0.25, 1.0)
    assert found["spread"] == pytest.approx(np.log(2.0 + 1e-3))
    assert (found["share of a"], found["share of b"]) == (0.8, 0.2)
    assert found["confidence of a"] == pytest.approx(0.925)
    assert np.isnan(found["confidence of b"])  # two predictions say nothing
    assert found["image direction 3"] == 1.0
    bins = confidence_bins(np.array([sums_of(one, LABELS)]))[0]
    assert bins[0].tolist() == [0, 1, 0, 0, 0, 7, 0, 0, 0, 0]
    assert bins[-1].tolist() == [2, 1, 0, 0, 0, 7, 0, 0, 0, 0]
    assert len(names(LABELS)) == MEASURES == SCALARS + DIRECTIONS


@pytest.mark.parametrize(
    "lie",
    [
        {"frames": 0},
        {"frames": 7},
        {"confidence_sum": {"a": 1e9}},
        {"margin": (1,) * 10},
        {"confidence_bins": {"a": (1,) * 10}},
    ],
)
def test_a_window_that_contradicts_itself_does_not_count(lie: dict[str, Any]) -> None:
    assert sums_of(window(np.random.default_rng(1)), LABELS) is not None
    assert sums_of(window(np.random.default_rng(1), **lie), LABELS) is None


def test_impossible_projections_and_missing_parts_are_left_out() -> None:
    rng = np.random.default_rng(2)
    for sketch in (Sketch(), Sketch(n=5, mean=(1e12,) * 8, m2=(1.0,) * 8), Sketch(n=-3, mean=(1.0,), m2=(1.0,))):
        found = dict(
            zip(names(LABELS), measure(np.array([sums_of(window(rng, sketch=sketch), LABELS)]))[0], strict=True)
        )
        assert np.isnan(found["image direction 1"])
        assert np.isnan(found["spread"])
        assert np.isfinite(found["confidence"])
    without = window(rng, ood_quantile=None, margin=(0,) * 10)
    found = dict(zip(names(LABELS), measure(np.array([sums_of(without, LABELS)]))[0], strict=True))
    assert np.isnan(found["distance"])
    assert np.isnan(found["margin"])


def test_windows_of_agents_without_sums_count_by_tenths() -> None:
    old = Window(frames=10, counts={"a": 10}, confidence={"a": (0, 0, 0, 0, 0, 0, 0, 0, 0, 10)})
    found = measure(np.array([sums_of(old, LABELS)]))[0]
    assert found[0] == pytest.approx(0.95)
    assert np.isnan(found[1])


def test_the_small_decoder_reads_what_the_whole_one_reads() -> None:
    one = window(np.random.default_rng(3))
    small = msgspec.json.decode(encode(one), type=SmallWindow)
    assert sums_of(small, LABELS) == sums_of(one, LABELS)
    assert len(sums_of(one, LABELS) or ()) == SUMS


def test_the_most_frequent_labels_are_followed_in_a_fixed_order() -> None:
    counts = {f"label {number}": number for number in range(20)}
    assert most_frequent(counts) == tuple(sorted(f"label {number}" for number in range(14, 20)))
