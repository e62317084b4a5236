"""Bootstrap confidence intervals over units, with a prior that keeps few errors from looking like none.

Images of one unit (a group, or near-duplicates) are not independent, so whole units are drawn: each draw weighs every
unit by a standard exponential variable (the Bayesian bootstrap, Rubin 1981; with weights no draw can lose a label). The
images of each label are then scaled to their number.

Where all predictions of a label are right, the draws of its images alone would all say 100 %. Hence each label gets a
prior: pseudo-units of its mean size, one part right and one part wrong, whose weights are gamma variables. For two
equally frequent labels these are half a unit each, so that the interval of each recall is Jeffreys' (Brown, Cai and
DasGupta, "Interval Estimation for a Binomial Proportion", 2001), and balanced accuracy averages their posteriors
(Brodersen et al., "The Balanced Accuracy and Its Posterior Distribution", 2010).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.stats import norm

Floats = npt.NDArray[np.floating]
Ints = npt.NDArray[np.int64]
Draws = npt.NDArray[np.float64]
"""float64 [draws]: one figure in each draw."""
Weights = npt.NDArray[np.float64]
"""float64 [draws, images]: the weight of each image in each draw."""

_DRAWS = 2000
_MIN_AREA_DRAWS = 200
_MAX_AREA_WORK = 10_000_000
"""Images times draws times labels above which areas under curves take fewer draws: seconds, not minutes."""
_BLOCK = 2_000_000
"""Weights in memory at a time."""


def intervals(
    probabilities: Floats,
    predicted: Ints,
    targets: Ints,
    *,
    units: Ints | None = None,
    costs: npt.NDArray[np.float64] | None = None,
    seed: int = 0,
) -> dict[str, tuple[float, float]]:
    """Figure -> 95 % interval, for probabilities [n, classes], predicted and true labels [n].

    accuracy, balanced_accuracy, f1 and weighted_f1 of the predicted labels; auc and pr_auc (means over the classes) of
    the probabilities, if each class has images; with costs [true label, prediction] the mean cost per image. `units`
    [n] numbers the images' units; without it each image is one.
    """
    classes = probabilities.shape[1]
    found = label_intervals(predicted, targets, classes, units=units, costs=costs, seed=seed)
    if len(np.unique(targets)) == classes:
        found |= _area_intervals(probabilities, targets, _numbered(targets, units), seed)
    return found


def label_intervals(
    predicted: Ints,
    targets: Ints,
    classes: int,
    *,
    units: Ints | None = None,
    costs: npt.NDArray[np.float64] | None = None,
    seed: int = 0,
) -> dict[str, tuple[float, float]]:
    """`intervals` of the figures that follow from predicted and true labels [n] alone."""
    from scipy.sparse import coo_matrix  # takes half a second to import

    unit = _numbered(targets, units)
    cells = coo_matrix((np.ones(len(targets)), (unit, targets * classes + predicted)), (unit.max() + 1, classes**2))
    distinct, multiplicity = _distinct(cells.tocsr())
    share, size = _prior(targets, unit, classes)
    prior = np.random.default_rng([seed, 1])
    draws: dict[str, list[Draws]] = {}
    for weights in _unit_weights(multiplicity, _DRAWS, classes**2, seed):
        confusion = np.asarray(weights @ distinct).reshape(-1, classes, classes)
        right, wrong = (prior.standard_gamma(share, (len(weights), classes)) * size for _ in range(2))
        confusion += (wrong / (classes - 1))[:, :, None]
        confusion[:, range(classes), range(classes)] += right - wrong / (classes - 1)
        for name, values in _label_metrics(confusion, predicted, targets, costs).items():
            draws.setdefault(name, []).append(values)
    eye = np.eye(classes)
    observed = _label_metrics((eye[targets].T @ eye[predicted])[None], predicted, targets, costs)
    return {name: _interval(np.concatenate(values), observed[name][0]) for name, values in draws.items()}


def wilson_interval(right: npt.NDArray[np.bool_], units: Ints | None = None) -> tuple[float, float]:
    """95 % Wilson score interval of a fraction: of `right` [n], n > 0, with as many images as their units are worth.

    The effective number of images is n over the design effect, the variance of the fraction between units over that of
    independent images (Rao and Scott, "A Simple Method for the Analysis of Clustered Binary Data", 1992); where all or
    none are right, so that no variance is seen, it is the number of units.
    """
    unit = _numbered(right, units)
    n, count, p = len(right), int(unit.max()) + 1, float(right.mean())
    effective = float(count)
    if 0 < p < 1 and count > 1:
        residuals = np.bincount(unit, weights=right - p)
        between = float(np.square(residuals).sum()) / n**2 * count / (count - 1)
        effective = n / max(1.0, between / (p * (1 - p) / (n - 1)))
    z = float(norm.ppf(0.975))
    centre, half = p + z**2 / 2 / effective, z * math.sqrt(p * (1 - p) / effective + z**2 / 4 / effective**2)
    scale = 1 + z**2 / effective
    return max(0.0, (centre - half) / scale), min(1.0, (centre + half) / scale)


def paired_draws(
    gaps: npt.NDArray[np.float64],
    targets: Ints,
    classes: int,
    *,
    units: Ints | None = None,
    adverse: float,
    seed: int = 0,
) -> Draws:
    """Draws of the class-balanced mean of `gaps` [n], each -1 to 1, with one more unit whose gap is `adverse`.

    The unit is shared by the labels, most of it to the one with the fewest units. Without it, images that agree
    throughout would bound the difference by 0; with it n such units bound it by about 3 / n, the rule of three (Hanley
    and Lippman-Hand, "If Nothing Goes Wrong, Is Everything All Right?", 1983), as Clopper and Pearson's limit does.
    """
    unit = _numbered(targets, units)
    counts, sums = (np.zeros((unit.max() + 1, classes)) for _ in range(2))
    np.add.at(counts, (unit, targets), 1.0)
    np.add.at(sums, (unit, targets), gaps)
    present = counts.any(axis=0)
    one = 1 / np.count_nonzero(counts[:, present], axis=0)
    size = counts[:, present].sum(axis=0) * one
    prior = np.random.default_rng([seed, 1])
    rows, multiplicity = _distinct(np.hstack([counts[:, present], sums[:, present]]))
    draws = []
    for weights in _unit_weights(multiplicity, _DRAWS, classes, seed):
        more = prior.standard_gamma(one / one.sum(), (len(weights), len(one))) * size
        drawn, lost = np.split(weights @ rows, 2, axis=1)
        draws.append(((lost + adverse * more) / (drawn + more)).mean(axis=1))
    return np.concatenate(draws)


def weighted_areas(weights: Weights, scores: Floats, positive: npt.NDArray[np.bool_]) -> tuple[Draws, Draws]:
    """ROC-AUC and average precision of each draw, both [draws], for scores [n] of positive and negative images.

    The same as scikit-learn's `roc_auc_score` and `average_precision_score` with sample weights [draws, n].
    """
    order = np.argsort(-scores, kind="stable")
    starts = np.flatnonzero(np.concatenate([[True], np.diff(scores[order]) != 0]))  # equal scores go together
    drawn = weights[:, order]
    hits = np.add.reduceat(np.where(positive[order], drawn, 0.0), starts, axis=1)
    alarms = np.add.reduceat(np.where(positive[order], 0.0, drawn), starts, axis=1)
    true_positives, false_positives = np.cumsum(hits, axis=1), np.cumsum(alarms, axis=1)
    positives, negatives = true_positives[:, -1], false_positives[:, -1]
    area = (alarms * (true_positives - hits / 2)).sum(axis=1) / (positives * negatives)
    reported = true_positives + false_positives
    precision = np.divide(true_positives, reported, out=np.zeros_like(reported), where=reported > 0)
    return area, (hits * precision).sum(axis=1) / positives


def _area_intervals(probabilities: Floats, targets: Ints, unit: Ints, seed: int) -> dict[str, tuple[float, float]]:
    """Intervals of auc and pr_auc.

    The prior has half a unit that ranks first and half a unit that ranks at random among the others, as Jeffreys' has
    of right and wrong.
    """
    images, classes = probabilities.shape
    prior = np.random.default_rng([seed, 2])
    count = int(min(_DRAWS, max(_MIN_AREA_DRAWS, _MAX_AREA_WORK // (images * classes))))
    draws: list[Floats] = []
    for weights in _unit_weights(np.ones(unit.max() + 1), count, images, seed):
        of_images = weights[:, unit]
        first, random = prior.standard_gamma(0.5, (2, len(weights)))
        drawn = []
        for label in range(classes):
            positive = targets == label
            area, precision = weighted_areas(of_images, probabilities[:, label], positive)
            own, others = len(np.unique(unit[positive])), len(np.unique(unit[~positive]))
            fewer = min(own, others)
            drawn.append(
                (
                    (fewer * area + first + random / 2) / (fewer + first + random),
                    (own * precision + first + random * positive.mean()) / (own + first + random),
                )
            )
        draws.append(np.mean(drawn, axis=0))
    areas, precisions = np.concatenate(draws, axis=1)
    one = np.ones((1, images))
    observed = np.mean([weighted_areas(one, probabilities[:, k], targets == k) for k in range(classes)], axis=0)
    return {"auc": _interval(areas, observed[0, 0]), "pr_auc": _interval(precisions, observed[1, 0])}


def _label_metrics(
    confusion: npt.NDArray[np.float64], predicted: Ints, targets: Ints, costs: npt.NDArray[np.float64] | None
) -> dict[str, Draws]:
    """Metrics in each draw, [draws], from weights [draws, true label, predicted label] of any sum for each label."""
    classes = confusion.shape[1]
    support = np.bincount(targets, minlength=classes)
    present = support > 0
    rows = confusion.sum(axis=2, keepdims=True)
    counts = np.divide(confusion * support[:, None], rows, out=np.zeros_like(confusion), where=rows > 0)
    hits, reported = counts[:, range(classes), range(classes)], counts.sum(axis=1)
    scored = present | (np.bincount(predicted, minlength=classes) > 0)
    f1 = np.divide(2 * hits, reported + support, out=np.zeros_like(hits), where=reported + support > 0)
    figures = {
        "accuracy": hits.sum(axis=1) / len(targets),
        "balanced_accuracy": (hits[:, present] / support[present]).mean(axis=1),
        "f1": f1[:, scored].mean(axis=1),
        "weighted_f1": f1 @ support / len(targets),
    }
    if costs is not None:
        figures["cost"] = (counts * costs).sum(axis=(1, 2)) / len(targets)
    return figures


def _prior(targets: Ints, unit: Ints, classes: int) -> tuple[Floats, Floats]:
    """Pseudo-units right, and as many wrong, of each label, and their size in images; [classes].

    One unit in all, shared equally, or more for a label with fewer units than the others.
    """
    units = np.array([len(np.unique(unit[targets == label])) for label in range(classes)])
    inverse = np.divide(1.0, units, out=np.zeros(classes), where=units > 0)
    share = np.maximum(1 / (units > 0).sum(), inverse / inverse.sum())
    return share, np.bincount(targets, minlength=classes) * inverse


def _unit_weights(multiplicity: Floats, draws: int, width: int, seed: int) -> Iterator[npt.NDArray[np.float64]]:
    """Blocks of weights [draws, units], each the sum of `multiplicity` exponential ones; `width` more values a draw."""
    rng = np.random.default_rng(seed)
    block = max(1, _BLOCK // max(len(multiplicity), width))
    for start in range(0, draws, block):
        yield rng.standard_gamma(multiplicity, (min(block, draws - start), len(multiplicity)))


def _distinct(rows: Any) -> tuple[Any, Floats]:
    """The distinct rows of a dense or sparse matrix [units, columns], and how many units have each: [distinct]."""
    keys = rows @ np.random.default_rng(0).random(rows.shape[1])
    _, first, multiplicity = np.unique(keys, return_index=True, return_counts=True)
    return rows[first], multiplicity.astype(np.float64)


def _numbered(images: npt.NDArray[np.generic], units: Ints | None) -> Ints:
    """Units from 0 without gaps [n]."""
    if units is None:
        return np.arange(len(images), dtype=np.int64)
    return np.unique(units, return_inverse=True)[1].astype(np.int64)


def _interval(draws: Floats, observed: float) -> tuple[float, float]:
    """The 95 % interval of draws, widened to the observed figure, which the prior pulls the draws away from."""
    low, high = np.quantile(draws, (0.025, 0.975))
    return float(min(low, observed)), float(max(high, observed))
