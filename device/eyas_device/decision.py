"""From logits and calibrated probabilities to a label: the network's own, or the one with the least expected cost.

The host evaluates with the same function that the device runs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.floating[Any]]


class Decision(msgspec.Struct, frozen=True, kw_only=True):
    """Misclassification costs and the decision rule that follows from them."""

    costs: tuple[tuple[float, ...], ...]
    """[true label][predicted label], in the order of the manifest's labels, in `currency`."""
    currency: str = ""
    label: str | None = None
    """With a threshold: the label that is predicted when its probability reaches it; else the other of the two."""
    threshold: float | None = None
    """0..1, for two labels, chosen on the validation set; None: predict the label with the least expected cost."""

    def __str__(self) -> str:
        if self.threshold is None:
            return "the label with the least expected cost"
        return f"{self.label} from a probability of {100 * self.threshold:.1f} % on"


def decide(
    logits: Floats, probabilities: Floats, labels: Sequence[str], decision: Decision | None = None
) -> npt.NDArray[np.intp]:
    """Index of the predicted label, [...], for logits and calibrated probabilities, both [..., classes].

    Without a decision, the argmax of the logits: a network that was trained with class weights then predicts by
    balanced accuracy, while the probabilities reflect how frequent the labels are. With a threshold, `decision.label`
    where its probability >= threshold, else the other label. Else the Bayes decision argmin_a sum_t p(t) costs[t][a]
    (Elkan, "The Foundations of Cost-Sensitive Learning", 2001).
    """
    if decision is None:
        return np.asarray(logits.argmax(axis=-1))
    if decision.threshold is None or decision.label is None:
        return np.asarray((probabilities @ np.asarray(decision.costs)).argmin(axis=-1))
    index = list(labels).index(decision.label)
    return np.where(probabilities[..., index] >= decision.threshold, index, 1 - index)


def find_problem(decision: Decision, labels: Sequence[str]) -> str:
    """Why a decision is not possible for these labels; empty if it is."""
    sizes = [len(decision.costs), *(len(row) for row in decision.costs)]
    if set(sizes) != {len(labels)}:
        return f"costs for {len(decision.costs)} labels; a row and a column for each of the {len(labels)} are needed"
    if not all(0 <= cost < math.inf for row in decision.costs for cost in row):
        return "costs must be finite and not negative"
    if (decision.threshold is None) != (decision.label is None):
        return "label and threshold belong together"
    if decision.threshold is None:
        return ""
    if len(labels) != 2 or decision.label not in labels:
        return f"a threshold needs two labels, one of them {decision.label!r}, not {tuple(labels)}"
    return "" if 0 <= decision.threshold <= 1 else f"threshold {decision.threshold}; 0 to 1 is allowed"
