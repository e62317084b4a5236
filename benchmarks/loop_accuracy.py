"""Accuracy without labels and with few, on real predictions for real images whose labels are known.

Estimates: what a device's windows and the validation images tell (`eyas_host.fleet.drift.estimate`), beside what the
validation images said, for other mixes of images, for changed images, and for labels that changed their meaning.

Bounds: prediction-powered (`eyas_host.fleet.drift.risk`), looked at after every label, beside binomial bounds: of a
mixture of likelihood ratios (Robbins, "Statistical methods related to the law of the iterated logarithm", 1970) and of
Clopper and Pearson, both valid at all times, and of Clopper and Pearson for a number of labels that is fixed before.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt
from scipy import special, stats

from common import Figure
from eyas_device.predict import calibrated_probabilities
from eyas_device.telemetry.messages import CONFIDENCE_EDGES
from eyas_host.bundle.reference import prediction_statistics
from eyas_host.evaluation.calibration import fit_calibration
from eyas_host.fleet.drift.estimate import ModelReference, estimate
from eyas_host.fleet.drift.measures import BINS, MAX_LABELS, sums_of
from eyas_host.fleet.drift.risk import ALPHA, RiskMonitor
from sides.garments import LABELS, Floats, Ints, first_version, garments, logits
from tests.support.fleet_parts import window

CHANGED = ("darker", "slightly soft", "dusk", "haze", "dirt", "season")
_SENT = 10_000
"""Frames of which a mix is drawn."""
_REFERENCES = 6000
"""Labels of the runs in which binomial bounds are followed; ours are cheaper to wait for and dearer to compute."""
OURS = "prediction-powered"
MARGIN = 0.05
"""A bound is tight enough when it is so far below the accuracy."""


class Predicted(NamedTuple):
    """What a model makes of some images."""

    probabilities: Floats
    """Calibrated, [n, classes]."""
    targets: Ints

    @property
    def labels(self) -> Ints:
        """Predicted label numbers, [n]."""
        return np.asarray(self.probabilities.argmax(axis=1), np.int64)

    @property
    def confidence(self) -> Floats:
        """Of the predictions, [n]."""
        return np.asarray(self.probabilities.max(axis=1))

    @property
    def right(self) -> npt.NDArray[np.bool_]:
        """Whether they are, [n]."""
        return np.asarray(self.labels == self.targets)

    def take(self, rows: Ints) -> Predicted:
        """Some of them."""
        return Predicted(self.probabilities[rows], self.targets[rows])


class Model(NamedTuple):
    """A first version's predictions."""

    reference: ModelReference
    seen: dict[str, Predicted]
    """Condition -> predictions for the test images."""


def model(root: Path, seed: int, conditions: tuple[str, ...]) -> Model:
    """Calibrated on its validation images, as a bundle is."""
    learned, test = first_version(root, seed), garments(root, "t10k")
    of_validation = logits(learned.network, learned.validation.seen("usual"))
    calibration = fit_calibration(of_validation, learned.validation.targets)
    known = calibrated_probabilities(of_validation, calibration)
    statistics = prediction_statistics(known.argmax(axis=1), learned.validation.targets, known)
    reference = ModelReference(
        labels=LABELS,
        bins=tuple(map(tuple, statistics.bins.tolist())),
        right=tuple(map(tuple, statistics.right.tolist())),
        confidence_sum=tuple(statistics.confidence_sum.tolist()),
    )
    seen = {
        name: Predicted(calibrated_probabilities(logits(learned.network, test.seen(name)), calibration), test.targets)
        for name in conditions
    }
    return Model(reference, seen)


def estimates(root: Path, seeds: int) -> dict[str, Figure]:
    """Errors of the estimates, in points of accuracy."""
    rows: dict[str, list[tuple[float, float, float, float]]] = {}
    for seed in range(seeds):
        own = model(root, seed, ("usual", *CHANGED))
        usual = own.seen["usual"]
        for name, frames in _mixes(usual, garments(root, "t10k").images, np.random.default_rng(seed)).items():
            rows.setdefault(f"mix: {name}", []).append(_errors(own, frames))
        for name in CHANGED:
            rows.setdefault(f"changed: {name}", []).append(_errors(own, own.seen[name]))
        renamed = np.arange(len(LABELS))
        renamed[[2, 4, 6]] = 4, 6, 2  # pullover, coat and shirt
        rows.setdefault("concept", []).append(_errors(own, Predicted(usual.probabilities, renamed[usual.targets])))
    figures: dict[str, Figure] = {}
    for kind, note in (
        ("mix", "other shares of hard and easy images; what the estimate is made for"),
        ("changed", f"light, focus and dirt that the validation images do not have: {', '.join(CHANGED)}"),
    ):
        chosen = {name.split(": ")[1]: found for name, found in rows.items() if name.startswith(f"{kind}: ")}
        every = np.array([one for found in chosen.values() for one in found])
        spread = "; ".join(f"{name} {np.abs(np.array(found)[:, 0]).mean():.1f}" for name, found in chosen.items())
        figures[f"covariate drift, {kind}: mean error"] = Figure(
            value=float(np.abs(every[:, 0]).mean()), unit="points", bound=2.0, better="lower", spread=spread, note=note
        )
        for place, name in ((1, "by threshold (ATC)"), (2, "mean confidence"), (3, "validation accuracy, unchanged")):
            figures[f"covariate drift, {kind}: mean error of {name}"] = Figure(
                value=float(np.abs(every[:, place]).mean()), unit="points"
            )
    figures["concept drift: estimate - accuracy"] = Figure(
        value=float(np.mean([found[0] for found in rows["concept"]])),
        unit="points",
        note="three labels change their meaning, the images stay as they are: the estimate does not see it",
    )
    return figures


def _mixes(usual: Predicted, images: npt.NDArray[np.uint8], rng: np.random.Generator) -> dict[str, Predicted]:
    """Usual frames in other shares, by label and by how images look."""
    light, detail = images.mean(axis=(1, 2)), images.std(axis=(1, 2))
    hard = np.isin(usual.targets, (2, 4, 6))
    weights = {
        "pullovers, coats and shirts three times as often": np.where(hard, 3.0, 1.0),
        "a third as often": np.where(hard, 1 / 3, 1.0),
        "bright garments": np.where(light > np.median(light), 4.0, 1.0),
        "dark garments": np.where(light < np.median(light), 4.0, 1.0),
        "rich in contrast": np.where(detail > np.median(detail), 4.0, 1.0),
        "poor in contrast": np.where(detail < np.median(detail), 4.0, 1.0),
    }
    return {
        name: usual.take(rng.choice(len(images), _SENT, p=weight / weight.sum())) for name, weight in weights.items()
    }


def _errors(own: Model, frames: Predicted) -> tuple[float, float, float, float]:
    """Points that are claimed above the accuracy: by bins, by threshold, by confidence, by the validation images."""
    followed = sorted(LABELS, key=lambda label: -(frames.labels == LABELS.index(label)).sum())[:MAX_LABELS]
    found = estimate(_sums(frames, followed), followed, own.reference)
    assert found is not None and found.by_bins is not None and found.by_threshold is not None
    claims = (found.by_bins, found.by_threshold, found.average_confidence, own.reference.accuracy)
    first, second, third, last = (100 * (claim - float(frames.right.mean())) for claim in claims)
    return first, second, third, last


def _sums(frames: Predicted, followed: Sequence[str]) -> Floats:
    """The sums of the window that a device sends of them."""
    bins = np.searchsorted(CONFIDENCE_EDGES, frames.confidence, side="right")
    counts, of_bins, sums = {}, {}, {}
    for number, label in enumerate(LABELS):
        own = frames.labels == number
        counts[label] = int(own.sum())
        of_bins[label] = tuple(np.bincount(bins[own], minlength=BINS).tolist())
        sums[label] = float(frames.confidence[own].sum())
    sent = window("cam", "s", 0, frames=len(bins), counts=counts, confidence_bins=of_bins, confidence_sum=sums)
    return np.array(sums_of(sent, followed))


class Streams(msgspec.Struct):
    """Labels of frames drawn at random, run by run."""

    wrong: Floats
    """[runs, labels]"""
    announced: Floats
    """1 - confidence, [runs, labels]"""
    error: float
    """Share of all frames that are wrong."""
    mean: float
    """Mean of 1 - confidence over all frames."""


def bounds(root: Path, runs: int, labels: int) -> dict[str, Figure]:
    """How often bounds are ever wrong, and how many labels they need."""
    figures: dict[str, Figure] = {}
    conditions = ("usual", "season")
    own = model(root, 0, conditions)
    covered = []
    for condition in conditions:
        found, longer = (_streams(own.seen[condition], runs, count) for count in (labels, _REFERENCES))
        lower, upper = _prediction_powered(found)
        right = 1 - found.error
        covered.append(np.stack([(lower <= right).all(axis=1), (upper >= right).all(axis=1)], axis=1))
        needed = {
            OURS: _first(lower >= right - MARGIN),
            "the same bets without confidences": _first(_bets(found) >= right - MARGIN),
            "binomial mixture, at any time": _first(_mixture(longer.wrong, found.error + MARGIN)),
            "Clopper-Pearson, at any time": _first(_clopper_pearson(longer, union=True)),
            "Clopper-Pearson, number fixed before": _first(_clopper_pearson(longer, union=False).mean(axis=0) >= 0.5),
        }
        for name, counts in needed.items():
            quarter, half = np.quantile(counts, (0.25, 0.5))
            figures[f"{condition}: labels, {name}"] = Figure(
                value=float(half),
                unit="",
                spread=f"a quarter of runs by {quarter:.0f}" if counts.ndim else "half of the runs are there",
                note=f"until the bound is {100 * MARGIN:.0f} points below the accuracy of {right:.3f}; median",
            )
        for name in ("binomial mixture, at any time", "Clopper-Pearson, at any time"):
            figures[f"{condition}: labels, {OURS} / {name}"] = Figure(
                value=float(np.median(needed[OURS]) / np.median(needed[name])), unit="x", bound=0.5, better="lower"
            )
        figures[f"{condition}: variance of errors that confidences leave"] = Figure(
            value=_left(own.seen[condition]), unit="x", note="no bound can need much fewer labels than this share"
        )
    both = np.concatenate(covered)
    note = f"{len(both)} runs of {labels} labels, a look after each, alpha {ALPHA:g}"
    figures["lower bound holds at all times"] = Figure(value=float(both[:, 0].mean()), unit="", bound=0.95, note=note)
    figures["upper bound holds at all times"] = Figure(value=float(both[:, 1].mean()), unit="", bound=0.95, note=note)
    return figures


def _left(frames: Predicted) -> float:
    """Share of the errors' variance that is left when the best multiple of 1 - confidence is taken off."""
    return float(1 - np.corrcoef(~frames.right, frames.confidence)[0, 1] ** 2)


def _streams(frames: Predicted, runs: int, labels: int) -> Streams:
    rows = np.random.default_rng(3).integers(0, len(frames.targets), (runs, labels))
    wrong, announced = (~frames.right).astype(float), 1 - frames.confidence
    return Streams(wrong[rows], announced[rows], float(wrong.mean()), float(announced.mean()))


def _prediction_powered(found: Streams) -> tuple[Floats, Floats]:
    """Lower and upper bounds of the accuracy after each label, [runs, labels]."""
    lower, upper = np.zeros((2, *found.wrong.shape))
    for run, (errors, announced) in enumerate(zip(found.wrong, found.announced, strict=True)):
        monitor = RiskMonitor()
        for place, (error, of_one) in enumerate(zip(errors.tolist(), announced.tolist(), strict=True)):
            monitor.add(error, of_one, found.mean)
            bound = monitor.bound()
            lower[run, place], upper[run, place] = bound.lower, bound.upper
    return lower, upper


def _bets(found: Streams) -> Floats:
    """Lower bounds by the same bets on the errors alone, of a quarter of the runs."""
    few = found.wrong[: max(10, len(found.wrong) // 4)]
    return _prediction_powered(Streams(few, np.zeros_like(few), found.error, 0.0))[0]


def _mixture(wrong: Floats, limit: float) -> npt.NDArray[np.bool_]:
    """Where an error rate of `limit` and more is excluded, at all times together: bets on lower rates, mixed evenly."""
    k, n = np.cumsum(wrong, axis=1), np.arange(1, wrong.shape[1] + 1)
    money = special.betaln(k + 1, n - k + 1) + stats.beta.logcdf(limit, k + 1, n - k + 1) - np.log(limit)
    return np.asarray(money - k * np.log(limit) - (n - k) * np.log1p(-limit) >= np.log(1 / ALPHA))


def _clopper_pearson(found: Streams, *, union: bool) -> npt.NDArray[np.bool_]:
    """Where the bound is tight enough; with `union` it holds for all numbers of labels together."""
    k, n = np.cumsum(found.wrong, axis=1), np.arange(1, found.wrong.shape[1] + 1)
    alpha = ALPHA / (n * (n + 1)) if union else np.full(len(n), ALPHA)
    return np.asarray(stats.beta.ppf(1 - alpha, k + 1, np.maximum(n - k, 1)) <= found.error + MARGIN)


def _first(reached: npt.NDArray[np.bool_]) -> Floats:
    """Labels until it is true, along the last axis; all of them where it never is."""
    length = reached.shape[-1]
    return np.asarray(np.where(reached.any(axis=-1), reached.argmax(axis=-1) + 1, length), float)
