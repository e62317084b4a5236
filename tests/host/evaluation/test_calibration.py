"""Calibration: true parameters are found, a prior holds where they cannot be, and errors are those of unseen images."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import balanced_accuracy_score

from benchmarks.simulations import unbalanced_cost
from eyas_device.bundle import Confidence
from eyas_device.decision import decide
from eyas_device.predict import calibrated_probabilities
from eyas_host.evaluation.calibration import (
    bias_problem,
    calibrate,
    calibration_errors,
    cross_fitted,
    fit_calibration,
)
from eyas_host.evaluation.metrics import classwise_calibration_error, expected_calibration_error, softmax


def rare_defects(images: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Labels [n], 1 % of them defective (1), and the logits of a perfect network that takes both to be as frequent."""
    rng = np.random.default_rng(seed)
    targets = (rng.random(images) < 0.01).astype(np.int64)
    score = 3.0 * (rng.normal(size=images) + 3.0 * targets - 1.5)
    return targets, np.stack([np.zeros(images), score], axis=1)


@pytest.mark.parametrize("true", [0.4, 1.0, 3.0])
def test_temperature_and_bias_are_found(true: float) -> None:
    rng = np.random.default_rng(1)
    logits, bias = rng.normal(0, 3, (6000, 4)), np.array([1.5, 0.5, -0.5, -1.5])
    targets = np.array([rng.choice(4, p=row) for row in softmax(logits / true + bias)])
    found = fit_calibration(logits, targets)
    assert found.temperature == pytest.approx(true, rel=0.08)
    assert found.bias == pytest.approx(bias, abs=0.2) and sum(found.bias) == pytest.approx(0.0, abs=1e-9)
    probabilities = calibrated_probabilities(logits, found)
    frequencies = np.bincount(targets) / len(targets)
    assert probabilities.mean(axis=0) == pytest.approx(frequencies, abs=1e-3), "the likelihood's own condition"


def test_a_class_weighted_network_decides_by_cost_as_bayes_does() -> None:
    assert -0.001 < unbalanced_cost(repetitions=8) < 0.03
    assert unbalanced_cost(repetitions=1, bias=False) > 1.0, "a temperature cannot correct how frequent labels are"


@pytest.mark.parametrize("images", [60, 400])
@pytest.mark.parametrize("margin", [1.0, 2.0, 4.0, 12.0])
def test_right_predictions_do_not_make_every_confidence_certain(images: int, margin: float) -> None:
    rng = np.random.default_rng(1)
    targets = rng.integers(2, size=images)
    logits = rng.normal(0, 0.1 * margin, (images, 2))
    logits[np.arange(images), targets] += margin
    assert (logits.argmax(axis=1) == targets).all()
    assert fit_calibration(logits, targets).temperature >= 0.5


def test_without_images_nothing_is_corrected() -> None:
    assert fit_calibration(np.empty((0, 3)), np.empty(0, np.int64)).temperature == 1.0


def test_probabilities_are_true_at_1_percent_and_the_label_stays_balanced() -> None:
    targets, logits = rare_defects(4000)
    confidence = fit_calibration(logits, targets)
    unseen, own = rare_defects(100_000, seed=1)
    probabilities = calibrated_probabilities(own, confidence)
    assert probabilities[:, 1].mean() == pytest.approx(0.01, abs=0.003)
    errors, before = calibration_errors(probabilities, unseen), calibration_errors(softmax(own), unseen)
    assert errors.classwise_ece < 0.005 < 0.05 < before.classwise_ece and errors.nll < before.nll / 2
    network = balanced_accuracy_score(unseen, own.argmax(axis=1))
    assert network == pytest.approx(0.933, abs=0.01), "Phi(1.5), the optimum"
    assert balanced_accuracy_score(unseen, decide(own, probabilities, ("ok", "defective"))) == network
    assert balanced_accuracy_score(unseen, probabilities.argmax(axis=1)) < network - 0.1


def test_reported_errors_are_those_of_images_that_were_not_fitted_on() -> None:
    rng = np.random.default_rng(3)
    logits, targets = rng.normal(0, 3, (40, 8)), np.arange(40) % 8
    fitted = calibrated_probabilities(logits, fit_calibration(logits, targets))
    unseen = rng.normal(0, 3, (4000, 8))
    truth = calibration_errors(calibrated_probabilities(unseen, fit_calibration(logits, targets)), np.arange(4000) % 8)
    own = calibration_errors(cross_fitted(logits, targets, np.arange(40)), targets)
    assert calibration_errors(fitted, targets).nll < truth.nll - 0.01, "optimistic"
    assert own.nll == pytest.approx(truth.nll, abs=0.15) and own.nll > calibration_errors(fitted, targets).nll


def test_no_image_calibrates_itself_or_its_unit() -> None:
    rng = np.random.default_rng(4)
    units = np.repeat(np.arange(30), 3)
    targets, logits = np.repeat(np.arange(30) % 2, 3), rng.normal(size=(90, 2))
    before = cross_fitted(logits, targets, units)
    logits[units == 7] = [5.0, -5.0]
    after = cross_fitted(logits, targets, units)
    unchanged = {int(unit) for unit in units[(before == after).all(axis=1)]}
    assert len(unchanged) == 5, "the others of its fold"
    assert len(np.unique(after[units == 7], axis=0)) == 1, "one calibration for the whole unit"


def test_the_class_wise_error_sees_what_the_most_probable_label_hides() -> None:
    probabilities = np.tile([0.8, 0.15, 0.05], (100, 1))
    targets = np.repeat([0, 1, 2], [80, 5, 15])
    assert expected_calibration_error(probabilities, targets) == pytest.approx(0.0)
    assert classwise_calibration_error(probabilities, targets) == pytest.approx((0.0 + 0.1 + 0.1) / 3)


def test_too_few_images_of_a_label_get_a_temperature_alone_and_it_is_reported() -> None:
    targets, logits = np.repeat([0, 1], [60, 4]), np.random.default_rng(5).normal(size=(64, 2))
    done = calibrate({"qat": logits}, targets, np.arange(64), ("ok", "defective"), threshold=0.6)
    assert "fewer than 5 independent images of defective (4)" in done.notice and "temperature alone" in done.notice
    assert done.confidence["qat"].bias == () and done.confidence["qat"].threshold == 0.6
    assert bias_problem(("ok", "defective"), np.repeat([0, 1], [60, 5]), np.arange(65)) == ""
    assert "ok (3)" in bias_problem(("ok", "defective"), np.repeat([0, 1], 30), np.r_[np.arange(30) // 10, 3:33])


def test_an_empty_bias_is_zero() -> None:
    logits = np.array([[2.0, 0.0, -1.0]])
    for bias in ((), (0.0, 0.0, 0.0), (7.0, 7.0, 7.0)):
        assert calibrated_probabilities(logits, Confidence(2.0, bias=bias)) == pytest.approx(softmax(logits / 2))
