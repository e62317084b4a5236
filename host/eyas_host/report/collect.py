"""Collect the rows of the comparison and the worst mistakes from predictions and verdict."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from eyas_host.data.split import Split
from eyas_host.evaluate.predictions import Predictions
from eyas_host.evaluate.verdict import Verdict
from eyas_host.report.model import Mistake, Variant

_MISTAKES = 12


def variants_of(
    answers: Predictions, agreement: Mapping[str, float], verdict: Verdict, part: str
) -> tuple[Variant, ...]:
    """The row of each variant on one split, in the order of the comparison."""
    return tuple(
        Variant(
            name=name,
            runtime=name.split("-")[0] if name in verdict.parity else "torch",
            precision="int8" if name.endswith("int8") or name == "qat" else "fp32",
            balanced_accuracy=found.balanced_accuracy,
            balanced_accuracy_ci=found.balanced_accuracy_ci,
            f1=found.f1,
            auc=found.auc,
            pr_auc=found.pr_auc,
            cost=answers.cost(name),
            agreement=agreement.get(name),
            size_bytes=verdict.sizes.get(name),
            latency_ms=verdict.latency_ms.get(name),
            threads=1 if name in verdict.latency_ms else None,
            split=part,
            notes=_NOTES.get(name, ""),
        )
        for name, found in answers.scores.items()
    )


_SIMULATED = "size and latency not measured: int8 is only simulated in torch"
_NOTES = {
    "student-labels-only": "latency not measured: the same network as the student",
    "qat": _SIMULATED,
    "exact-int8": _SIMULATED + "; integer arithmetic as a backend would do it",
}


def mistakes_of(test: Predictions, shipped: str, split: Split) -> tuple[Mistake, ...]:
    """The costliest, then most confident, wrong predictions of `shipped` on the test split."""
    answers, targets, costs = test.answers(shipped), test.targets, test.costs
    confidence = test.probabilities[shipped][np.arange(len(targets)), answers]
    price = costs[targets, answers] if costs is not None else np.zeros(len(targets))
    wrong = np.flatnonzero(answers != targets)
    worst = wrong[np.lexsort((-confidence[wrong], -price[wrong]))][:_MISTAKES]
    images = split.manifest.test
    return tuple(
        Mistake(
            images[row].path,
            images[row].label,
            split.labels[answers[row]],
            float(confidence[row]),
            float(price[row]) if costs is not None else None,
        )
        for row in worst
    )
