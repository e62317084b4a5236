"""The detectors of others that the loop's benchmark compares with do what their authors' code does."""

from __future__ import annotations

import importlib
from types import ModuleType

import numpy as np
import pytest

from tests.support.paths import ROOT


@pytest.fixture
def detectors(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module("drift_detectors")


def streams(steps: int, count: int) -> np.ndarray:
    """Streams that wander, [steps, count]; the mean of every second one jumps half-way."""
    rng = np.random.default_rng(5)
    values = rng.normal(size=(steps, count)) + np.cumsum(rng.normal(0, 0.03, (steps, count)), axis=0)
    values[steps // 2 :, ::2] += 2.0
    return values


@pytest.mark.parametrize("setting", [(0.005, 100, 30), (1e-3, 90, 40), (0.02, 300, 100)])
def test_kswin_alarms_when_rivers_does(detectors: ModuleType, setting: tuple[float, int, int]) -> None:
    """With several alarms, after which a detector begins again."""
    from river.drift import KSWIN

    values, learned = streams(500, 3), 50
    expected = np.zeros(values.shape, bool)
    for stream in range(values.shape[1]):
        detector = KSWIN(alpha=setting[0], window_size=setting[1], stat_size=setting[2], seed=0)
        for step, value in enumerate(values[:, stream].tolist()):
            detector.update(value)
            expected[step, stream] = detector.drift_detected
    assert expected[learned:].sum() >= 3
    assert (detectors.kswin_alarms(detectors.Kswin(*setting), values, learned) == expected[learned:]).all()


def test_the_alpha_that_is_found_alarms_as_often_as_asked(detectors: ModuleType) -> None:
    values, stable = np.random.default_rng(1).normal(size=(4000, 10)), np.ones((3900, 10), bool)
    alpha = detectors.kswin_alpha(100, 30, values, 100, stable, 4.0)
    alarms = detectors.kswin_alarms(detectors.Kswin(alpha, 100, 30), values, 100)
    assert 1.0 <= detectors.rate(alarms, stable) <= 4.0


def test_ks_scores_are_scipys_statistic(detectors: ModuleType) -> None:
    from scipy.stats import ks_2samp

    values = streams(400, 2)
    scores = detectors.ks_scores(values, 200, 36)
    for step in (40, 57, 199):
        expected = ks_2samp(values[200 + step - 35 : 201 + step, 1], values[:200, 1]).statistic
        assert scores[step, 1] == pytest.approx(6 * expected, abs=1e-6)
