"""Metrics and bootstrap intervals against second formulations."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats
from sklearn import metrics as sk

from eyas_host.evaluation.bootstrap import intervals, weighted_areas
from eyas_host.evaluation.metrics import score, softmax


def predictions_of(classes: int, n: int = 300, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities [n, classes], some of them equal, and correlated labels [n]."""
    rng = np.random.default_rng(seed)
    targets = rng.choice(classes, n, p=np.arange(1, classes + 1) / np.arange(1, classes + 1).sum())
    logits = rng.normal(size=(n, classes)) + 1.2 * np.eye(classes)[targets]
    return softmax(logits).round(2), targets


@pytest.mark.parametrize("classes", [2, 4])
def test_scores_follow_their_definitions(classes: int) -> None:
    p, targets = predictions_of(classes)
    scores = score(p, targets)
    predicted = p.argmax(axis=1)
    f1, support = [], []
    for label, own in enumerate(scores.classes):
        hit = int(((predicted == label) & (targets == label)).sum())
        assert own.support == (targets == label).sum()
        assert own.recall == pytest.approx(hit / own.support)
        assert own.precision == pytest.approx(hit / (predicted == label).sum())
        f1.append(2 * own.precision * own.recall / (own.precision + own.recall))
        support.append(own.support)
        positive, negative = p[targets == label, label], p[targets != label, label]
        wins = (positive[:, None] > negative).mean() + 0.5 * (positive[:, None] == negative).mean()
        assert own.auc == pytest.approx(wins), "AUC is the probability that a positive scores above a negative"
        precision, recall, _ = sk.precision_recall_curve(targets == label, p[:, label])
        assert own.average_precision == pytest.approx(-(np.diff(recall) * precision[:-1]).sum())
    assert [own.f1 for own in scores.classes] == pytest.approx(f1)
    assert scores.f1 == pytest.approx(np.mean(f1))
    assert scores.weighted_f1 == pytest.approx(np.average(f1, weights=support))
    assert scores.pr_auc == pytest.approx(np.mean([own.average_precision for own in scores.classes]))
    assert scores.auc == pytest.approx(np.mean([own.auc for own in scores.classes]))
    squares = [sum((p[n, c] - (c == t)) ** 2 for c in range(classes)) for n, t in enumerate(targets)]
    assert scores.brier == pytest.approx(np.mean(squares))
    clipped = np.maximum(p, 1e-12)
    assert scores.nll == pytest.approx(np.mean([-np.log(clipped[n, t]) for n, t in enumerate(targets)]))


def test_scores_of_a_decision_rule_other_than_argmax() -> None:
    p, targets = predictions_of(2)
    other = (p[:, 1] >= 0.2).astype(np.int64)
    argmax, moved = score(p, targets), score(p, targets, predicted=other)
    assert moved.classes[1].recall > argmax.classes[1].recall
    assert moved.confusion[0][1] == int(((targets == 0) & (other == 1)).sum())
    assert (moved.auc, moved.ece, moved.nll) == (argmax.auc, argmax.ece, argmax.nll)


def test_a_split_without_a_label_has_no_area_for_it() -> None:
    p, _ = predictions_of(3, n=20)
    scores = score(p, np.arange(20) % 2)
    assert scores.pr_auc is None and scores.classes[2].support == 0
    assert scores.classes[2].auc is None and scores.classes[0].auc is not None
    assert "auc" not in intervals(p, p.argmax(1), np.arange(20) % 2)


def test_weighted_areas_are_scikit_learns() -> None:
    p, targets = predictions_of(2, n=80, seed=3)
    counts = np.random.default_rng(1).multinomial(80, np.full(80, 1 / 80), size=5).astype(float)
    area, precision = weighted_areas(counts, p[:, 1], targets == 1)
    for row in range(5):
        assert area[row] == pytest.approx(sk.roc_auc_score(targets, p[:, 1], sample_weight=counts[row]))
        assert precision[row] == pytest.approx(sk.average_precision_score(targets, p[:, 1], sample_weight=counts[row]))


@pytest.mark.parametrize("classes", [2, 3])
def test_intervals_are_those_of_a_plain_bootstrap(classes: int) -> None:
    p, targets = predictions_of(classes, n=150, seed=5)
    p = p / p.sum(axis=1, keepdims=True)
    costs = np.arange(classes**2, dtype=float).reshape(classes, classes)
    predicted = p.argmax(axis=1)
    found = intervals(p, predicted, targets, costs=costs, seed=1)
    assert score(p, targets, seed=1).balanced_accuracy_ci == pytest.approx(found["balanced_accuracy"], abs=1e-12)
    rng = np.random.default_rng(2)
    plain: dict[str, list[float]] = {name: [] for name in found}
    for _ in range(300):
        rows = np.concatenate([rng.choice(own, len(own)) for own in (np.flatnonzero(targets == c) for c in range(3))])
        own, label, true = p[rows], predicted[rows], targets[rows]
        rank = own[:, 1] if classes == 2 else own
        plain["accuracy"].append(sk.accuracy_score(true, label))
        plain["balanced_accuracy"].append(sk.balanced_accuracy_score(true, label))
        plain["f1"].append(sk.f1_score(true, label, average="macro"))
        plain["weighted_f1"].append(sk.f1_score(true, label, average="weighted"))
        plain["auc"].append(sk.roc_auc_score(true, rank, multi_class="ovr"))
        plain["pr_auc"].append(sk.average_precision_score(np.eye(classes)[true], own))
        plain["cost"].append(costs[targets[rows], predicted[rows]].mean())
    for name, (low, high) in found.items():
        assert low < np.mean(plain[name]) < high
        spread = np.quantile(plain[name], (0.025, 0.975))
        assert (low, high) == pytest.approx(tuple(spread), abs=0.2 * (spread[1] - spread[0])), name


def test_an_interval_narrows_with_the_root_of_the_images() -> None:
    p, targets = predictions_of(2, n=200)
    few = intervals(p, p.argmax(1), targets)
    many = intervals(np.tile(p, (9, 1)), np.tile(p.argmax(1), 9), np.tile(targets, 9))
    for name, (low, high) in few.items():
        assert (many[name][1] - many[name][0]) / (high - low) == pytest.approx(1 / 3, rel=0.2), name
    recall = stats.binomtest(int((p.argmax(1) == targets).sum()), 200).proportion_ci().high
    assert few["accuracy"][1] == pytest.approx(recall, abs=0.03)
