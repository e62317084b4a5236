"""The report as one self-contained HTML file: no scripts, no links, images and plots inline.

The template engine escapes all text from data; only the SVG of `plots` is inserted as it is.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from eyas_device.preprocess import Pixels
from eyas_host.evaluation.metrics import calibration_error
from eyas_host.report import plots, score_plots
from eyas_host.report.glossary import Glossary
from eyas_host.report.model import Explanations, Report, Variant
from eyas_host.report.page import (
    confused_pairs,
    confusion_cells,
    environment,
    jpeg,
    megabytes,
    number,
    percent,
    thumbnail,
)
from eyas_host.report.signals import MIN_DROP, operating_point, unnoticed

_TRAININGS = {
    "teacher": "teacher: head, then last blocks",
    "head": "teacher: head",
    "blocks": "teacher: last blocks",
    "student": "student, by distillation",
    "labels-only": "student, from labels only",
    "pruned": "pruned student, recovery",
    "qat": "int8 student, quantization-aware training",
}
_MAX_THUMBNAILS = 24


def render_html(
    report: Report,
    explanations: Explanations | None = None,
    examples: Mapping[str, Pixels] | None = None,
    files: Mapping[str, str] | None = None,
) -> str:
    """Render the report as HTML; images that can no longer be read are replaced by a note.

    Args:
        report: What the page shows.
        explanations: Overlays shown beside mistakes, or why there are none.
        examples: Name of a change -> an image that suffered it, uint8 [height, width, 3] BGR.
        files: Path of a mistake as the report shows it -> its file; by default the path itself.

    """
    explanations, files, glossary = explanations or Explanations(), files or {}, Glossary()
    overlays = {path: jpeg(image) for path, image in explanations.overlays.items()}
    bits = report.recipe.get("image", {}).get("bits", 0)
    decided = report.decided or report.scores.get(report.shipped)
    positive = next((curve.label for curve in report.curves if curve.label), "")
    points = (
        operating_point(decided.confusion, report.labels.index(positive))
        if decided and positive and len(report.labels) == 2
        else {}
    )
    shipped, teacher = _variant(report, report.shipped), _variant(report, "teacher")
    curves = plots.learning_curves(report.histories, report.recipe.get("run", {}).get("selection_metric", "combined"))
    return (
        environment()
        .get_template("report.html.j2")
        .render(
            report=report,
            glossary=glossary,
            term=glossary.term,
            verdict=verdict(report),
            ratios={r.name: ratios(r, teacher) for r in report.variants} if teacher else {},
            validation={r.name: r for r in report.validation_variants},
            shipped=shipped,
            references={p.reference for p in report.parity.values()},
            decided=decided,
            per_class=list(zip(report.labels, decided.classes, strict=False)) if decided else [],
            own_intervals=report.intervals.get(report.shipped, {}),
            positive=positive,
            roc=score_plots.draw_curves(report.curves, "roc", report.shipped, points.get("roc")),
            pr=score_plots.draw_curves(report.curves, "pr", report.shipped, points.get("pr")),
            areas={kind: _areas(report, kind) for kind in ("roc", "pr")},
            cost=score_plots.draw_costs(report.cost) if report.cost else None,
            axis=_axis(report.variants),
            unmeasured=[r.name for r in report.variants if r.latency_ms is None],
            scatter=plots.scatter(report.variants, report.shipped),
            curves=[(_TRAININGS.get(name, name), plot) for name, plot in curves.items()],
            reliability=[
                (title, plots.reliability(bins, title), calibration_error(bins))
                for when in ("before", "after")
                if (bins := report.reliability.get(when, ())) and (title := f"{when} calibration")
            ],
            confusions=[
                (name, confusion_cells(scores.confusion))
                for name, scores in ((report.shipped, decided), ("teacher", report.scores.get("teacher")))
                if scores and (name, scores) != ("teacher", decided)
            ],
            mistakes=[
                (m, thumbnail(files.get(m.path, m.path), bits), overlays.get(files.get(m.path, m.path)))
                for m in report.mistakes[:_MAX_THUMBNAILS]
            ],
            explained=bool(overlays),
            unexplained=explanations.reason,
            confused=confused_pairs(decided.confusion) if decided else [],
            totals={label: sum(split.get(label, 0) for split in report.counts.values()) for label in report.labels},
            accept=report.recipe.get("accept", {}),
            total_seconds=sum(s.seconds for s in report.stages),
            max_seconds=max((s.seconds for s in report.stages), default=0.0) or 1.0,
            max_rss_mb=max((s.peak_rss_mb for s in report.stages), default=0.0) or 1.0,
            machines=_machines(report),
            other_versions=_other_versions(report),
            front=plots.front(report.pruning.get("front", ())),
            min_drop=MIN_DROP,
            examples={name: jpeg(image) for name, image in (examples or {}).items()},
            unnoticed=unnoticed(report.robustness) if report.robustness else (),
            sensitivity=plots.sensitivity(report.sensitivity) if report.sensitivity else None,
            max_bytes=max((layer.fp32_bytes for layer in report.layers), default=0) or 1,
            gate=report.recipe.get("gate", {}),
            sections=_sections(report.recipe),
        )
    )


def verdict(report: Report) -> str:
    """One sentence: accuracy, latency and size of the shipped variant, and how they compare with the teacher's."""
    own, teacher = _variant(report, report.shipped), _variant(report, "teacher")
    if own is None:
        return f"The shipped model {report.shipped} was not measured on the held-out test set."
    latency = f"in {number(own.latency_ms.p50, 3)} ms per image" if own.latency_ms else "latency not measured"
    size = f"in {megabytes(own.size_bytes)}" if own.size_bytes is not None else "size not measured"
    by_largest_logit = "" if report.decided is None else " by its largest logit"
    sentence = (
        f"The shipped model {own.name} reaches {percent(own.balanced_accuracy)} balanced accuracy on unseen "
        f"images{by_largest_logit}, {latency}, {size}"
    )
    if teacher is None or teacher is own:
        return sentence + "."
    accuracy, *others = ratios(own, teacher)
    comparison = f", {' and '.join(others)} than the teacher in torch" if others else ""
    return f"{sentence}: {accuracy} of the teacher's balanced accuracy{comparison}."


def ratios(variant: Variant, teacher: Variant) -> list[str]:
    """A variant against the teacher: ratio of balanced accuracy, then of size and latency where both are known."""
    accuracy = variant.balanced_accuracy / teacher.balanced_accuracy if teacher.balanced_accuracy else math.nan
    texts = [percent(accuracy, 0)]
    if variant.size_bytes and teacher.size_bytes:
        texts.append(_times(teacher.size_bytes / variant.size_bytes, "smaller", "larger"))
    if variant.latency_ms and teacher.latency_ms and variant.latency_ms.p50 > 0 and teacher.latency_ms.p50 > 0:
        texts.append(_times(teacher.latency_ms.p50 / variant.latency_ms.p50, "faster", "slower"))
    return texts


def _machines(report: Report) -> list[tuple[dict[str, str], str]]:
    """Every machine that a figure comes from, and its stages; that of the latencies first."""
    stages: dict[str, list[str]] = {}
    known = {"": report.machine} | {str(m): m for stage in report.stages for m in stage.machines}
    for stage in report.stages:
        for machine in stage.machines:
            stages.setdefault(str(machine), []).append(stage.name)
    first = str(report.machine)
    others = [key for key in stages if key != first]
    return [(report.machine, ", ".join(stages.get(first, ())))] + [
        (known[key], ", ".join(stages[key])) for key in others
    ]


def _other_versions(report: Report) -> list[tuple[str, str]]:
    """Stage -> versions of its libraries that differ from those of the latencies, `timm 1.0.20`."""
    differing = (
        (
            stage.name,
            [f"{name} {text}" for name, text in stage.versions.items() if report.versions.get(name, text) != text],
        )
        for stage in report.stages
    )
    return [(name, ", ".join(texts)) for name, texts in differing if texts]


def _variant(report: Report, name: str) -> Variant | None:
    return next((r for r in report.variants if r.name == name), None)


def _times(ratio: float, more: str, less: str) -> str:
    if 0.95 < ratio < 1.05:
        return f"no {more}"
    factor, word = (ratio, more) if ratio > 1 else (1 / ratio, less)
    return f"{factor:.{0 if factor >= 9.95 else 1}f}× {word}"  # noqa: RUF001 - the multiplication sign is meant


def _axis(variants: Sequence[Variant]) -> tuple[float, float]:
    """Common range of the interval bars, just around all intervals."""
    low = min((r.balanced_accuracy_ci[0] for r in variants), default=0.0)
    high = max((r.balanced_accuracy_ci[1] for r in variants), default=1.0)
    margin = max(0.005, 0.04 * (high - low))
    return max(0.0, low - margin), min(1.0, high + margin)


def _areas(report: Report, kind: str) -> list[tuple[str, float]]:
    """(variant, area under its curve or under the mean of its labels' curves)."""
    areas: dict[str, float] = {}
    for curve in report.curves:
        if curve.kind == kind:
            areas.setdefault(curve.variant, curve.area)
    return list(areas.items())


def _sections(recipe: Mapping[str, Any]) -> list[tuple[str, list[tuple[str, Any]]]]:
    """The recipe's sections with their settings; a top-level value becomes its own section."""
    return [
        (name, list(values.items()) if isinstance(values, Mapping) else [(name, values)])
        for name, values in recipe.items()
    ]
