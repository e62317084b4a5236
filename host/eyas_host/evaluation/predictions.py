"""Predictions of all variants on one split, with the metrics and costs that follow."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import msgspec
import numpy as np

from eyas_device.decision import Decision, decide
from eyas_device.predict import calibrated_probabilities
from eyas_host.data.split import Split
from eyas_host.data.units import unit_ids
from eyas_host.evaluation.bootstrap import Floats, Ints, intervals
from eyas_host.evaluation.calibration import cross_fitted
from eyas_host.evaluation.cost import CostFigures, Matrix, bayes_threshold, cheapest_constant, mean_cost, split_cost
from eyas_host.evaluation.metrics import Scores, score
from eyas_host.evaluation.verdict import Logits, Verdict


class Predictions(msgspec.Struct, frozen=True):
    """Predictions of every variant on one split."""

    labels: tuple[str, ...]
    targets: Ints
    units: Ints
    """Unit of each image [n]: group or near-duplicate cluster."""
    decision: Decision | None
    logits: dict[str, Logits]
    """Variant -> logits [n, classes]."""
    probabilities: dict[str, Floats]
    """Variant -> calibrated probabilities [n, classes]."""
    scores: dict[str, Scores]

    @classmethod
    def of(
        cls, logits: Mapping[str, Logits], targets: Ints, units: Ints, labels: tuple[str, ...], verdict: Verdict
    ) -> Predictions:
        """Calibrate and score the logits [n, classes] of every variant, on images that calibrated none of them."""
        probabilities: dict[str, Floats] = {
            name: calibrated_probabilities(values, verdict.confidence[name]) for name, values in logits.items()
        }
        scores = {
            name: score(p, targets, predicted=logits[name].argmax(axis=1), units=units)
            for name, p in probabilities.items()
        }
        return cls(labels, targets, units, verdict.decision, dict(logits), probabilities, scores)

    @classmethod
    def of_validation(
        cls, logits: Mapping[str, Logits], targets: Ints, units: Ints, labels: tuple[str, ...], verdict: Verdict
    ) -> Predictions:
        """Predictions on the images that all calibrations were fitted on: probabilities are cross-fitted over units."""
        probabilities: dict[str, Floats] = {
            name: cross_fitted(values, targets, units, bias=bool(verdict.confidence[name].bias))
            for name, values in logits.items()
        }
        return cls(labels, targets, units, verdict.decision, dict(logits), probabilities, verdict.scores)

    def predicted(self, variant: str) -> Ints:
        """Predicted labels [n] under the bundle's decision rule."""
        return decide(self.logits[variant], self.probabilities[variant], self.labels, self.decision)

    @property
    def costs(self) -> Matrix | None:
        """Cost matrix [true label, prediction]; None without a cost table."""
        return np.asarray(self.decision.costs) if self.decision is not None else None

    def cost(self, variant: str) -> float | None:
        """Mean cost per image under the bundle's decision rule."""
        return mean_cost(self.predicted(variant), self.targets, self.costs) if self.costs is not None else None

    def intervals(self, variant: str) -> dict[str, tuple[float, float]]:
        """95 % bootstrap intervals of all headline figures under the bundle's decision rule."""
        return intervals(
            self.probabilities[variant], self.predicted(variant), self.targets, units=self.units, costs=self.costs
        )


def positive_label(labels: tuple[str, ...], decision: Decision | None, counts: Mapping[str, Mapping[str, int]]) -> str:
    """The positive class: the one with the costlier miss, else the one with the fewest training images."""
    if decision is not None and decision.label is not None:
        return decision.label
    return min(labels, key=lambda label: counts["train"].get(label, 0))


def targets_of(split: Split, name: Literal["train", "validation", "test"]) -> Ints:
    """Labels [n] of one split, read from the manifest alone."""
    return np.array([split.labels.index(image.label) for image in getattr(split.manifest, name)], dtype=np.int64)


def units_of(split: Split, name: Literal["train", "validation", "test"]) -> Ints:
    """Unit of each image [n] of one split (group or near-duplicate cluster), read from the manifest alone."""
    manifest = split.manifest
    return unit_ids(getattr(manifest, name), manifest.clusters, grouped=manifest.by == "group")


def cost_figures(
    validation: Predictions, test: Predictions, shipped: str, interval: tuple[float, float] | None
) -> CostFigures | None:
    """Costs of the shipped variant's predictions; None without a cost table. `interval` is that of the test cost."""
    if validation.decision is None or validation.costs is None:
        return None
    constant = cheapest_constant(validation.costs, validation.targets)
    return CostFigures(
        decision=validation.decision,
        bayes_threshold=bayes_threshold(validation.costs) if len(validation.labels) == 2 else None,
        constant_label=validation.labels[constant],
        splits=tuple(
            split_cost(
                name,
                validation.decision,
                predictions.labels,
                predictions.probabilities[shipped],
                predictions.targets,
                constant=constant,
                interval=interval if name == "test" else None,
            )
            for name, predictions in (("validation", validation), ("test", test))
        ),
    )
