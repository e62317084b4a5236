"""Classification metrics: balanced accuracy, F1, AUC, calibration error, and the paired loss of accuracy."""

from __future__ import annotations

from collections.abc import Sequence

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

from eyas_host.evaluation.bootstrap import Floats, Ints, label_intervals, paired_draws, wilson_interval


class ClassScores(msgspec.Struct, frozen=True):
    """Metrics of one label against all others; null where the split has no image of it (or no other)."""

    precision: float
    recall: float
    f1: float
    support: int
    """Number of images with this label."""
    recall_ci: tuple[float, float] | None = None
    """95 % Wilson score interval (Wilson 1927), with as many images as their units are worth."""
    auc: float | None = None
    average_precision: float | None = None
    """Area under the precision-recall curve: the sum of precision times the step in recall."""


class Scores(msgspec.Struct, frozen=True):
    """Metrics of one model on one split."""

    accuracy: float
    balanced_accuracy: float
    balanced_accuracy_ci: tuple[float, float]
    """95 % bootstrap interval over units (`eyas_host.evaluation.bootstrap`)."""
    f1: float
    """Macro F1: mean over the classes."""
    auc: float
    """Area under the ROC curve; one-versus-rest mean for more than two classes."""
    ece: float
    """Expected calibration error of the most probable label, 15 bins (Guo et al. 2017)."""
    confusion: tuple[tuple[int, ...], ...]
    """[true label][predicted label], images."""
    weighted_f1: float | None = None
    """F1 averaged over the classes with their images as weights."""
    pr_auc: float | None = None
    """Average precision, averaged over the classes."""
    brier: float | None = None
    """Mean squared error of the probabilities, summed over the classes: 0 to 2 (Brier 1950)."""
    nll: float | None = None
    """Mean negative log likelihood of the labels, nats."""
    classwise_ece: float | None = None
    """Expected calibration error of every label's probability, averaged over the labels (Kull et al. 2019)."""
    classes: tuple[ClassScores, ...] = ()
    """One entry per label, in the labels' order."""


def softmax(logits: Floats) -> npt.NDArray[np.float64]:
    """Softmax of logits [n, classes] in float64."""
    shifted = np.asarray(logits, dtype=np.float64)
    shifted = np.exp(shifted - shifted.max(axis=1, keepdims=True))
    return np.asarray(shifted / shifted.sum(axis=1, keepdims=True))


def score(
    probabilities: Floats,
    targets: Ints,
    *,
    predicted: Ints | None = None,
    units: Ints | None = None,
    held_out: Floats | None = None,
    seed: int = 0,
) -> Scores:
    """All metrics for probabilities [n, classes] and true labels [n].

    Args:
        probabilities: Calibrated probabilities.
        targets: Indices of the true labels.
        predicted: Predicted labels [n], by default the most probable ones; the expected calibration error always
            refers to the most probable label.
        units: Unit of each image [n] (group or near-duplicate cluster), for the interval; by default each image is one.
        held_out: Probabilities [n, classes] by calibrations that did not see the image: calibration errors, Brier score
            and likelihood refer to them. By default `probabilities`, which must then be calibrated on other images.
        seed: Of the bootstrap.

    """
    if predicted is None:
        predicted = probabilities.argmax(axis=1)
    if held_out is None:
        held_out = probabilities
    classes = probabilities.shape[1]
    each = range(classes)
    interval = label_intervals(predicted, targets, classes, units=units, seed=seed)["balanced_accuracy"]
    figures = precision_recall_fscore_support(targets, predicted, labels=list(each), zero_division=0)
    areas = [_areas(probabilities[:, label], targets == label) for label in each]
    precisions = [area for _, area in areas if area is not None]
    truth = np.eye(classes)[targets]
    return Scores(
        accuracy=float((predicted == targets).mean()),
        balanced_accuracy=balanced_mean(predicted == targets, targets),
        balanced_accuracy_ci=interval,
        f1=float(f1_score(targets, predicted, average="macro", zero_division=0)),
        auc=auc(probabilities, targets),
        ece=expected_calibration_error(held_out, targets),
        confusion=tuple(tuple(int(n) for n in row) for row in confusion_matrix(targets, predicted, labels=list(each))),
        weighted_f1=float(f1_score(targets, predicted, average="weighted", zero_division=0)),
        pr_auc=float(np.mean(precisions)) if len(precisions) == classes else None,
        brier=float(np.square(held_out - truth).sum(axis=1).mean()),
        nll=negative_log_likelihood(held_out, targets),
        classwise_ece=classwise_calibration_error(held_out, targets),
        classes=tuple(
            ClassScores(
                precision=float(figures[0][label]),
                recall=float(figures[1][label]),
                f1=float(figures[2][label]),
                support=int(figures[3][label]),
                recall_ci=_recall_interval(predicted == targets, targets == label, units),
                auc=areas[label][0],
                average_precision=areas[label][1],
            )
            for label in each
        ),
    )


def negative_log_likelihood(probabilities: Floats, targets: Ints) -> float:
    """Mean negative log likelihood of labels [n] under probabilities [n, classes], nats; at most 27.6 an image."""
    return float(-np.log(np.maximum(probabilities[np.arange(len(targets)), targets], 1e-12)).mean())


def balanced_mean(values: npt.NDArray[np.generic], targets: Ints) -> float:
    """Mean of `values` [n] within each class, averaged over the classes: balanced accuracy, where they are hits."""
    return float(np.mean([values[targets == label].mean() for label in np.unique(targets)]))


def validation_metrics(logits: Floats, targets: Ints) -> dict[str, float]:
    """Metrics an epoch can be selected by; `combined` is balanced accuracy + AUC / 2 (without the AUC if undefined)."""
    probabilities = softmax(logits)
    hits = probabilities.argmax(axis=1) == targets
    balanced, area = balanced_mean(hits, targets), auc(probabilities, targets)
    return {
        "combined": balanced + (0.5 * area if np.isfinite(area) else 0.0),
        "balanced_accuracy": balanced,
        "accuracy": float(hits.mean()),
        "f1": float(f1_score(targets, probabilities.argmax(axis=1), average="macro", zero_division=0)),
        "auc": area,
        "loss": negative_log_likelihood(probabilities, targets),
    }


def _recall_interval(
    hits: npt.NDArray[np.bool_], own: npt.NDArray[np.bool_], units: Ints | None
) -> tuple[float, float] | None:
    return wilson_interval(hits[own], None if units is None else units[own]) if own.any() else None


def _areas(probabilities: Floats, own: npt.NDArray[np.bool_]) -> tuple[float | None, float | None]:
    """ROC-AUC and average precision of one label; None where only one of both classes has images."""
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
    """Expected calibration error over equal-width bins of confidence (Guo et al. 2017)."""
    return calibration_error(reliability(probabilities, targets, bins))


def calibration_error(bins: Sequence[Bin]) -> float:
    """Mean gap between confidence and accuracy, weighted by the bins' images."""
    return float(sum(abs(b.confidence - b.accuracy) * b.fraction for b in bins))


class Bin(msgspec.Struct, frozen=True):
    """One bin of a reliability diagram."""

    confidence: float
    accuracy: float
    fraction: float
    """Fraction of all images that fall into the bin."""


def classwise_calibration_error(probabilities: Floats, targets: Ints, bins: int = 15) -> float:
    """Expected calibration error of every label's probability, averaged over the labels.

    The error of the most probable label alone does not show whether rare labels get true probabilities. Source: Kull et
    al., "Beyond temperature scaling", 2019, equation 4; Nixon et al., "Measuring Calibration in Deep Learning", 2019.
    """
    each = range(probabilities.shape[1])
    return float(np.mean([calibration_error(_binned(probabilities[:, k], targets == k, bins)) for k in each]))


def reliability(probabilities: Floats, targets: Ints, bins: int = 15) -> list[Bin]:
    """Mean confidence and accuracy of the most probable label in each nonempty bin of confidence."""
    return _binned(probabilities.max(axis=1), probabilities.argmax(axis=1) == targets, bins)


def _binned(confidence: Floats, correct: npt.NDArray[np.bool_], bins: int) -> list[Bin]:
    index = np.minimum((confidence * bins).astype(int), bins - 1)
    return [
        Bin(float(confidence[index == b].mean()), float(correct[index == b].mean()), float((index == b).mean()))
        for b in np.unique(index)
    ]


class PairedLoss(msgspec.Struct, frozen=True):
    """Balanced accuracy lost on the same images (negative: gained), with its uncertainty."""

    loss: float
    interval: tuple[float, float]
    """95 % interval of a paired bootstrap over units."""
    bound: float
    """One-sided 95 % upper bound."""


def paired_loss(
    before: Floats, after: Floats, targets: Ints, *, units: Ints | None = None, seed: int = 0
) -> PairedLoss:
    """Balanced accuracy that `after` lost against `before`: logits [n, classes] of the same images, drawn in pairs.

    `units` [n] numbers the images' units, which are drawn; without it each image is one. The upper limits reckon with
    one more unit that is lost, the lower limit with one that is gained: see `paired_draws`.
    """
    right_before = before.argmax(axis=1) == targets
    right_after = after.argmax(axis=1) == targets
    gap = right_before.astype(np.float64) - right_after
    lost, gained = (
        paired_draws(gap, targets, before.shape[1], units=units, adverse=adverse, seed=seed) for adverse in (1.0, -1.0)
    )
    interval = float(np.quantile(gained, 0.025)), float(np.quantile(lost, 0.975))
    return PairedLoss(balanced_mean(gap, targets), interval, float(np.quantile(lost, 0.95)))
