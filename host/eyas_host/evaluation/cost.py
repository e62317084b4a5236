"""Misclassification costs, and the decision rule with the lowest expected cost.

A cost matrix has a row for each true label and a column for each predicted label. For two labels the threshold on the
calibrated probability of the positive class is chosen on validation, shrunk towards the Bayes threshold; for more, the
rule is the Bayes decision under the calibrated probabilities.
"""

from __future__ import annotations

import msgspec
import numpy as np
import numpy.typing as npt

from eyas_device.decision import Decision, decide
from eyas_host.evaluation.bootstrap import Floats, Ints
from eyas_host.recipe.accept import AcceptSection
from eyas_host.recipe.cost import CostSection
from eyas_host.support.errors import RecipeError

Matrix = npt.NDArray[np.float64]
"""float64 [true label, predicted label]."""


class CostPoint(msgspec.Struct, frozen=True):
    """Mean cost per image at a threshold."""

    threshold: float
    cost: float


def cost_matrix(section: CostSection, labels: tuple[str, ...]) -> Matrix | None:
    """The recipe's cost table as a matrix [true label, predicted label]; None without a table.

    Raises `RecipeError` for an unknown label, a mistake without a cost, a mistake that costs less than the correct
    prediction, and a label that no mistake costs anything for.
    """
    if not section.table:
        return None
    named = {true: set(row) for true, row in section.table.items()}
    unknown = sorted((set(named) | set().union(*named.values())) - set(labels))
    if unknown:
        raise RecipeError(f"[cost] table: no label {unknown[0]!r} in the data; allowed: {', '.join(labels)}")
    rows = []
    for true in labels:
        row = section.table.get(true, {})
        missing = [label for label in labels if label != true and label not in row]
        if missing and section.other is None:
            raise RecipeError(
                f"[cost] table: {true!r} predicted as {missing[0]!r} has no cost; add it, or set [cost] other"
            )
        rows.append([row.get(label, 0.0 if label == true else section.other or 0.0) for label in labels])
        correct = rows[-1][labels.index(true)]
        if min(rows[-1]) < correct:
            raise RecipeError(
                f"[cost] table: a mistake on {true!r} costs less than the correct prediction ({correct:g})"
            )
        if max(rows[-1]) <= correct:
            raise RecipeError(f"[cost] table: no mistake on {true!r} costs more than the correct prediction")
    return np.asarray(rows)


def accepted_class(accept: AcceptSection, labels: tuple[str, ...], costs: Matrix | None) -> str:
    """The class whose recall `[accept] min_recall` bounds: as named, or the one whose miss costs most; else empty.

    Raises `RecipeError` for an unknown class, and where a recall is asked for but no miss costs more than the others.
    """
    if accept.positive_class:
        if accept.positive_class not in labels:
            raise RecipeError(
                f"[accept] positive_class: no label {accept.positive_class!r} in the data; allowed: {', '.join(labels)}"
            )
        return accept.positive_class
    if costs is None:
        return ""
    misses = (costs.sum(axis=1) - np.diag(costs)) / (len(labels) - 1) - np.diag(costs)
    dearest = np.flatnonzero(np.isclose(misses, misses.max()))
    if len(dearest) == 1:
        return labels[int(dearest[0])]
    if accept.min_recall is not None:
        raise RecipeError(
            "[accept] min_recall: by [cost] no class costs most to miss; name one in [accept] positive_class"
        )
    return ""


def choose_decision(
    costs: Matrix | None, labels: tuple[str, ...], probabilities: Floats, targets: Ints, *, currency: str = ""
) -> Decision | None:
    """The decision rule for these costs: calibrated probabilities [n, classes] and labels [n] of validation.

    For two labels the threshold with the lowest cost over images whose label y is shrunk towards the probability p of
    the positive class: w p + (1 - w) y, where w = 100 / (100 + positive images). The cost under p alone is lowest at
    the Bayes threshold, that of few labels anywhere near it: the cheapest threshold of 20 positive images costs 7 %
    more on other images. None without costs: the network's own label is predicted.
    """
    if costs is None:
        return None
    rows = tuple(tuple(float(cost) for cost in row) for row in costs)
    decision = Decision(costs=rows, currency=currency)
    if len(labels) != 2:
        return decision
    positive = positive_class(costs)
    candidates = thresholds(probabilities[:, positive], bayes_threshold(costs))
    positives = targets == positive
    shrinkage = _PRIOR_POSITIVES / (_PRIOR_POSITIVES + positives.sum())
    weights = shrinkage * probabilities[:, positive] + (1 - shrinkage) * positives
    prices = threshold_costs(probabilities[:, positive], weights, costs, candidates)
    cheapest = candidates[prices <= prices.min() * (1 + 1e-12)]
    chosen = cheapest[np.abs(cheapest - bayes_threshold(costs)).argmin()]
    return msgspec.structs.replace(decision, label=labels[positive], threshold=float(chosen))


def positive_class(costs: Matrix) -> int:
    """Index of the positive class of two: the one with the larger false-negative cost (net of the diagonal)."""
    return int(costs[1, 0] - costs[1, 1] > costs[0, 1] - costs[0, 0])


def bayes_threshold(costs: Matrix) -> float:
    """The cost-optimal threshold on the positive class's probability, if probabilities are exact.

    false alarm / (false alarm + miss), each net of the correct prediction's cost. Source: Elkan, "The Foundations of
    Cost-Sensitive Learning", 2001, equation 2.
    """
    positive = positive_class(costs)
    miss = costs[positive, 1 - positive] - costs[positive, positive]
    alarm = costs[1 - positive, positive] - costs[1 - positive, 1 - positive]
    return float(alarm / (alarm + miss))


def thresholds(probabilities: Floats, extra: float) -> npt.NDArray[np.float64]:
    """All distinct decision thresholds for these probabilities [n] plus `extra`, ascending."""
    values = np.unique(np.asarray(probabilities, dtype=np.float64))
    between = (values[1:] + values[:-1]) / 2
    return np.unique(np.concatenate([[0.0], between, [(values[-1] + 1) / 2, extra]]))


def threshold_costs(
    probabilities: Floats, positives: Floats, costs: Matrix, at: npt.NDArray[np.float64]
) -> npt.NDArray[np.float64]:
    """Mean cost per image at each threshold [k] on the positive class's probabilities [n].

    `positives` [n], 0 to 1, is how much of each image is of the positive class: its label, or a probability.
    """
    positive = positive_class(costs)
    order = np.argsort(probabilities)
    first = np.searchsorted(np.asarray(probabilities, dtype=np.float64)[order], at, side="left")
    total = np.zeros(len(at))
    for label, weights in ((positive, positives[order]), (1 - positive, 1.0 - positives[order])):
        below = np.concatenate([[0.0], np.cumsum(weights)])
        total += (below[-1] - below[first]) * costs[label, positive] + below[first] * costs[label, 1 - positive]
    return total / len(positives)


def mean_cost(predicted: Ints, targets: Ints, costs: Matrix) -> float:
    """Mean cost per image, for predicted and true labels [n]."""
    return float(costs[targets, predicted].mean())


class SplitCost(msgspec.Struct, frozen=True, kw_only=True):
    """Mean cost per image on one split, under the bundle's decision rule and under two simpler ones."""

    split: str
    images: int
    decided: float
    """Under the bundle's decision rule."""
    likeliest: float
    """If the most probable label were predicted."""
    constant: float
    """If `constant_label` were always predicted."""
    interval: tuple[float, float] | None = None
    """95 % bootstrap interval over units of `decided`."""
    curve: tuple[CostPoint, ...] = ()
    """Cost against the threshold, for two labels."""


class CostFigures(msgspec.Struct, frozen=True, kw_only=True):
    """Costs of the shipped model's predictions."""

    decision: Decision
    bayes_threshold: float | None
    """The optimal threshold if the probabilities were exact."""
    constant_label: str
    """The label that costs least on validation if it is always predicted."""
    splits: tuple[SplitCost, ...]


_CURVE_POINTS = 201
_PRIOR_POSITIVES = 100
"""Positive images that the Bayes threshold weighs as much as: with 20 of its own its mean regret is below 1 %."""


def split_cost(
    split: str,
    decision: Decision,
    labels: tuple[str, ...],
    probabilities: Floats,
    targets: Ints,
    *,
    constant: int,
    interval: tuple[float, float] | None = None,
) -> SplitCost:
    """Costs on one split: calibrated probabilities [n, classes], labels [n]; `constant` is the constant prediction."""
    costs = np.asarray(decision.costs)
    curve: tuple[CostPoint, ...] = ()
    if decision.label is not None:
        at = np.linspace(0.0, 1.0, _CURVE_POINTS)
        positive = labels.index(decision.label)
        prices = threshold_costs(probabilities[:, positive], (targets == positive).astype(np.float64), costs, at)
        curve = tuple(CostPoint(float(t), float(cost)) for t, cost in zip(at, prices, strict=True))
    return SplitCost(
        split=split,
        images=len(targets),
        decided=mean_cost(decide(probabilities, probabilities, labels, decision), targets, costs),
        likeliest=mean_cost(probabilities.argmax(axis=1), targets, costs),
        constant=mean_cost(np.full(len(targets), constant), targets, costs),
        interval=interval,
        curve=curve,
    )


def cheapest_constant(costs: Matrix, targets: Ints) -> int:
    """Index of the label that costs least if it is always predicted, for labels [n]."""
    return int(costs[targets].mean(axis=0).argmin())
