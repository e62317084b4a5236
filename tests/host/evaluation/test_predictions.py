"""Predictions of variants that are calibrated each by its own parameters, and their rows in the comparison."""

from __future__ import annotations

import numpy as np
import pytest

from eyas_device.decision import Decision
from eyas_host.evaluation.calibration import calibrate
from eyas_host.evaluation.metrics import score, softmax
from eyas_host.evaluation.parity import Parity, compare
from eyas_host.evaluation.predictions import Predictions
from eyas_host.evaluation.verdict import Logits, Verdict
from eyas_host.report.collect import variants_of

LABELS = ("defective", "ok")
SHARPNESS = {"pruned": 1.0, "qat": 0.5, "litert-int8": 2.0, "litert-int16": 4.0}
PRECISIONS = {"litert-int8": "int8", "litert-int16": "int16"}


def drawn(images: int, seed: int) -> tuple[dict[str, Logits], np.ndarray]:
    """Logits of variants that differ in scale alone, all as if both labels were equally frequent; 5 % are defective."""
    rng = np.random.default_rng(seed)
    targets = (rng.random(images) >= 0.05).astype(np.int64)
    evidence = 2 * (rng.normal(size=images) + 2 * (targets == 0) - 1)
    logits = np.stack([evidence, np.zeros(images)], axis=1)
    return {name: (factor * logits).astype(np.float32) for name, factor in SHARPNESS.items()}, targets


def verdict_of(decision: Decision | None) -> tuple[Verdict, dict[str, Logits], np.ndarray]:
    logits, targets = drawn(2000, seed=0)
    calibrated = calibrate(logits, targets, np.arange(2000), LABELS, threshold=0.6)
    parity: dict[str, Parity] = {
        name: compare(logits, name, targets, confidence=calibrated.confidence[name]) for name in PRECISIONS
    }
    scores = {name: score(p, targets) for name, p in calibrated.held_out.items()}
    use = {"litert": "litert-int8"}
    return Verdict(calibrated.confidence, scores, parity, {}, {}, {}, use, {}, decision), logits, targets


def test_each_variant_has_its_own_calibration_and_precision() -> None:
    verdict, _, _ = verdict_of(None)
    logits, targets = drawn(20_000, seed=1)
    test = Predictions.of(logits, targets, np.arange(len(targets)), LABELS, verdict)
    rows = {row.name: row for row in variants_of(test, {}, verdict, PRECISIONS, "test")}
    assert {name: row.precision for name, row in rows.items()} == {
        "pruned": "fp32",
        "qat": "int8",
        "litert-int8": "int8",
        "litert-int16": "int16",
    }
    for name, row in rows.items():
        assert row.temperature == pytest.approx(SHARPNESS[name], rel=0.2), name
        assert row.bias[1] - row.bias[0] == pytest.approx(np.log(19), abs=0.4), name
        assert row.classwise_ece is not None and row.classwise_ece < 0.01, "by another's calibration it is not"
    assert len({round(float(row.nll or 0), 2) for row in rows.values()}) == 1, "the same network but for its scale"


def test_without_costs_the_label_is_the_networks_own_and_with_costs_bayes() -> None:
    logits, targets = drawn(2_000, seed=1)
    for decision in (None, Decision(costs=((0.0, 1.0), (1.0, 0.0)))):
        verdict, _, _ = verdict_of(decision)
        test = Predictions.of(logits, targets, np.arange(len(targets)), LABELS, verdict)
        for name in SHARPNESS:
            assert test.scores[name].balanced_accuracy == score(softmax(logits[name]), targets).balanced_accuracy
            expected = logits[name].argmax(axis=1) if decision is None else test.probabilities[name].argmax(axis=1)
            assert (test.predicted(name) == expected).all()


def test_figures_of_validation_are_cross_fitted() -> None:
    verdict, logits, targets = verdict_of(None)
    units = np.arange(2000)
    validation = Predictions.of_validation(logits, targets, units, LABELS, verdict)
    assert validation.scores is verdict.scores
    assert validation.scores["qat"].nll == score(validation.probabilities["qat"], targets).nll
    assert validation.scores["qat"].nll != Predictions.of(logits, targets, units, LABELS, verdict).scores["qat"].nll
