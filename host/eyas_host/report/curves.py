"""ROC and precision-recall curves as points, for `report.json` and the HTML page."""

from __future__ import annotations

from typing import Literal

import msgspec
import numpy as np
import numpy.typing as npt
from sklearn.metrics import auc, precision_recall_curve, roc_curve

from eyas_host.evaluation.bootstrap import Floats, Ints

Kind = Literal["roc", "pr"]

_POINTS = 200
_MAX_LABELS = 12
"""Labels above which only the mean curve is kept."""
_GRID = np.linspace(0.0, 1.0, 101)

Values = npt.NDArray[np.float64]


class ScoreCurve(msgspec.Struct, frozen=True, kw_only=True):
    """One curve of a variant on the test set."""

    kind: Kind
    variant: str
    label: str
    """The positive class; empty for the mean over all labels."""
    area: float
    x: tuple[float, ...]
    """roc: false positive rate; pr: recall. Ascending."""
    y: tuple[float, ...]
    """roc: true positive rate; pr: precision."""


def score_curves(
    variant: str,
    labels: tuple[str, ...],
    probabilities: Floats,
    targets: Ints,
    *,
    positive: str,
    per_label: bool = True,
) -> list[ScoreCurve]:
    """ROC and precision-recall curves for probabilities [n, classes] and true labels [n].

    For two labels the curves of `positive`; for more the mean over the labels (at 101 points) and, with `per_label`,
    one of every label unless they are too many for a plot. Labels without images are left out.
    """
    candidates = [labels.index(positive)] if len(labels) == 2 else range(len(labels))
    shown = [label for label in candidates if 0 < (targets == label).sum() < len(targets)]
    curves: list[ScoreCurve] = []
    for kind in ("roc", "pr"):
        points = [_points(kind, targets == label, probabilities[:, label]) for label in shown]
        if len(labels) > 2 and points:
            curves.append(_mean(kind, variant, points))
        if len(labels) == 2 or (per_label and len(labels) <= _MAX_LABELS):
            curves += [_curve(kind, variant, labels[label], x, y) for label, (x, y) in zip(shown, points, strict=True)]
    return curves


def _points(kind: str, positive: npt.NDArray[np.bool_], scores: Floats) -> tuple[Values, Values]:
    """x, ascending, and y of a curve."""
    if kind == "roc":
        x, y, _ = roc_curve(positive, scores)
        return x, y
    precision, recall, _ = precision_recall_curve(positive, scores)
    return recall[::-1], precision[::-1]


def _mean(kind: Kind, variant: str, curves: list[tuple[Values, Values]]) -> ScoreCurve:
    """Mean curve over the labels; precision is a step function that holds down to the next lower recall."""
    if kind == "roc":
        heights = [np.interp(_GRID, x, y) for x, y in curves]
    else:
        heights = [y[np.searchsorted(x, _GRID, side="left")] for x, y in curves]
    areas = [_area(kind, x, y) for x, y in curves]
    return ScoreCurve(
        kind=kind,
        variant=variant,
        label="",
        area=float(np.mean(areas)),
        x=tuple(_GRID.tolist()),
        y=tuple(np.mean(heights, axis=0).tolist()),
    )


def _curve(kind: Kind, variant: str, label: str, x: Values, y: Values) -> ScoreCurve:
    kept = np.unique(np.linspace(0, len(x) - 1, min(len(x), _POINTS)).astype(int))
    return ScoreCurve(
        kind=kind,
        variant=variant,
        label=label,
        area=_area(kind, x, y),
        x=tuple(x[kept].tolist()),
        y=tuple(y[kept].tolist()),
    )


def _area(kind: str, x: Values, y: Values) -> float:
    """Area: trapezoidal for ROC, step-wise for precision-recall (average precision)."""
    return float(auc(x, y) if kind == "roc" else np.sum(np.diff(x) * y[1:]))
