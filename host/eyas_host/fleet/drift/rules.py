"""Plain rules beside the charts: mean confidence below a bound, and any figure that moved by three points.

They say what they say whatever chance does: their false alarms are not controlled.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from eyas_host.fleet.drift.estimate import Estimate, ModelReference
from eyas_host.fleet.drift.measures import MIX, OF_LABEL, Floats, frames_of, measure

MOVED = 0.03
"""A figure that moved by this much, three points, is named."""
MIN_FRAMES = 300
"""Predictions of about a day below which the rules are silent."""


def findings(
    recent: Floats,
    usual: Floats,
    labels: Sequence[str],
    reference: ModelReference | None,
    estimated: Estimate | None,
    *,
    min_confidence: float = 0.0,
) -> tuple[str, ...]:
    """What the rules say of a device.

    Args:
        recent: Sums over about the last day, [SUMS].
        usual: Means of its profile, [MEASURES]; NaN where nothing is known.
        labels: Labels that are followed.
        reference: What the bundle recorded of the validation images; confidences are compared with it, else with the
            profile. Shares of labels are compared with the profile: those of validation images are nobody's mix.
        estimated: The estimated accuracy.
        min_confidence: Lowest mean confidence; 0: none.

    """
    rows = recent[np.newaxis]
    if frames_of(rows)[0] < MIN_FRAMES:
        return ()
    now = measure(rows)[0]
    found = []
    if now[0] < min_confidence:
        found.append(f"confidence {now[0]:.3f} is below {min_confidence:g}")
    figures = [("confidence", now[0], _usual_confidence(usual, reference))]
    for number, label in enumerate(labels):
        figures.append((f"confidence of {label}", now[OF_LABEL[number]], _of_label(usual, labels, number, reference)))
        figures.append((f"share of {label}", now[MIX[number]], float(usual[MIX[number]])))
    if reference is not None and estimated is not None and estimated.by_bins is not None:
        figures.append(("estimated accuracy", estimated.by_bins, reference.accuracy))
    for name, value, before in figures:
        if np.isfinite(value) and np.isfinite(before) and abs(value - before) >= MOVED:
            found.append(f"{name} moved by {100 * (value - before):+.1f} points, from {before:.3f} to {value:.3f}")
    return tuple(found)


def _usual_confidence(usual: Floats, reference: ModelReference | None) -> float:
    return float(usual[0]) if reference is None else reference.confidence


def _of_label(usual: Floats, labels: Sequence[str], number: int, reference: ModelReference | None) -> float:
    if reference is None or labels[number] not in reference.labels:
        return float(usual[OF_LABEL[number]])
    row = reference.labels.index(labels[number])
    images = sum(reference.bins[row])
    return reference.confidence_sum[row] / images if images else float("nan")
