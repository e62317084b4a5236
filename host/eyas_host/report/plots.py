"""Plots of the comparison, pruning, training, calibration and layer sensitivity."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import matplotlib
from markupsafe import Markup
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullFormatter, PercentFormatter

from eyas_host.evaluation.metrics import Bin
from eyas_host.report.drawing import MUTED, PAPER, RUNTIMES, SMALL, SQUARE, STYLE, TRAIN, VALIDATION, WIDE, svg

if TYPE_CHECKING:  # without torch for the pages that need no training
    from eyas_host.compress.quantize.sensitivity import Sensitivity
    from eyas_host.report.model import Variant

_NAMED = 6
"""Layers that are labelled in the plot."""


def scatter(variants: Sequence[Variant], shipped: str) -> Markup:
    """Plot balanced accuracy with its interval against latency; the disc's area grows with the size in bytes.

    Variants without a latency are left out; the result is empty if none is left.
    """
    shown = [r for r in variants if r.latency_ms is not None and r.latency_ms.p50 > 0]
    if not shown:
        return Markup("")
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=WIDE, layout="constrained")
        axes = figure.add_subplot()
        largest = max(r.size_bytes or 0 for r in shown) or 1
        places = [(r.latency_ms.p50, r.balanced_accuracy) for r in shown if r.latency_ms]
        for variant, (x, y) in zip(shown, places, strict=True):
            colour = RUNTIMES.get(variant.runtime, MUTED)
            low, high = variant.balanced_accuracy_ci
            axes.plot([x, x], [low, high], color=colour, linewidth=1, alpha=0.4)
            axes.scatter(
                [x],
                [y],
                s=30 + 900 * (variant.size_bytes or 0) / largest,
                facecolor=colour if variant.precision == "int8" else PAPER,
                edgecolor=colour,
                linewidth=1.6,
                alpha=0.85,
                zorder=3,
            )
        low = min(r.balanced_accuracy_ci[0] for r in shown)
        high = max(r.balanced_accuracy_ci[1] for r in shown)
        margin = max(0.01, 0.06 * (high - low))
        low, high = low - margin, high + margin
        axes.set_ylim(low, high)
        axes.set_xscale("log")
        left, right = min(x for x, _ in places) / 1.3, max(x for x, _ in places) * 1.4
        axes.set_xlim(left, right)
        axes.xaxis.set_major_locator(FixedLocator(_round_steps(left, right)))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        axes.set_xlabel("median latency of one image, ms (log scale)")
        axes.set_title("balanced accuracy on the held-out test set")
        heights = _spread([(y - low) / (high - low) for _, y in places], gap=0.075)
        for variant, (x, y), height in zip(shown, places, heights, strict=True):
            size = "" if variant.size_bytes is None else f"  {variant.size_bytes / 1e6:.2f} MB"
            axes.annotate(
                f"{variant.name}{size}",
                xy=(x, y),
                xytext=(1.03, height),
                textcoords="axes fraction",
                va="center",
                fontsize=9,
                fontweight="bold" if variant.name == shipped else "normal",
                color=RUNTIMES.get(variant.runtime, MUTED),
                arrowprops={"arrowstyle": "-", "color": MUTED, "linewidth": 0.5, "alpha": 0.6, "relpos": (0, 0.5)},
            )
        names = ", ".join(r.name for r in shown)
        return svg(
            figure, f"Scatter plot of balanced accuracy against latency for {names}; figures are in the comparison"
        )


def front(points: Sequence[Mapping[str, Any]]) -> Markup:
    """Plot balanced accuracy after recovery against latency, from the dense student through all pruning rounds.

    `points` are `eyas_host.compress.prune.rounds.FrontPoint` as dictionaries; a disc is filled where the latency was
    measured, hollow where a table predicted it. Empty without points.
    """
    shown = [point for point in points if point.get("balanced_accuracy") is not None]
    if not shown:
        return Markup("")
    measured = [point["measured_ms"] is not None for point in shown]
    ms = [
        float(point["measured_ms"] if known else point["predicted_ms"])
        for point, known in zip(shown, measured, strict=True)
    ]
    accuracy = [float(point["balanced_accuracy"]) for point in shown]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=WIDE, layout="constrained")
        axes = figure.add_subplot()
        axes.plot(ms, accuracy, color=VALIDATION, linewidth=1.2, alpha=0.5)
        colours = [VALIDATION if known else PAPER for known in measured]
        axes.scatter(ms, accuracy, s=60, facecolor=colours, edgecolor=VALIDATION, linewidth=1.6, zorder=3)
        for point, x, y in zip(shown, ms, accuracy, strict=True):
            label = f"{point['fraction']:.0%}" if point["round"] else "dense"
            axes.annotate(label, (x, y), (7, -13), textcoords="offset points", color=MUTED)
        axes.margins(x=0.08, y=0.2)
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=1))
        axes.set_xlabel("latency of one image in int8 at one thread, ms")
        axes.set_title("balanced accuracy on validation after recovery (labels: fraction of the dense latency)")
        ends = f"{ms[0]:.2f} ms at {accuracy[0]:.3f} to {ms[-1]:.2f} ms at {accuracy[-1]:.3f}"
        return svg(figure, f"Accuracy-latency front of pruning in {len(shown)} networks, from {ends}")


def learning_curves(
    histories: Mapping[str, Sequence[Mapping[str, Any]]], metric: str = "combined"
) -> dict[str, Markup]:
    """Training -> plot of loss and balanced accuracy over the epochs; all plots share the accuracy axis.

    The teacher's head and blocks form one training; a line marks where the epochs' `stage` changes. The dot marks the
    best epoch by `metric`, or the one with the lowest divergence where that was measured (the int8 student).
    """
    accuracies = [_metric(e, "balanced_accuracy") for history in histories.values() for e in history]
    finite = [value for value in accuracies if math.isfinite(value)]
    limits = (min(finite) - 0.02, min(1.0, max(finite) + 0.02)) if finite else (0.0, 1.0)
    return {title: _curves(title, history, limits, metric) for title, history in _joined(histories).items() if history}


def _joined(histories: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, list[Mapping[str, Any]]]:
    """Join the histories `head` and `blocks`, if both exist, to `teacher` with continuous epoch numbers."""
    joined: dict[str, list[Mapping[str, Any]]] = {title: list(history) for title, history in histories.items()}
    head, blocks = joined.get("head"), joined.get("blocks")
    if not head or not blocks:
        return joined
    named = [{**epoch, "stage": "head"} for epoch in head]
    named += [{**epoch, "stage": epoch.get("stage") or "blocks"} for epoch in blocks]
    teacher: list[Mapping[str, Any]] = [{**epoch, "epoch": number} for number, epoch in enumerate(named, start=1)]
    return {"teacher": teacher} | {t: h for t, h in joined.items() if t not in ("head", "blocks")}


def _curves(title: str, history: Sequence[Mapping[str, Any]], limits: tuple[float, float], metric: str) -> Markup:
    epochs = [int(entry["epoch"]) for entry in history]
    stages = [str(entry.get("stage") or "") for entry in history]
    by = "divergence" if "divergence" in history[0].get("metrics", {}) else metric
    judged = [(-1 if by in ("loss", "divergence") else 1) * _metric(entry, by) for entry in history]
    begins = [row for row in range(1, len(stages)) if stages[row] != stages[row - 1]]
    finite = [(value, row) for row, value in enumerate(judged) if math.isfinite(value)]
    kept = max(finite, key=lambda pair: (pair[0], -pair[1]))[1] if finite else None
    marker = "o" if len(epochs) == 1 else ""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=SMALL, layout="constrained")
        losses, accuracy = figure.subplots(2, 1, sharex=True)
        losses.plot(epochs, [float(e["loss"]) for e in history], color=TRAIN, marker=marker)
        losses.plot(
            epochs,
            [_metric(e, "loss") for e in history],
            color=VALIDATION,
            linestyle="--",
            marker=marker,
        )
        losses.set_title("loss")
        values = [_metric(e, "balanced_accuracy") for e in history]
        accuracy.plot(epochs, values, color=VALIDATION, marker=marker)
        if kept is not None:
            accuracy.plot([epochs[kept]], [values[kept]], marker="o", markersize=7, color=VALIDATION)
        for row in begins:
            for axes in (losses, accuracy):
                axes.axvline(epochs[row] - 0.5, color=MUTED, linewidth=0.8, linestyle=":")
            losses.annotate(
                stages[row],
                (epochs[row] - 0.5, 0.97),
                (2, 0),
                xycoords=("data", "axes fraction"),
                textcoords="offset points",
                rotation=90,
                va="top",
                fontsize=7,
                color=MUTED,
            )
        accuracy.set_ylim(*limits)
        accuracy.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        accuracy.set_title("balanced accuracy, validation")
        accuracy.set_xlabel("epoch")
        accuracy.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=7))
        kept_text = "" if kept is None else f"; epoch {epochs[kept]} kept, balanced accuracy {values[kept]:.3f}"
        marks = "".join(f"; {stages[row]} from epoch {epochs[row]}" for row in begins)
        return svg(figure, f"Learning curves of {title}: {len(epochs)} epochs{kept_text}{marks}")


def reliability(bins: Sequence[Bin], title: str) -> Markup:
    """Plot accuracy against confidence; a disc's area is the bin's fraction of the images. Empty without bins."""
    if not bins:
        return Markup("")
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=SQUARE, layout="constrained")
        axes = figure.add_subplot()
        low = max(0.0, min(0.5, *(b.confidence for b in bins), *(b.accuracy for b in bins)) - 0.04)
        axes.plot([low, 1], [low, 1], color=MUTED, linewidth=1, linestyle=":")
        for b in bins:
            axes.plot([b.confidence] * 2, [b.confidence, b.accuracy], color=VALIDATION, linewidth=1.2, alpha=0.5)
        axes.scatter(
            [b.confidence for b in bins],
            [b.accuracy for b in bins],
            s=[15 + 420 * b.fraction for b in bins],
            color=VALIDATION,
            alpha=0.8,
            linewidth=0,
            zorder=3,
        )
        axes.set_xlim(low, 1.04)
        axes.set_ylim(low, 1.04)
        axes.set_aspect("equal")
        axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        axes.set_xlabel("confidence")
        axes.set_title("accuracy")
        return svg(figure, f"Reliability diagram {title}: confidence against accuracy in {len(bins)} bins")


def sensitivity(measured: Sensitivity) -> Markup:
    """Plot the SNR of the logits with only one layer in int8, in order of execution; the most sensitive are named.

    Layers that the advice keeps in float are filled discs; the line is the SNR with all layers in int8.
    """
    if not measured.layers:
        return Markup("")
    snr = {entry.layer: entry.only_int8.snr_db for entry in measured.layers}
    position = {layer: row for row, layer in enumerate(snr)}
    worst = [entry.layer for entry in measured.ranked][:_NAMED]
    kept = measured.advice.layers if measured.advice else ()
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=WIDE, layout="constrained")
        axes = figure.add_subplot()
        axes.axhline(measured.all_int8.snr_db, color=MUTED, linewidth=1, linestyle=":")
        axes.scatter(
            list(position.values()),
            list(snr.values()),
            s=34,
            facecolor=[VALIDATION if layer in kept else PAPER for layer in snr],
            edgecolor=VALIDATION,
            linewidth=1.6,
            zorder=3,
        )
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=9))
        axes.set_xlim(-1, len(snr))
        axes.set_xlabel("layer, in order of execution")
        axes.set_title("signal-to-noise ratio of the logits with only this layer in int8, dB (dotted: all layers)")
        low, high = axes.get_ylim()
        heights = _spread([(snr[layer] - low) / (high - low) for layer in worst], gap=0.085)
        for layer, height in zip(worst, heights, strict=True):
            axes.annotate(
                layer.removeprefix("backbone."),
                xy=(position[layer], snr[layer]),
                xytext=(1.03, height),
                textcoords="axes fraction",
                va="center",
                fontsize=9,
                fontweight="bold" if layer in kept else "normal",
                arrowprops={"arrowstyle": "-", "color": MUTED, "linewidth": 0.5, "alpha": 0.6, "relpos": (0, 0.5)},
            )
        return svg(figure, f"Sensitivity of {len(snr)} layers to int8; the most sensitive: {', '.join(worst)}")


def _metric(entry: Mapping[str, Any], name: str) -> float:
    """A metric of an epoch; NaN where it is missing or null."""
    value = entry.get("metrics", {}).get(name)
    return math.nan if value is None else float(value)


def _round_steps(low: float, high: float) -> list[float]:
    """1, 2 and 5 times the powers of ten between two bounds."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    return [step * 10.0**power for power in powers for step in (1, 2, 5) if low <= step * 10.0**power <= high]


def _spread(heights: Sequence[float], gap: float) -> list[float]:
    """Move label heights 0..1 apart to at least `gap`, in the same order, as little as possible."""
    order = sorted(range(len(heights)), key=lambda row: heights[row])
    places = [heights[row] for row in order]
    for n in range(1, len(places)):
        places[n] = max(places[n], places[n - 1] + gap)
    shift = sum(places) / len(places) - sum(heights) / len(heights)
    shift = min(max(shift, places[-1] - 1.0), places[0])
    moved = dict(zip(order, places, strict=True))
    return [moved[row] - shift for row in range(len(heights))]
