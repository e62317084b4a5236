"""Plots of the report about the sealed test part's figures: ROC, precision-recall and cost."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib
from markupsafe import Markup
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, PercentFormatter

from eyas_host.evaluate.cost import CostFigures
from eyas_host.report.curves import Curve, Kind
from eyas_host.report.drawing import INK, MUTED, RUNTIMES, STYLE, VALIDATION, svg

_TITLES = {"roc": "found, of those that are", "pr": "right, of those that are reported (precision)"}
_BELOW = {"roc": "reported, of those that are not (false positive rate)", "pr": "found, of those that are (recall)"}


def score_curves(curves: Sequence[Curve], kind: Kind, shipped: str, point: tuple[float, float] | None = None) -> Markup:
    """The curves of one kind: the shipped variant in colour, the teacher dashed, single labels thin; empty without any.

    `point` marks where the shipped variant's answers lie.
    """
    shown = [curve for curve in curves if curve.kind == kind]
    if not shown:
        return Markup("")
    means = {curve.variant for curve in shown if not curve.label}
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(3.6, 3.5), layout="constrained")
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
        axes.set_title(_TITLES[kind])
        axes.set_xlabel(_BELOW[kind])
        areas = ", ".join(f"{c.variant} {c.area:.3f}" for c in shown if not c.label or c.variant not in means)
        return svg(figure, f"{'ROC' if kind == 'roc' else 'Precision-recall'} curves; areas: {areas}")


def cost(figures: CostFigures) -> Markup:
    """Mean cost of an image against the threshold, on validation and test, the chosen one marked; empty without."""
    parts = [part for part in figures.parts if part.curve]
    threshold = figures.decision.threshold
    if not parts or threshold is None:
        return Markup("")
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(8.4, 3.6), layout="constrained")
        axes = figure.add_subplot()
        for part in parts:
            validation = part.part == "validation"
            colour = VALIDATION if validation else RUNTIMES["openvino"]
            places, prices = [p.threshold for p in part.curve], [p.cost for p in part.curve]
            axes.plot(places, prices, color=colour, linestyle="--" if validation else "-")
            axes.plot(
                [threshold], [part.decided], marker="o", markersize=8, color=colour, markeredgecolor=INK, zorder=4
            )
        axes.axvline(threshold, color=INK, linewidth=1)
        if figures.bayes_threshold is not None:
            axes.axvline(figures.bayes_threshold, color=MUTED, linewidth=1, linestyle=":")
        axes.set_xlim(-0.01, 1.01)
        axes.set_ylim(bottom=0)
        axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}" if value >= 10 else f"{value:g}"))
        axes.set_xlabel(f"threshold on the probability of {figures.decision.label}")
        axes.set_title(f"mean cost of an image{', ' * bool(figures.decision.currency)}{figures.decision.currency}")
        chosen = ", ".join(f"{part.part} {part.decided:.4g}" for part in parts)
        return svg(figure, f"Cost against the threshold; at the chosen {threshold:.3f}: {chosen}")
