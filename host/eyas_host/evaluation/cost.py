"""Misclassification costs, and the decision rule with the lowest expected cost.

A cost matrix has a row for each true label and a column for each predicted label. For two labels the threshold on the
calibrated probability of the positive class is chosen on validation; for more, the rule is the Bayes decision under the
calibrated probabilities.
"""

from __future__ import annotations

import msgspec
import numpy as np
import numpy.typing as npt

from eyas_device.decision import Decision, decide
from eyas_host.evaluation.bootstrap import Floats, Ints
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


def choose_decision(
    costs: Matrix | None, labels: tuple[str, ...], probabilities: Floats, targets: Ints, *, currency: str = ""
) -> Decision | None:
    """The decision rule with the lowest cost on these images: calibrated probabilities [n, classes], labels [n].

    None without costs: the most probable label is predicted.
    """
    if costs is None:
        return None
    rows = tuple(tuple(float(cost) for cost in row) for row in costs)
    decision = Decision(costs=rows, currency=currency)
    if len(labels) != 2:
        return decision
    positive = positive_class(costs)
    candidates = thresholds(probabilities[:, positive], bayes_threshold(costs))
    prices = threshold_costs(probabilities[:, positive], targets, costs, candidates)
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
    probabilities: Floats, targets: Ints, costs: Matrix, at: npt.NDArray[np.float64]
) -> npt.NDArray[np.float64]:
    """Mean cost per image at each threshold [k] on the positive class's probabilities [n]; labels [n] of two."""
    positive = positive_class(costs)
    total = np.zeros(len(at))
    for label in range(2):
        own = np.sort(np.asarray(probabilities, dtype=np.float64)[targets == label])
        reported = len(own) - np.searchsorted(own, at, side="left")
        total += reported * costs[label, positive] + (len(own) - reported) * costs[label, 1 - positive]
    return total / len(targets)


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
    """95 % bootstrap interval of `decided`."""
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
        prices = threshold_costs(probabilities[:, labels.index(decision.label)], targets, costs, at)
        curve = tuple(CostPoint(float(t), float(cost)) for t, cost in zip(at, prices, strict=True))
    return SplitCost(
        split=split,
        images=len(targets),
        decided=mean_cost(decide(probabilities, labels, decision), targets, costs),
        likeliest=mean_cost(probabilities.argmax(axis=1), targets, costs),
        constant=mean_cost(np.full(len(targets), constant), targets, costs),
        interval=interval,
        curve=curve,
    )


def cheapest_constant(costs: Matrix, targets: Ints) -> int:
    """Index of the label that costs least if it is always predicted, for labels [n]."""
    return int(costs[targets].mean(axis=0).argmin())
