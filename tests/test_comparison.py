"""Benchmarks compare by one measure, and their bounds know that trainings differ."""

from __future__ import annotations

import importlib
from types import ModuleType

import numpy as np
import pytest

from eyas_host.evaluation.metrics import paired_loss
from tests.support.paths import ROOT


@pytest.fixture
def comparison(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module("sides.comparison")


def changed(logits: np.ndarray, fraction: float) -> np.ndarray:
    """Logits [n, 2] of which the first images have the other label."""
    swapped = logits.copy()
    count = round(fraction * len(logits))
    swapped[:count] = swapped[:count, ::-1]
    return swapped


def test_both_sides_are_compared_with_the_same_float_model(comparison: ModuleType) -> None:
    fp32 = [np.eye(2, dtype=np.float32)[np.arange(n) % 2] for n in (100, 300)]
    qat = [changed(fold, 0.12) for fold in fp32]
    eyas, peer = [fold.copy() for fold in qat], [changed(fp32[0], 0.06), changed(fp32[1], 0.10)]
    figures = comparison.compared_by_disagreements(("own", eyas, ""), ("peer", peer, ""), fp32=fp32, qat=qat)
    theirs, own = figures["peer: disagreements with fp32"], figures["own beside peer: disagreements with fp32"]
    assert (theirs.value, theirs.spread) == (pytest.approx(9.0), "6.0, 10.0")
    assert (own.value, own.bound, own.ok) == (pytest.approx(12.0), pytest.approx(4.5), False)
    assert "with the QAT model, which fine-tuning moved away from fp32: 0.00 %" in own.note
    close = [changed(fold, 0.05) for fold in fp32]
    figures = comparison.compared_by_disagreements(("own", eyas, ""), ("peer", close, ""), fp32=fp32, qat=qat)
    assert figures["own beside peer: disagreements with fp32"].bound is None


def test_a_bound_over_folds_is_students(comparison: ModuleType) -> None:
    # One-sided 95 % point of Student's t with 4 degrees of freedom: 2.1318 (any table).
    losses = [0.58, -1.47, -0.91, -1.30, -0.09]
    expected = np.mean(losses) + 2.1318 * np.std(losses, ddof=1) / np.sqrt(5)
    assert comparison.fold_bound(losses) == pytest.approx(expected, abs=1e-4)
    assert comparison.fold_bound([0.5]) is None and comparison.fold_bound([0.0] * 5) == 0.0


def test_a_bound_over_folds_holds_where_that_over_images_is_too_sure(comparison: ModuleType) -> None:
    """Trainings that lose 3 +- 2 points, five of them with 500 images each."""
    rng = np.random.default_rng(0)
    targets = np.arange(500) % 2
    before = np.eye(2)[targets]
    over_folds, over_images = [], []
    for number in range(80):
        folds = []
        for lost in 0.06 + rng.normal(0, 0.02, 5):  # of the images; 3 % are gained
            drawn = rng.random(500)
            own = np.where((drawn < 0.03)[:, None], before[:, ::-1], before)
            after = np.where(((drawn >= 0.03) & (drawn < 0.03 + lost))[:, None], before[:, ::-1], before)
            folds.append((own, after))
        losses = [paired_loss(*fold, targets, seed=number).loss for fold in folds]
        over_folds.append(comparison.fold_bound(losses) >= 0.03)
        own, after = (np.concatenate(side) for side in zip(*folds, strict=True))
        over_images.append(paired_loss(own, after, np.tile(targets, 5), seed=number).bound >= 0.03)
    assert np.mean(over_folds) >= 0.92
    assert np.mean(over_images) < 0.88
