"""ROC and precision-recall curves as points, for `report.json` and the page."""

from __future__ import annotations

from typing import Literal

import msgspec
import numpy as np
import numpy.typing as npt
from sklearn.metrics import auc, precision_recall_curve, roc_curve

from eyas_host.evaluate.metrics import Floats, Ints

Kind = Literal["roc", "pr"]

_POINTS = 200
_MOST_LABELS = 12
"""With a curve of their own."""
_GRID = np.linspace(0.0, 1.0, 101)

Values = npt.NDArray[np.float64]


class Curve(msgspec.Struct, frozen=True, kw_only=True):
    """One curve of a variant on the test part."""

    kind: Kind
    variant: str
    label: str
    """The label that is looked for against all others; empty: the mean over all labels."""
    area: float
    x: tuple[float, ...]
    """roc: false positive rate; pr: recall. Ascending."""
    y: tuple[float, ...]
    """roc: true positive rate; pr: precision."""


def curves_of(
    variant: str,
    labels: tuple[str, ...],
    probabilities: Floats,
    targets: Ints,
    *,
    positive: str,
    each: bool = True,
) -> list[Curve]:
    """ROC and precision-recall curve for probabilities [n, classes] and labels [n].

    For two labels those of `positive`; for more the mean over the labels (at 101 places), then with `each` one for
    every label if there are not too many for a plot. Labels without images are left out.
    """
    wanted = [labels.index(positive)] if len(labels) == 2 else range(len(labels))
    shown = [place for place in wanted if 0 < (targets == place).sum() < len(targets)]
    found: list[Curve] = []
    for kind in ("roc", "pr"):
        own = [_points(kind, targets == place, probabilities[:, place]) for place in shown]
        if len(labels) > 2 and own:
            found.append(_mean(kind, variant, own))
        if len(labels) == 2 or (each and len(labels) <= _MOST_LABELS):
            found += [_curve(kind, variant, labels[place], x, y) for place, (x, y) in zip(shown, own, strict=True)]
    return found


def _points(kind: str, own: npt.NDArray[np.bool_], scores: Floats) -> tuple[Values, Values]:
    """Ascending x, and y."""
    if kind == "roc":
        x, y, _ = roc_curve(own, scores)
        return x, y
    precision, recall, _ = precision_recall_curve(own, scores)
    return recall[::-1], precision[::-1]


def _mean(kind: Kind, variant: str, curves: list[tuple[Values, Values]]) -> Curve:
    """The mean height over the labels; precision is a step that holds down to the next lower recall."""
    if kind == "roc":
        heights = [np.interp(_GRID, x, y) for x, y in curves]
    else:
        heights = [y[np.searchsorted(x, _GRID, side="left")] for x, y in curves]
    areas = [_area(kind, x, y) for x, y in curves]
    return Curve(
        kind=kind,
        variant=variant,
        label="",
        area=float(np.mean(areas)),
        x=tuple(_GRID.tolist()),
        y=tuple(np.mean(heights, axis=0).tolist()),
    )


def _curve(kind: Kind, variant: str, label: str, x: Values, y: Values) -> Curve:
    kept = np.unique(np.linspace(0, len(x) - 1, min(len(x), _POINTS)).astype(int))
    return Curve(
        kind=kind,
        variant=variant,
        label=label,
        area=_area(kind, x, y),
        x=tuple(x[kept].tolist()),
        y=tuple(y[kept].tolist()),
    )


def _area(kind: str, x: Values, y: Values) -> float:
    """Trapezoids under an ROC curve; steps under a precision-recall curve (average precision)."""
    return float(auc(x, y) if kind == "roc" else np.sum(np.diff(x) * y[1:]))
