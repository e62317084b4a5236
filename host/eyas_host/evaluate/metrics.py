"""How good answers are: balanced accuracy, F1, AUC, calibration, and how sure we can be of each."""

from __future__ import annotations

import msgspec
import numpy as np
import numpy.typing as npt
from sklearn.metrics import (
    average_precision_score,
    confusion_matrix,
    f1_score,
    precision_recall_fscore_support,
    roc_auc_score,
)

Floats = npt.NDArray[np.floating]
Ints = npt.NDArray[np.int64]

_RESAMPLES = 2000


class ClassScores(msgspec.Struct, frozen=True):
    """Figures of one label, against all others; null where the part has no image of it (or no other)."""

    precision: float
    recall: float
    f1: float
    support: int
    """Images of the label."""
    auc: float | None = None
    average_precision: float | None = None
    """Area under its precision-recall curve, as the sum of precision times the step in recall."""


class Scores(msgspec.Struct, frozen=True):
    """Figures of one model on one part of the data."""

    accuracy: float
    balanced_accuracy: float
    balanced_accuracy_ci: tuple[float, float]
    """95 % percentile bootstrap over images."""
    f1: float
    """Mean of the classes' F1."""
    auc: float
    """Area under the ROC curve; one-versus-rest mean for more than two classes."""
    ece: float
    """Expected calibration error, 15 bins (Guo et al. 2017)."""
    confusion: tuple[tuple[int, ...], ...]
    """[true label][answer], images."""
    weighted_f1: float | None = None
    """Mean of the classes' F1, weighted by their images."""
    pr_auc: float | None = None
    """Area under the precision-recall curve (average precision): mean of the classes'."""
    brier: float | None = None
    """Mean squared difference between probabilities and labels, summed over the classes: 0 to 2 (Brier 1950)."""
    nll: float | None = None
    """Mean negative log likelihood of the labels, nats."""
    classes: tuple[ClassScores, ...] = ()
    """In the labels' order."""


def softmax(logits: Floats) -> npt.NDArray[np.float64]:
    """Probabilities of logits [n, classes]."""
    shifted = np.asarray(logits, dtype=np.float64)
    shifted = np.exp(shifted - shifted.max(axis=1, keepdims=True))
    return np.asarray(shifted / shifted.sum(axis=1, keepdims=True))


def score(probabilities: Floats, targets: Ints, *, answers: Ints | None = None, seed: int = 0) -> Scores:
    """All figures for probabilities [n, classes] and labels [n].

    `answers` [n] are what the model says where that is not the likeliest label; confidence is judged by the likeliest.
    """
    if answers is None:
        answers = probabilities.argmax(axis=1)
    classes = probabilities.shape[1]
    each = range(classes)
    draws = _bootstrap_balanced(answers == targets, targets, seed)
    figures = precision_recall_fscore_support(targets, answers, labels=list(each), zero_division=0)
    areas = [_areas(probabilities[:, label], targets == label) for label in each]
    precisions = [area for _, area in areas if area is not None]
    truth = np.eye(classes)[targets]
    likelihood = np.maximum(probabilities[np.arange(len(targets)), targets], 1e-12)
    return Scores(
        accuracy=float((answers == targets).mean()),
        balanced_accuracy=float(np.mean(figures[1][figures[3] > 0])),
        balanced_accuracy_ci=(float(np.quantile(draws, 0.025)), float(np.quantile(draws, 0.975))),
        f1=float(f1_score(targets, answers, average="macro", zero_division=0)),
        auc=auc(probabilities, targets),
        ece=expected_calibration_error(probabilities, targets),
        confusion=tuple(tuple(int(n) for n in row) for row in confusion_matrix(targets, answers, labels=list(each))),
        weighted_f1=float(f1_score(targets, answers, average="weighted", zero_division=0)),
        pr_auc=float(np.mean(precisions)) if len(precisions) == classes else None,
        brier=float(np.square(probabilities - truth).sum(axis=1).mean()),
        nll=float(-np.log(likelihood).mean()),
        classes=tuple(
            ClassScores(
                precision=float(figures[0][label]),
                recall=float(figures[1][label]),
                f1=float(figures[2][label]),
                support=int(figures[3][label]),
                auc=areas[label][0],
                average_precision=areas[label][1],
            )
            for label in each
        ),
    )


def _areas(probabilities: Floats, own: npt.NDArray[np.bool_]) -> tuple[float | None, float | None]:
    """ROC-AUC and average precision of one label; None where there is nothing to tell apart."""
    if own.all() or not own.any():
        return None, None
    return float(roc_auc_score(own, probabilities)), float(average_precision_score(own, probabilities))


def auc(probabilities: Floats, targets: Ints) -> float:
    """Area under the ROC curve, one-versus-rest mean for more than two classes; NaN while a class is missing."""
    classes = probabilities.shape[1]
    if len(np.unique(targets)) < classes:
        return float("nan")
    each = range(1, 2) if classes == 2 else range(classes)
    return float(np.mean([roc_auc_score(targets == label, probabilities[:, label]) for label in each]))


def expected_calibration_error(probabilities: Floats, targets: Ints, bins: int = 15) -> float:
    """Mean gap between confidence and accuracy over equal-width bins, weighted by their images."""
    return float(sum(abs(b.confidence - b.accuracy) * b.share for b in reliability(probabilities, targets, bins)))


class Bin(msgspec.Struct, frozen=True):
    """One bar of a reliability diagram."""

    confidence: float
    accuracy: float
    share: float


def reliability(probabilities: Floats, targets: Ints, bins: int = 15) -> list[Bin]:
    """Mean confidence and accuracy in each filled bin of confidence."""
    confidence = probabilities.max(axis=1)
    right = probabilities.argmax(axis=1) == targets
    place = np.minimum((confidence * bins).astype(int), bins - 1)
    return [
        Bin(float(confidence[place == b].mean()), float(right[place == b].mean()), float((place == b).mean()))
        for b in np.unique(place)
    ]


class PairedLoss(msgspec.Struct, frozen=True):
    """How much balanced accuracy was lost on the same images (negative: gained), and how sure that is."""

    loss: float
    interval: tuple[float, float]
    """95 % percentile interval of a paired bootstrap over images."""
    bound: float
    """One-sided 95 % bound from above."""


def paired_loss(before: Floats, after: Floats, targets: Ints, *, seed: int = 0) -> PairedLoss:
    """What `after` lost against `before`: scores [n, classes] for the same images, which are drawn for both alike."""
    right_before = before.argmax(axis=1) == targets
    right_after = after.argmax(axis=1) == targets
    gap = right_before.astype(np.float64) - right_after
    loss = float(np.mean([gap[targets == c].mean() for c in np.unique(targets)]))
    draws = _bootstrap_balanced(gap, targets, seed)
    low, bound, high = (float(q) for q in np.quantile(draws, (0.025, 0.95, 0.975)))
    return PairedLoss(loss, (low, high), bound)


def _bootstrap_balanced(values: npt.NDArray[np.generic], targets: Ints, seed: int) -> npt.NDArray[np.float64]:
    """Bootstrap draws of the class-balanced mean of `values`; classes keep their sizes."""
    rng = np.random.default_rng(seed)
    means = []
    for label in np.unique(targets):
        own = np.asarray(values[targets == label], dtype=np.float64)
        means.append(own[rng.integers(len(own), size=(_RESAMPLES, len(own)))].mean(axis=1))
    return np.asarray(np.mean(means, axis=0))


def fit_temperature(logits: Floats, targets: Ints) -> float:
    """The temperature that minimises the negative log likelihood on these images (Guo et al. 2017).

    A bounded search (Brent) over log T in [-3, 3], T from 1/20 to 20; the loss is unimodal in it.
    """
    from scipy.optimize import minimize_scalar

    rows = np.arange(len(targets))

    def loss(log_t: float) -> float:
        p = softmax(logits / np.exp(log_t))
        return float(-np.log(np.maximum(p[rows, targets], 1e-12)).mean())

    found = minimize_scalar(loss, bounds=(-3.0, 3.0), method="bounded")
    return float(np.exp(found.x))
