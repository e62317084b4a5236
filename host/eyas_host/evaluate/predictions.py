"""What the variants answered on one part, with the figures and costs that follow."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec
import numpy as np

from eyas_device.decision import Decision, decide
from eyas_host.data.split import Split
from eyas_host.evaluate.bootstrap import intervals
from eyas_host.evaluate.cost import CostFigures, Matrix, bayes_threshold, cheapest_constant, mean_cost, part_cost
from eyas_host.evaluate.metrics import Floats, Ints, Scores, score, softmax
from eyas_host.evaluate.verdict import Logits, Verdict


class Predictions(msgspec.Struct, frozen=True):
    """What every variant answered on one part."""

    labels: tuple[str, ...]
    targets: Ints
    decision: Decision | None
    probabilities: dict[str, Floats]
    """Variant -> calibrated probabilities [n, classes]."""
    scores: dict[str, Scores]

    @classmethod
    def of(cls, logits: Mapping[str, Logits], targets: Ints, labels: tuple[str, ...], verdict: Verdict) -> Predictions:
        """From the logits [n, classes] of every variant."""
        probabilities: dict[str, Floats] = {
            name: softmax(values / verdict.temperature) for name, values in logits.items()
        }
        scores = {name: score(p, targets) for name, p in probabilities.items()}
        return cls(labels, targets, verdict.decision, probabilities, scores)

    def answers(self, variant: str) -> Ints:
        """As the bundle decides, [n]."""
        return decide(self.probabilities[variant], self.labels, self.decision)

    @property
    def costs(self) -> Matrix | None:
        """[true label, answer]."""
        return np.asarray(self.decision.costs) if self.decision is not None else None

    def cost(self, variant: str) -> float | None:
        """Mean cost of an image, as the bundle decides."""
        return mean_cost(self.answers(variant), self.targets, self.costs) if self.costs is not None else None

    def intervals(self, variant: str) -> dict[str, tuple[float, float]]:
        """Of all headline figures, as the bundle decides."""
        return intervals(self.probabilities[variant], self.answers(variant), self.targets, costs=self.costs)


def positive_label(labels: tuple[str, ...], decision: Decision | None, counts: Mapping[str, Mapping[str, int]]) -> str:
    """The label that is looked for: the dear one, else the one with the fewest training images."""
    if decision is not None and decision.label is not None:
        return decision.label
    return min(labels, key=lambda label: counts["train"].get(label, 0))


def targets_of(split: Split, part: str) -> Ints:
    """Labels [n] of a part, from the manifest alone."""
    return np.array([split.labels.index(p.label) for p in getattr(split.manifest, part)], dtype=np.int64)


def cost_figures(
    validation: Predictions, test: Predictions, shipped: str, interval: tuple[float, float] | None
) -> CostFigures | None:
    """What the shipped variant's answers cost; None without a table."""
    if validation.decision is None or validation.costs is None:
        return None
    constant = cheapest_constant(validation.costs, validation.targets)
    return CostFigures(
        decision=validation.decision,
        bayes_threshold=bayes_threshold(validation.costs) if len(validation.labels) == 2 else None,
        constant_label=validation.labels[constant],
        parts=tuple(
            part_cost(
                name,
                validation.decision,
                part.labels,
                part.probabilities[shipped],
                part.targets,
                constant=constant,
                interval=interval if name == "test" else None,
            )
            for name, part in (("validation", validation), ("test", test))
        ),
    )
