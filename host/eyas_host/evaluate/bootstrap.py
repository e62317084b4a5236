"""95 % bootstrap intervals of a model's headline figures.

Images are drawn again within each class, so that the classes keep their sizes; a draw is a count for each image, and
all figures are computed from the counts for many draws at once.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from eyas_host.evaluate.metrics import Floats, Ints

Counts = npt.NDArray[np.float64]
"""float64 [draws, images]: how often each image was drawn."""

_DRAWS = 2000
_FEWEST_DRAWS = 200
_WORK = 40_000_000
"""Images times draws times classes from which on fewer draws are taken: seconds, not minutes."""
_AT_ONCE = 2_000_000
"""Counts in memory at a time."""


def intervals(
    probabilities: Floats,
    answers: Ints,
    targets: Ints,
    *,
    costs: npt.NDArray[np.float64] | None = None,
    seed: int = 0,
) -> dict[str, tuple[float, float]]:
    """Figure -> 95 % percentile interval, for probabilities [n, classes], answers and labels [n].

    accuracy, balanced_accuracy, f1 and weighted_f1 of the answers; auc and pr_auc (means over the classes) of the
    probabilities, if each class has images; with costs [true label, answer] the mean cost of an image.
    """
    classes = probabilities.shape[1]
    draws: dict[str, list[npt.NDArray[np.float64]]] = {}
    for counts in _resamples(targets, classes, seed):
        found = _answered(counts, answers, targets, classes)
        if len(np.unique(targets)) == classes:
            areas = [ranked(counts, probabilities[:, label], targets == label) for label in range(classes)]
            found["auc"], found["pr_auc"] = np.mean(areas, axis=0)
        if costs is not None:
            found["cost"] = counts @ costs[targets, answers] / len(targets)
        for name, values in found.items():
            draws.setdefault(name, []).append(values)
    return {
        name: (float(np.quantile(values, 0.025)), float(np.quantile(values, 0.975)))
        for name, values in ((name, np.concatenate(parts)) for name, parts in draws.items())
    }


def ranked(counts: Counts, scores: Floats, positive: npt.NDArray[np.bool_]) -> tuple[Counts, Counts]:
    """ROC-AUC and average precision of each draw, both [draws]: scores [n] of images that are positive or not.

    The same as scikit-learn's `roc_auc_score` and `average_precision_score` with the counts as weights.
    """
    order = np.argsort(-scores, kind="stable")
    starts = np.flatnonzero(np.concatenate([[True], np.diff(scores[order]) != 0]))  # equal scores go together
    drawn = counts[:, order]
    hits = np.add.reduceat(np.where(positive[order], drawn, 0.0), starts, axis=1)
    alarms = np.add.reduceat(np.where(positive[order], 0.0, drawn), starts, axis=1)
    found, wrong = np.cumsum(hits, axis=1), np.cumsum(alarms, axis=1)
    every, others = found[:, -1], wrong[:, -1]
    area = (alarms * (found - hits / 2)).sum(axis=1) / (every * others)
    precision = np.divide(found, found + wrong, out=np.zeros_like(found), where=found + wrong > 0)
    return area, (hits * precision).sum(axis=1) / every


def _answered(counts: Counts, answers: Ints, targets: Ints, classes: int) -> dict[str, npt.NDArray[np.float64]]:
    """Figures of the answers in each draw, [draws]."""
    support = np.bincount(targets, minlength=classes)
    given = np.stack([counts @ (answers == label) for label in range(classes)], axis=1)
    right = np.stack([counts @ ((answers == label) & (targets == label)) for label in range(classes)], axis=1)
    present = support > 0
    scored = present | (np.bincount(answers, minlength=classes) > 0)
    f1 = 2 * right / np.maximum(given + support, 1)
    return {
        "accuracy": right.sum(axis=1) / len(targets),
        "balanced_accuracy": (right[:, present] / support[present]).mean(axis=1),
        "f1": f1[:, scored].mean(axis=1),
        "weighted_f1": f1 @ support / len(targets),
    }


def _resamples(targets: Ints, classes: int, seed: int) -> Iterator[Counts]:
    """Draws of all images, class by class with replacement, a block at a time."""
    rng = np.random.default_rng(seed)
    places = [np.flatnonzero(targets == label) for label in range(classes)]
    left = int(np.clip(_WORK // (len(targets) * classes), _FEWEST_DRAWS, _DRAWS))
    while left > 0:
        block = min(left, max(1, _AT_ONCE // len(targets)))
        counts = np.zeros((block, len(targets)))
        for own in places:
            if len(own):
                counts[:, own] = rng.multinomial(len(own), np.full(len(own), 1 / len(own)), size=block)
        yield counts
        left -= block
