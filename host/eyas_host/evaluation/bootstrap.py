"""Bootstrap confidence intervals, stratified by class.

Images are resampled within each class, so that the classes keep their sizes. A draw is stored as a count for each
image, and all figures are computed from the counts of many draws at once.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.floating]
Ints = npt.NDArray[np.int64]
Counts = npt.NDArray[np.float64]
"""float64 [draws, images]: how often each image was drawn."""

_DRAWS = 2000
_MIN_DRAWS = 200
_MAX_WORK = 40_000_000
"""Images times draws times classes above which fewer draws are taken: seconds, not minutes."""
_BLOCK = 2_000_000
"""Counts in memory at a time."""


def intervals(
    probabilities: Floats,
    predicted: Ints,
    targets: Ints,
    *,
    costs: npt.NDArray[np.float64] | None = None,
    seed: int = 0,
) -> dict[str, tuple[float, float]]:
    """Figure -> 95 % percentile interval, for probabilities [n, classes], predicted and true labels [n].

    accuracy, balanced_accuracy, f1 and weighted_f1 of the predicted labels; auc and pr_auc (means over the classes) of
    the probabilities, if each class has images; with costs [true label, prediction] the mean cost per image.
    """
    classes = probabilities.shape[1]
    draws: dict[str, list[npt.NDArray[np.float64]]] = {}
    for counts in resamples(targets, classes, seed):
        figures = _label_metrics(counts, predicted, targets, classes)
        if len(np.unique(targets)) == classes:
            areas = [weighted_areas(counts, probabilities[:, label], targets == label) for label in range(classes)]
            figures["auc"], figures["pr_auc"] = np.mean(areas, axis=0)
        if costs is not None:
            figures["cost"] = counts @ costs[targets, predicted] / len(targets)
        for name, values in figures.items():
            draws.setdefault(name, []).append(values)
    return {name: percentile_interval(np.concatenate(values)) for name, values in draws.items()}


def balanced_mean_draws(
    values: npt.NDArray[np.generic], targets: Ints, classes: int, *, seed: int = 0
) -> npt.NDArray[np.float64]:
    """Bootstrap draws of the class-balanced mean of `values` [n]: balanced accuracy, where they are hits."""
    present = [targets == label for label in np.unique(targets)]
    weights = np.mean([own / own.sum() for own in present], axis=0) * values.astype(np.float64)
    return np.concatenate([counts @ weights for counts in resamples(targets, classes, seed)])


def percentile_interval(draws: npt.NDArray[np.float64]) -> tuple[float, float]:
    """The 95 % percentile interval of bootstrap draws."""
    return float(np.quantile(draws, 0.025)), float(np.quantile(draws, 0.975))


def weighted_areas(counts: Counts, scores: Floats, positive: npt.NDArray[np.bool_]) -> tuple[Counts, Counts]:
    """ROC-AUC and average precision of each draw, both [draws], for scores [n] of positive and negative images.

    The same as scikit-learn's `roc_auc_score` and `average_precision_score` with the counts as sample weights.
    """
    order = np.argsort(-scores, kind="stable")
    starts = np.flatnonzero(np.concatenate([[True], np.diff(scores[order]) != 0]))  # equal scores go together
    drawn = counts[:, order]
    hits = np.add.reduceat(np.where(positive[order], drawn, 0.0), starts, axis=1)
    alarms = np.add.reduceat(np.where(positive[order], 0.0, drawn), starts, axis=1)
    true_positives, false_positives = np.cumsum(hits, axis=1), np.cumsum(alarms, axis=1)
    positives, negatives = true_positives[:, -1], false_positives[:, -1]
    area = (alarms * (true_positives - hits / 2)).sum(axis=1) / (positives * negatives)
    reported = true_positives + false_positives
    precision = np.divide(true_positives, reported, out=np.zeros_like(reported), where=reported > 0)
    return area, (hits * precision).sum(axis=1) / positives


def resamples(targets: Ints, classes: int, seed: int) -> Iterator[Counts]:
    """Blocks of bootstrap draws of all images, class by class with replacement."""
    rng = np.random.default_rng(seed)
    rows_by_class = [rows for label in range(classes) if len(rows := np.flatnonzero(targets == label))]
    left = int(np.clip(_MAX_WORK // (len(targets) * classes), _MIN_DRAWS, _DRAWS))
    while left > 0:
        block = min(left, max(1, _BLOCK // len(targets)))
        counts = np.zeros((block, len(targets)))
        for rows in rows_by_class:
            drawn = rng.integers(len(rows), size=(block, len(rows))) + len(rows) * np.arange(block)[:, None]
            counts[:, rows] = np.bincount(drawn.ravel(), minlength=block * len(rows)).reshape(block, -1)
        yield counts
        left -= block


def _label_metrics(counts: Counts, predicted: Ints, targets: Ints, classes: int) -> dict[str, npt.NDArray[np.float64]]:
    """Metrics of the predicted labels in each draw, [draws]."""
    support = np.bincount(targets, minlength=classes)
    reported = np.stack([counts @ (predicted == label) for label in range(classes)], axis=1)
    hits = np.stack([counts @ ((predicted == label) & (targets == label)) for label in range(classes)], axis=1)
    present = support > 0
    scored = present | (np.bincount(predicted, minlength=classes) > 0)
    f1 = 2 * hits / np.maximum(reported + support, 1)
    return {
        "accuracy": hits.sum(axis=1) / len(targets),
        "balanced_accuracy": (hits[:, present] / support[present]).mean(axis=1),
        "f1": f1[:, scored].mean(axis=1),
        "weighted_f1": f1 @ support / len(targets),
    }
