"""Simulations with known truth of calibration, of the threshold by cost, and of the intervals.

Each function returns the figure that has a bound; `benchmarks/truth.py` calls them with many repetitions, the tests
with few.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from eyas_device.bundle import Confidence
from eyas_device.decision import decide
from eyas_device.predict import calibrated_probabilities
from eyas_host.evaluation.bootstrap import Floats, Ints, label_intervals
from eyas_host.evaluation.calibration import fit_calibration
from eyas_host.evaluation.cost import bayes_threshold, choose_decision, mean_cost, threshold_costs
from eyas_host.evaluation.metrics import paired_loss

_PRIORS = np.array([0.90, 0.08, 0.02])
_MEANS = np.array([[0.0, 0.0], [2.0, 0.0], [0.0, 2.0]])
_COSTS = np.array([[0.0, 1.0, 1.0], [5.0, 0.0, 5.0], [10.0, 10.0, 0.0]])


def unbalanced_cost(images: int = 2_000, repetitions: int = 20, *, bias: bool = True, seed: int = 0) -> float:
    """Mean cost of the calibrated decisions over that of the Bayes decision, minus 1; three labels, .90/.08/.02.

    The network is perfect and trained with class weights: its logits are log likelihoods, as if all labels were equally
    frequent. It is calibrated on `images` and judged on 100,000 others.
    """
    rng = np.random.default_rng(seed)
    targets, logits = _three_labels(rng, 100_000)
    best = _decided_cost(calibrated_probabilities(logits + np.log(_PRIORS), Confidence()), targets)
    costs = []
    for _ in range(repetitions):
        seen, own = _three_labels(rng, images)
        confidence = fit_calibration(own, seen, bias=bias)
        costs.append(_decided_cost(calibrated_probabilities(logits, confidence), targets))
    return float(np.mean(costs)) / best - 1


def threshold_regret(
    images: int = 400, repetitions: int = 200, *, positives: float = 0.05, distance: float = 2.0, seed: int = 0
) -> float:
    """Mean cost at the chosen threshold over that at the Bayes threshold of the same probabilities, minus 1.

    A fraction `positives` is defective; a miss costs ten false alarms; the scores of both labels are `distance`
    standard deviations apart, and the probabilities are the true ones. Judged on 400,000 other images.
    """
    rng = np.random.default_rng(seed)
    costs = np.array([[0.0, 50.0], [5.0, 0.0]])
    targets, p = _two_labels(rng, 400_000, positives, distance)
    thresholds = [bayes_threshold(costs)]
    for _ in range(repetitions):
        seen, own = _two_labels(rng, images, positives, distance)
        decision = choose_decision(costs, ("defective", "ok"), own, seen)
        thresholds.append(decision.threshold if decision and decision.threshold is not None else 0.0)
    best, *chosen = threshold_costs(p[:, 0], (targets == 0).astype(np.float64), costs, np.array(thresholds))
    return float(np.mean(chosen)) / float(best) - 1


def grouped_coverage(
    simulations: int = 2_000, *, groups: int = 50, size: int = 10, accuracy: float = 0.8, correlation: float = 0.2
) -> float:
    """Fraction of 95 % intervals of balanced accuracy that hold the truth: `groups` of `size` images, of two labels.

    A group's own accuracy follows a beta distribution, so that two images of it have the intraclass `correlation`.
    """
    rng = np.random.default_rng(0)
    spread = 1 / correlation - 1
    targets, units = np.repeat(np.arange(groups) % 2, size), np.repeat(np.arange(groups), size)
    held = 0
    for seed in range(simulations):
        own = rng.beta(spread * accuracy, spread * (1 - accuracy), groups)
        right = rng.random(groups * size) < own[units]
        held += _holds(right, targets, accuracy, seed, units)
    return held / simulations


def rare_coverage(
    simulations: int = 2_000,
    *,
    images: int = 1_000,
    positives: float = 0.01,
    recall: float = 0.9,
    specificity: float = 0.99,
) -> float:
    """Fraction of 95 % intervals of balanced accuracy that hold the truth: independent images, a rare label."""
    rng = np.random.default_rng(0)
    held = 0
    for seed in range(simulations):
        targets = (rng.random(images) < positives).astype(np.int64)
        targets[0] = 1
        right = rng.random(images) < np.where(targets == 1, recall, specificity)
        held += _holds(right, targets, (recall + specificity) / 2, seed)
    return held / simulations


def bound_coverage(simulations: int = 2_000, *, images: int = 400, loss: float = 0.005) -> float:
    """Fraction of one-sided 95 % bounds on a loss of accuracy that hold it: images that one network alone gets right.

    A fraction `loss` is right before and wrong after, and nothing else differs, so that many simulations have no
    difference at all.
    """
    rng = np.random.default_rng(0)
    targets = np.arange(images) % 2
    before = np.eye(2)[targets]
    held = 0
    for seed in range(simulations):
        after = np.where((rng.random(images) < loss)[:, None], before[:, ::-1], before)
        held += paired_loss(before, after, targets, seed=seed).bound >= loss
    return held / simulations


def _holds(right: npt.NDArray[np.bool_], targets: Ints, truth: float, seed: int, units: Ints | None = None) -> bool:
    predicted = np.where(right, targets, 1 - targets)
    low, high = label_intervals(predicted, targets, 2, units=units, seed=seed)["balanced_accuracy"]
    return bool(low <= truth <= high)


def _three_labels(rng: np.random.Generator, images: int) -> tuple[Ints, Floats]:
    """Labels [n] and log likelihoods [n, 3] of images by one point each, normal around the label's mean."""
    targets = rng.choice(3, images, p=_PRIORS)
    points = _MEANS[targets] + rng.normal(size=(images, 2))
    return targets, -np.square(points[:, None] - _MEANS).sum(axis=2) / 2


def _two_labels(rng: np.random.Generator, images: int, positives: float, distance: float) -> tuple[Ints, Floats]:
    """Labels [n], 0 is defective, and true probabilities [n, 2]."""
    targets = (rng.random(images) >= positives).astype(np.int64)
    scores = rng.normal(size=images) + distance * (targets == 0)
    odds = np.exp(distance * scores - distance**2 / 2) * positives / (1 - positives)
    return targets, np.stack([odds, np.ones(images)], axis=1) / (1 + odds)[:, None]


def _decided_cost(probabilities: Floats, targets: Ints) -> float:
    labels = ("a", "b", "c")
    decision = choose_decision(_COSTS, labels, probabilities, targets)
    return mean_cost(decide(probabilities, probabilities, labels, decision), targets, _COSTS)
