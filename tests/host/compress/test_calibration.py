"""Calibration images: farthest-point sampling against random sampling and a second formulation."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eyas_host.compress.quantize.calibration import covering_images, random_images


def features_of(clusters: int, seed: int = 0) -> np.ndarray:
    """Tight clusters of very different sizes, as a camera's days and its rare nights are."""
    rng = np.random.default_rng(seed)
    centres = 10 * rng.normal(size=(clusters, 6))
    sizes = np.geomspace(200, 2, clusters).astype(int)
    return np.concatenate([c + 0.1 * rng.normal(size=(n, 6)) for c, n in zip(centres, sizes, strict=True)])


def radius(points: np.ndarray, chosen: list[int]) -> float:
    """Largest distance of any image from its nearest chosen one."""
    gaps = np.linalg.norm(points[:, None] - points[chosen][None], axis=2)
    return float(gaps.min(axis=1).max())


def test_rare_images_are_covered_where_a_random_choice_misses_them() -> None:
    points = features_of(12)
    one_class = np.zeros(len(points), dtype=np.int64)
    covering = radius(points, covering_images(points, one_class, 12))
    random = [radius(points, random_images(len(points), 12, seed)) for seed in range(20)]
    assert covering < 2.0 < min(random)


def test_each_image_is_the_farthest_from_those_before_it() -> None:
    points = features_of(5, seed=3)
    chosen = covering_images(points, np.zeros(len(points), dtype=np.int64), 9)
    first = np.linalg.norm(points - points.mean(axis=0), axis=1)
    assert chosen[0] == int(first.argmin())
    for index in range(1, len(chosen)):
        apart = [min(np.linalg.norm(p - points[row]) for row in chosen[:index]) for p in points]
        assert apart[chosen[index]] == pytest.approx(max(apart))


def test_classes_take_turns_and_larger_ones_fill_up_for_smaller_ones() -> None:
    points = np.random.default_rng(0).normal(size=(40, 3))
    targets = np.array([0] * 30 + [1] * 8 + [2] * 2)
    chosen = covering_images(points, targets, 20)
    assert [int(targets[row]) for row in chosen[:6]] == [0, 1, 2, 0, 1, 2]
    assert [int((targets[chosen] == label).sum()) for label in range(3)] == [10, 8, 2]


@settings(max_examples=60, deadline=None)
@given(
    counts=st.lists(st.integers(1, 12), min_size=1, max_size=4),
    count=st.integers(1, 60),
    same=st.booleans(),
)
def test_no_image_twice_and_never_too_many(counts: list[int], count: int, same: bool) -> None:
    targets = np.repeat(np.arange(len(counts)), counts)
    points = np.zeros((len(targets), 2)) if same else np.random.default_rng(1).normal(size=(len(targets), 2))
    chosen = covering_images(points, targets, count)
    assert len(chosen) == len(set(chosen)) == min(count, len(targets))
    have = np.bincount(targets[chosen], minlength=len(counts))
    full = have == np.array(counts)
    if not full.all():  # a class that has images left is at most one behind any other
        assert have[~full].max() - have[~full].min() <= 1 and have.max() <= have[~full].min() + 1


def test_a_random_choice_is_seeded() -> None:
    assert random_images(50, 10, 1) == random_images(50, 10, 1) != random_images(50, 10, 2)
    assert sorted(random_images(5, 10, 0)) == [0, 1, 2, 3, 4]
