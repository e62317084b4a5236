"""Plots of the test metrics: ROC, precision-recall and cost curves."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib
from markupsafe import Markup
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, PercentFormatter

from eyas_host.evaluation.cost import CostFigures
from eyas_host.report.curves import Kind, ScoreCurve
from eyas_host.report.drawing import INK, MUTED, RUNTIMES, SQUARE, STYLE, VALIDATION, WIDE, svg

_Y_LABELS = {"roc": "true positive rate (recall)", "pr": "precision"}
_X_LABELS = {"roc": "false positive rate", "pr": "recall"}


def draw_curves(
    curves: Sequence[ScoreCurve], kind: Kind, shipped: str, point: tuple[float, float] | None = None
) -> Markup:
    """Plot the curves of one kind: shipped variant in colour, teacher dashed, single labels thin; empty without any.

    `point` marks the shipped variant's operating point.
    """
    shown = [curve for curve in curves if curve.kind == kind]
    if not shown:
        return Markup("")
    means = {curve.variant for curve in shown if not curve.label}
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=SQUARE, layout="constrained")
        axes = figure.add_subplot()
        if kind == "roc":
            axes.plot([0, 1], [0, 1], color=MUTED, linewidth=1, linestyle=":")
        for curve in shown:
            own, single = curve.variant == shipped, bool(curve.label) and curve.variant in means
            if single and not own:
                continue
            axes.plot(
                curve.x,
                curve.y,
                color=VALIDATION if own else RUNTIMES["torch"],
                linestyle="-" if own else "--",
                linewidth=0.8 if single else 1.8,
                alpha=0.45 if single else 1.0,
                drawstyle="default" if kind == "roc" else "steps-pre",
            )
        if point is not None:
            axes.plot(*point, marker="o", markersize=8, color=VALIDATION, markeredgecolor=INK)
        axes.set_xlim(-0.02, 1.02)
        axes.set_ylim(-0.02, 1.02)
        axes.set_aspect("equal")
        axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        axes.set_title(_Y_LABELS[kind])
        axes.set_xlabel(_X_LABELS[kind])
        areas = ", ".join(f"{c.variant} {c.area:.3f}" for c in shown if not c.label or c.variant not in means)
        return svg(figure, f"{'ROC' if kind == 'roc' else 'Precision-recall'} curves; areas: {areas}")


def draw_costs(figures: CostFigures) -> Markup:
    """Plot the mean cost per image against the threshold on validation and test; empty without curves."""
    splits = [own for own in figures.splits if own.curve]
    threshold = figures.decision.threshold
    if not splits or threshold is None:
        return Markup("")
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=WIDE, layout="constrained")
        axes = figure.add_subplot()
        for own in splits:
            validation = own.split == "validation"
            colour = VALIDATION if validation else RUNTIMES["openvino"]
            thresholds, costs = [p.threshold for p in own.curve], [p.cost for p in own.curve]
            axes.plot(thresholds, costs, color=colour, linestyle="--" if validation else "-")
            axes.plot([threshold], [own.decided], marker="o", markersize=8, color=colour, markeredgecolor=INK, zorder=4)
        axes.axvline(threshold, color=INK, linewidth=1)
        if figures.bayes_threshold is not None:
            axes.axvline(figures.bayes_threshold, color=MUTED, linewidth=1, linestyle=":")
        axes.set_xlim(-0.01, 1.01)
        axes.set_ylim(bottom=0)
        axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}" if value >= 10 else f"{value:g}"))
        axes.set_xlabel(f"threshold on the probability of {figures.decision.label}")
        axes.set_title(f"mean cost per image{', ' * bool(figures.decision.currency)}{figures.decision.currency}")
        chosen = ", ".join(f"{own.split} {own.decided:.4g}" for own in splits)
        return svg(figure, f"Cost against the threshold; at the chosen {threshold:.3f}: {chosen}")
