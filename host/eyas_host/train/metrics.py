"""How good answers are: balanced accuracy, F1, AUC, calibration, and how sure we can be of each."""

from __future__ import annotations

import msgspec
import numpy as np
import numpy.typing as npt
from sklearn.metrics import balanced_accuracy_score, confusion_matrix, f1_score, roc_auc_score

Floats = npt.NDArray[np.floating]
Ints = npt.NDArray[np.int64]

_RESAMPLES = 2000


class Scores(msgspec.Struct, frozen=True):
    """Figures of one model on one part of the data."""

    accuracy: float
    balanced_accuracy: float
    balanced_accuracy_ci: tuple[float, float]
    """95 % percentile bootstrap over pictures."""
    f1: float
    """Mean of the classes' F1."""
    auc: float
    """Area under the ROC curve; one-versus-rest mean for more than two classes."""
    ece: float
    """Expected calibration error, 15 bins (Guo et al. 2017)."""
    confusion: tuple[tuple[int, ...], ...]
    """[true label][answer], pictures."""


def softmax(logits: Floats) -> npt.NDArray[np.float64]:
    """Probabilities of logits [n, classes]."""
    shifted = np.asarray(logits, dtype=np.float64)
    shifted = np.exp(shifted - shifted.max(axis=1, keepdims=True))
    return np.asarray(shifted / shifted.sum(axis=1, keepdims=True))


def score(probabilities: Floats, targets: Ints, *, seed: int = 0) -> Scores:
    """All figures for probabilities [n, classes] and labels [n]."""
    answers = probabilities.argmax(axis=1)
    classes = probabilities.shape[1]
    draws = _bootstrap_balanced(answers == targets, targets, seed)
    return Scores(
        accuracy=float((answers == targets).mean()),
        balanced_accuracy=float(balanced_accuracy_score(targets, answers)),
        balanced_accuracy_ci=(float(np.quantile(draws, 0.025)), float(np.quantile(draws, 0.975))),
        f1=float(f1_score(targets, answers, average="macro", zero_division=0)),
        auc=auc(probabilities, targets),
        ece=expected_calibration_error(probabilities, targets),
        confusion=tuple(
            tuple(int(n) for n in row) for row in confusion_matrix(targets, answers, labels=list(range(classes)))
        ),
    )


def auc(probabilities: Floats, targets: Ints) -> float:
    """Area under the ROC curve; NaN while a class is missing."""
    if len(np.unique(targets)) < probabilities.shape[1]:
        return float("nan")
    if probabilities.shape[1] == 2:
        return float(roc_auc_score(targets, probabilities[:, 1]))
    return float(roc_auc_score(targets, probabilities, multi_class="ovr"))


def expected_calibration_error(probabilities: Floats, targets: Ints, bins: int = 15) -> float:
    """Mean gap between confidence and accuracy over equal-width bins, weighted by their pictures."""
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
    """How much balanced accuracy was lost on the same pictures (negative: gained), and how sure that is."""

    loss: float
    interval: tuple[float, float]
    """95 % percentile interval of a paired bootstrap over pictures."""
    bound: float
    """One-sided 95 % bound from above."""


def paired_loss(before: Floats, after: Floats, targets: Ints, *, seed: int = 0) -> PairedLoss:
    """What `after` lost against `before`: scores [n, classes] for the same pictures, which are drawn for both alike."""
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
    """The temperature that minimises the negative log likelihood on these pictures (Guo et al. 2017).

    A golden-section search over log T in [1/20, 20]; the loss is unimodal in it.
    """
    from scipy.optimize import minimize_scalar

    rows = np.arange(len(targets))

    def loss(log_t: float) -> float:
        p = softmax(logits / np.exp(log_t))
        return float(-np.log(np.maximum(p[rows, targets], 1e-12)).mean())

    found = minimize_scalar(loss, bounds=(-3.0, 3.0), method="bounded")
    return float(np.exp(found.x))
