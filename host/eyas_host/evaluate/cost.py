"""What wrong answers cost, and the decision that is expected to cost least.

A cost matrix has a row for each true label and a column for each answer. For two labels a threshold on the calibrated
probability of the dear one is chosen on validation; for more, the Bayes decision under the calibrated probabilities.
"""

from __future__ import annotations

import msgspec
import numpy as np
import numpy.typing as npt

from eyas_device.decision import Decision, decide
from eyas_host.evaluate.metrics import Floats, Ints
from eyas_host.recipe.cost import CostSection
from eyas_host.support.errors import RecipeError

Matrix = npt.NDArray[np.float64]
"""float64 [true label, answer]."""


class CostPoint(msgspec.Struct, frozen=True):
    """The mean cost of an image at a threshold."""

    threshold: float
    cost: float


def cost_matrix(section: CostSection, labels: tuple[str, ...]) -> Matrix | None:
    """The recipe's table for these labels [labels, labels]; None without one.

    Raises `RecipeError` for a label that the data does not have, a mistake without a cost, a mistake that costs less
    than the right answer, and a label that no answer is wrong for.
    """
    if not section.table:
        return None
    named = {true: set(row) for true, row in section.table.items()}
    unknown = sorted((set(named) | set().union(*named.values())) - set(labels))
    if unknown:
        raise RecipeError(f"[cost] table: no label {unknown[0]!r} in the data; allowed: {', '.join(labels)}")
    rows = []
    for true in labels:
        given = section.table.get(true, {})
        missing = [answer for answer in labels if answer != true and answer not in given]
        if missing and section.other is None:
            raise RecipeError(
                f"[cost] table: {true!r} answered as {missing[0]!r} has no cost; name it, or set [cost] other"
            )
        rows.append([given.get(answer, 0.0 if answer == true else section.other or 0.0) for answer in labels])
        right = rows[-1][labels.index(true)]
        if min(rows[-1]) < right:
            raise RecipeError(f"[cost] table: a wrong answer for {true!r} costs less than the right one ({right:g})")
        if max(rows[-1]) <= right:
            raise RecipeError(f"[cost] table: no wrong answer for {true!r} costs more than the right one")
    return np.asarray(rows)


def choose_decision(
    costs: Matrix | None, labels: tuple[str, ...], probabilities: Floats, targets: Ints, *, currency: str = ""
) -> Decision | None:
    """The decision with the least cost on these images: calibrated probabilities [n, classes], labels [n].

    None without costs: the likeliest label is the answer.
    """
    if costs is None:
        return None
    rows = tuple(tuple(float(cost) for cost in row) for row in costs)
    decision = Decision(costs=rows, currency=currency)
    if len(labels) != 2:
        return decision
    dear = dear_label(costs)
    candidates = thresholds(probabilities[:, dear], bayes_threshold(costs))
    prices = threshold_costs(probabilities[:, dear], targets, costs, candidates)
    cheapest = candidates[prices <= prices.min() * (1 + 1e-12)]
    chosen = cheapest[np.abs(cheapest - bayes_threshold(costs)).argmin()]
    return msgspec.structs.replace(decision, label=labels[dear], threshold=float(chosen))


def dear_label(costs: Matrix) -> int:
    """Of two labels the one whose miss costs more beyond its right answer."""
    return int(costs[1, 0] - costs[1, 1] > costs[0, 1] - costs[0, 0])


def bayes_threshold(costs: Matrix) -> float:
    """The probability of the dear one of two labels from which answering it costs least, if probabilities are true.

    false alarm / (false alarm + miss), each beyond the right answer's cost. Source: Elkan, "The Foundations of
    Cost-Sensitive Learning", 2001, equation 2.
    """
    dear = dear_label(costs)
    miss = costs[dear, 1 - dear] - costs[dear, dear]
    alarm = costs[1 - dear, dear] - costs[1 - dear, 1 - dear]
    return float(alarm / (alarm + miss))


def thresholds(probabilities: Floats, beside: float) -> npt.NDArray[np.float64]:
    """Ascending thresholds that tell these probabilities [n] apart in every possible way, and one more."""
    places = np.unique(np.asarray(probabilities, dtype=np.float64))
    between = (places[1:] + places[:-1]) / 2
    return np.unique(np.concatenate([[0.0], between, [(places[-1] + 1) / 2, beside]]))


def threshold_costs(
    probabilities: Floats, targets: Ints, costs: Matrix, at: npt.NDArray[np.float64]
) -> npt.NDArray[np.float64]:
    """Mean cost of an image at each threshold [k] on the dear label's probabilities [n]; labels [n] of two."""
    dear = dear_label(costs)
    total = np.zeros(len(at))
    for label in range(2):
        own = np.sort(np.asarray(probabilities, dtype=np.float64)[targets == label])
        answered_dear = len(own) - np.searchsorted(own, at, side="left")
        total += answered_dear * costs[label, dear] + (len(own) - answered_dear) * costs[label, 1 - dear]
    return total / len(targets)


def mean_cost(answers: Ints, targets: Ints, costs: Matrix) -> float:
    """Mean cost of an image, for answers and labels [n]."""
    return float(costs[targets, answers].mean())


class PartCost(msgspec.Struct, frozen=True, kw_only=True):
    """The mean cost of an image on one part of the data, as the bundle decides and otherwise."""

    part: str
    images: int
    decided: float
    """As the bundle decides."""
    likeliest: float
    """If the likeliest label were the answer."""
    constant: float
    """If `constant_label` were always the answer, without looking."""
    interval: tuple[float, float] | None = None
    """Of `decided`, 95 % bootstrap over images."""
    curve: tuple[CostPoint, ...] = ()
    """Against the threshold, for two labels."""


class CostFigures(msgspec.Struct, frozen=True, kw_only=True):
    """What the shipped model's answers cost."""

    decision: Decision
    bayes_threshold: float | None
    """What the threshold would be if the probabilities were true."""
    constant_label: str
    """Which label always answered costs least on validation."""
    parts: tuple[PartCost, ...]


_CURVE_POINTS = 201


def part_cost(
    part: str,
    decision: Decision,
    labels: tuple[str, ...],
    probabilities: Floats,
    targets: Ints,
    *,
    constant: int,
    interval: tuple[float, float] | None = None,
) -> PartCost:
    """Costs on one part, for calibrated probabilities [n, classes] and labels [n]; `constant` is always answered."""
    costs = np.asarray(decision.costs)
    curve: tuple[CostPoint, ...] = ()
    if decision.label is not None:
        at = np.linspace(0.0, 1.0, _CURVE_POINTS)
        prices = threshold_costs(probabilities[:, labels.index(decision.label)], targets, costs, at)
        curve = tuple(CostPoint(float(t), float(cost)) for t, cost in zip(at, prices, strict=True))
    return PartCost(
        part=part,
        images=len(targets),
        decided=mean_cost(decide(probabilities, labels, decision), targets, costs),
        likeliest=mean_cost(probabilities.argmax(axis=1), targets, costs),
        constant=mean_cost(np.full(len(targets), constant), targets, costs),
        interval=interval,
        curve=curve,
    )


def cheapest_constant(costs: Matrix, targets: Ints) -> int:
    """The label that costs least if it is always answered, for labels [n]."""
    return int(costs[targets].mean(axis=0).argmin())
