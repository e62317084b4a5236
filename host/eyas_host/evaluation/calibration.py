"""Calibration: a temperature and a bias for each label, fitted with a prior and judged on images that they did not see.

A temperature corrects how sure a network is. It cannot correct how frequent the network takes each label to be, and
one that was trained with class weights takes all labels to be equally frequent: hence the bias. Probabilities are
softmax(z / T + b) for logits z (`eyas_device.predict.calibrated_probabilities`): vector scaling (Guo et al., "On
Calibration of Modern Neural Networks", 2017, section 4.2) with one scale for all labels, the temperature.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt
from scipy.optimize import minimize
from scipy.special import logsumexp

from eyas_device.bundle import Confidence
from eyas_device.predict import calibrated_probabilities
from eyas_host.evaluation.bootstrap import Floats, Ints
from eyas_host.evaluation.metrics import (
    classwise_calibration_error,
    expected_calibration_error,
    negative_log_likelihood,
)

_LOG_T_SPREAD = 0.5
"""Standard deviation of the prior on log T, nats: 95 % of temperatures lie between 0.38 and 2.7."""
_BIAS_SPREAD = 2.0
"""Standard deviation of the prior on a bias, nats: wide enough for a label that is 1 % of the data."""
_MIN_TEMPERATURE = 0.5
"""Lowest temperature where no prediction is wrong, so that the likelihood alone has no maximum."""
_MIN_UNITS = 5
"""Units of a label below which no bias is fitted: five events for each parameter (Vittinghoff and McCulloch,
"Relaxing the Rule of Ten Events per Variable in Logistic and Cox Regression", 2007)."""
_FOLDS = 5


class CalibrationErrors(msgspec.Struct, frozen=True):
    """How far probabilities are from the truth; the smaller, the better."""

    nll: float
    """Mean negative log likelihood of the labels, nats."""
    ece: float
    """Expected calibration error of the most probable label, 15 bins (Guo et al. 2017)."""
    classwise_ece: float
    """Expected calibration error of every label's probability, 15 bins, averaged over the labels (Kull et al. 2019)."""


class Calibrations(NamedTuple):
    """Calibrations of several variants on the same images."""

    confidence: dict[str, Confidence]
    """Variant -> its calibration, fitted on all images."""
    held_out: dict[str, npt.NDArray[np.float64]]
    """Variant -> cross-fitted probabilities [n, classes]: each image by a calibration that did not see it."""
    notice: str
    """Why no bias was fitted; empty if it was."""


def calibrate(
    logits: Mapping[str, Floats], targets: Ints, units: Ints, labels: tuple[str, ...], *, threshold: float
) -> Calibrations:
    """Calibrate each variant by its logits [n, classes] for images with labels [n] in units [n].

    Confidences below `threshold` are uncertain.
    """
    notice = bias_problem(labels, targets, units)
    fitted = {name: fit_calibration(values, targets, bias=not notice) for name, values in logits.items()}
    return Calibrations(
        {name: msgspec.structs.replace(own, threshold=threshold) for name, own in fitted.items()},
        {name: cross_fitted(values, targets, units, bias=not notice) for name, values in logits.items()},
        notice,
    )


def fit_calibration(logits: Floats, targets: Ints, *, bias: bool = True) -> Confidence:
    """Temperature and bias for logits [n, classes] and labels [n]: the maximum of the posterior density.

    Minimises the negative log likelihood, summed over the images, plus (log T / 0.5)^2 / 2 + |b / 2|^2 / 2: Gaussian
    priors on log T and on each bias, centred at no correction. Without `bias` the bias is zero. Where no prediction is
    wrong the likelihood rises without bound as T falls (Albert and Anderson, "On the Existence of Maximum Likelihood
    Estimates in Logistic Regression Models", 1984); T is then 0.5 at least. The bias sums to zero over the labels.
    """
    classes = logits.shape[1]
    z = np.asarray(logits, dtype=np.float64)
    z = z - z.mean(axis=1, keepdims=True)
    truth = np.eye(classes)[targets]
    free = float(bias)

    def loss(parameters: npt.NDArray[np.float64]) -> tuple[float, npt.NDArray[np.float64]]:
        log_t, b = parameters[0], parameters[1:] * free
        scaled = z * math.exp(-log_t)
        powers = scaled + b
        total = logsumexp(powers, axis=1, keepdims=True)
        error = np.exp(powers - total) - truth
        value = float((total - powers)[truth > 0].sum())
        value += 0.5 * (log_t / _LOG_T_SPREAD) ** 2 + 0.5 * float(np.square(b / _BIAS_SPREAD).sum())
        slope_t = -float((error * scaled).sum()) + log_t / _LOG_T_SPREAD**2
        slope_b = (error.sum(axis=0) + b / _BIAS_SPREAD**2) * free
        return value, np.concatenate([[slope_t], slope_b])

    wrong = bool((z.argmax(axis=1) != targets).any())
    bounds = [(-3.0 if wrong else math.log(_MIN_TEMPERATURE), 3.0), *[(None, None)] * classes]
    found = minimize(loss, np.zeros(1 + classes), jac=True, method="L-BFGS-B", bounds=bounds).x
    b = found[1:] - found[1:].mean()
    return Confidence(temperature=float(np.exp(found[0])), bias=tuple(map(float, b)) if bias else ())


def calibration_errors(probabilities: Floats, targets: Ints) -> CalibrationErrors:
    """Errors of probabilities [n, classes] for images with labels [n]."""
    return CalibrationErrors(
        nll=negative_log_likelihood(probabilities, targets),
        ece=expected_calibration_error(probabilities, targets),
        classwise_ece=classwise_calibration_error(probabilities, targets),
    )


def bias_problem(labels: tuple[str, ...], targets: Ints, units: Ints) -> str:
    """Why images with labels [n] in units [n] are too few for a bias; empty if they suffice."""
    counts = [len(np.unique(units[targets == number])) for number in range(len(labels))]
    few = [f"{label} ({count})" for label, count in zip(labels, counts, strict=True) if count < _MIN_UNITS]
    if not few:
        return ""
    return (
        f"validation has fewer than {_MIN_UNITS} independent images of {', '.join(few)}: too few to calibrate how "
        "frequent each label is, so confidence is calibrated by a temperature alone"
    )


def cross_fitted(logits: Floats, targets: Ints, units: Ints, *, bias: bool = True) -> npt.NDArray[np.float64]:
    """Probabilities [n, classes] from calibrations that did not see the image or others of its unit, five folds."""
    folds = _folds(targets, units)
    probabilities = np.empty(logits.shape)
    for fold in np.unique(folds):
        own = folds == fold
        confidence = fit_calibration(logits[~own], targets[~own], bias=bias)
        probabilities[own] = calibrated_probabilities(logits[own], confidence)
    return probabilities


def _folds(targets: Ints, units: Ints) -> Ints:
    """The fold of each image [n]: whole units, dealt in turn label by label, at random within a label."""
    ids, first, unit = np.unique(units, return_index=True, return_inverse=True)
    order = np.lexsort((np.random.default_rng(0).random(len(ids)), targets[first]))
    fold = np.empty(len(ids), dtype=np.int64)
    fold[order] = np.arange(len(ids)) % _FOLDS
    return np.asarray(fold[unit])
