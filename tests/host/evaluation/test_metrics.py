"""Metrics and bootstrap intervals against second formulations."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats
from sklearn import metrics as sk

from benchmarks.simulations import bound_coverage, grouped_coverage, rare_coverage
from eyas_host.evaluation.bootstrap import intervals, weighted_areas, wilson_interval
from eyas_host.evaluation.metrics import paired_loss, score, softmax


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
def test_intervals_of_many_images_are_those_of_a_plain_bootstrap(classes: int) -> None:
    p, targets = predictions_of(classes, n=400, seed=5)
    p = p / p.sum(axis=1, keepdims=True)
    costs = np.arange(classes**2, dtype=float).reshape(classes, classes)
    predicted = p.argmax(axis=1)
    found = intervals(p, predicted, targets, costs=costs, seed=1)
    assert score(p, targets, seed=1).balanced_accuracy_ci == pytest.approx(found["balanced_accuracy"], abs=1e-12)
    rng = np.random.default_rng(2)
    plain: dict[str, list[float]] = {name: [] for name in found}
    for _ in range(200):
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


@pytest.mark.parametrize("right", [(2, 3), (5, 5), (60, 5), (200, 4), (30, 30, 30, 30)])
def test_no_mistake_is_not_certainty(right: tuple[int, ...]) -> None:
    targets = np.repeat(np.arange(len(right)), right)
    p = 0.9 * np.eye(len(right))[targets] + 0.1 / len(right)
    found = intervals(p, targets, targets, costs=1.0 - np.eye(len(right)))
    for name, (low, high) in found.items():
        assert (low == 0.0 and high > 0.002) if name == "cost" else (high == 1.0 and low < 0.998), name
    fewest, joint = (stats.binomtest(n, n).proportion_ci(method="wilson").low for n in (min(right), sum(right)))
    expected = joint if max(right) < 2 * min(right) else (1 + fewest) / 2
    assert found["balanced_accuracy"][0] == pytest.approx(expected, abs=0.03), "of all, or of the label with the fewest"
    assert found["accuracy"][0] == pytest.approx(joint, abs=0.03)


def test_score_and_intervals_say_the_same() -> None:
    p, targets = predictions_of(3)
    units = np.arange(len(targets)) // 3
    for own in (None, units):
        found = intervals(p, p.argmax(axis=1), targets, units=own)
        assert score(p, targets, units=own).balanced_accuracy_ci == found["balanced_accuracy"]


@pytest.mark.parametrize("size", [1, 4])
def test_copies_of_images_in_one_unit_count_once(size: int) -> None:
    p, targets = predictions_of(2, n=200)
    many = [np.repeat(values, size, axis=0) for values in (p, p.argmax(axis=1), targets)]
    units = np.repeat(np.arange(200), size)
    few, found = intervals(p, p.argmax(1), targets), intervals(*many, units=units)
    for name in few:
        assert found[name] == pytest.approx(few[name], abs=1e-9), name
    recall = p.argmax(axis=1)[targets == 1] == 1
    copies = wilson_interval(np.repeat(recall, size), np.repeat(np.arange(len(recall)), size))
    exact = stats.binomtest(int(recall.sum()), len(recall)).proportion_ci(method="wilson")
    assert copies == pytest.approx((exact.low, exact.high), abs=0.004 if size > 1 else 1e-12)
    assert wilson_interval(np.ones(40, bool), np.arange(40) // 8)[0] == pytest.approx(
        stats.binomtest(5, 5).proportion_ci(method="wilson").low
    )


def test_intervals_cover_the_truth_in_groups_and_at_1_percent() -> None:
    assert 0.92 <= grouped_coverage(400) <= 0.98
    assert 0.92 <= rare_coverage(300) <= 0.985


@pytest.mark.parametrize(("images", "bound"), [((10, 10), 3 / 20), ((200, 200), 3 / 400), ((4, 396), 0.527 / 2)])
def test_a_difference_that_was_never_seen_is_bounded_by_the_rule_of_three(
    images: tuple[int, int], bound: float
) -> None:
    targets = np.repeat([0, 1], images)
    same, pairs = np.eye(2)[targets], np.repeat(np.arange(len(targets)), 2)
    found = paired_loss(same, same, targets)
    assert found.loss == 0.0 and found.bound == pytest.approx(bound, rel=0.1)
    assert found.interval[0] == pytest.approx(-found.interval[1]) and found.interval[1] > found.bound
    copied = paired_loss(*(np.repeat(values, 2, axis=0) for values in (same, same, targets)), units=pairs)
    assert copied.bound == pytest.approx(bound, rel=0.1), "two images of each unit count once"


def test_a_bound_holds_a_small_loss() -> None:
    assert bound_coverage(300) >= 0.93
