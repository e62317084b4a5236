"""Whether to ship: what the report found, as green, yellow and red reasons."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable

import msgspec
import numpy as np

from eyas_host.evaluate.cost import CostFigures
from eyas_host.report.model import Report, Signal, Variant

_FEW_TEST_IMAGES = 30
"""Of a class: its recall is then known to about +-0.18 at best (95 %, binomial)."""
_WIDE = 0.05
"""Half of an interval from which one should say so."""
_LEAST_SHARE = 0.9
"""Of the teacher's balanced accuracy."""
_LEAST_RECALL = 0.5
_MOST_ECE = 0.05

_GRAVITY = {"red": 0, "yellow": 1, "green": 2}


def judge(report: Report) -> tuple[Signal, ...]:
    """All reasons, the gravest first."""
    own = next((variant for variant in report.variants if variant.name == report.shipped), None)
    if own is None:
        return (Signal("red", f"{report.shipped} was not measured on the sealed test part"),)
    found = itertools.chain(
        _accuracy(report, own),
        _cost(report.cost) if report.cost is not None else (),
        _classes(report),
        _beside_the_teacher(report, own),
        _calibration(report),
        _data(report),
        _artefacts(report),
    )
    return tuple(sorted(found, key=lambda signal: _GRAVITY[signal.level]))


def _accuracy(report: Report, own: Variant) -> Iterable[Signal]:
    low, high = own.balanced_accuracy_ci
    words = f"balanced accuracy {_percent(own.balanced_accuracy)}, 95 % interval {_percent(low)} to {_percent(high)}"
    chance = 1 / len(report.labels)
    if low <= chance:
        yield Signal("red", f"{words}: no better than chance ({_percent(chance)})")
    elif (high - low) / 2 > _WIDE:
        yield Signal("yellow", f"{words}: too few test images to be sure of it")
    else:
        yield Signal("green", words)
    validation = next((variant for variant in report.validation_variants if variant.name == own.name), None)
    if validation is not None and high < validation.balanced_accuracy:
        yield Signal("yellow", f"validation promised {_percent(validation.balanced_accuracy)}, above that interval")


def _cost(figures: CostFigures) -> Iterable[Signal]:
    test = next((part for part in figures.parts if part.part == "test"), None)
    if test is None:
        return
    unit = f" {figures.decision.currency}".rstrip()
    words = f"an image costs {test.decided:,.4g}{unit}"
    always = f"answering {figures.constant_label!r} without looking costs {test.constant:,.4g}"
    high = test.interval[1] if test.interval else test.decided
    if test.decided >= test.constant:
        yield Signal("red", f"{words}, and {always}: the model saves nothing")
    elif high >= test.constant:
        yield Signal(
            "yellow", f"{words} (up to {high:,.4g}), and {always}: the test part is too small to tell them apart"
        )
    else:
        yield Signal("green", f"{words}; {always}")
    if test.decided > test.likeliest:
        yield Signal(
            "yellow", f"the likeliest label would have cost less on the test part: {test.likeliest:,.4g}{unit}"
        )


def _classes(report: Report) -> Iterable[Signal]:
    scores = report.decided or report.scores.get(report.shipped)
    for label, found in zip(report.labels, scores.classes if scores else (), strict=False):
        if found.support < _FEW_TEST_IMAGES:
            yield Signal("yellow", f"{label}: only {found.support} test images, its figures are mostly chance")
        elif found.recall < _LEAST_RECALL:
            yield Signal("yellow", f"{label}: only {_percent(found.recall)} of its images are found")


def _beside_the_teacher(report: Report, own: Variant) -> Iterable[Signal]:
    teacher = next((variant for variant in report.variants if variant.name == "teacher"), None)
    if teacher is None or not teacher.balanced_accuracy:
        return
    share = own.balanced_accuracy / teacher.balanced_accuracy
    level, word = ("green", "") if share >= _LEAST_SHARE else ("yellow", "only ")
    yield Signal(level, f"{word}{share:.0%} of the teacher's balanced accuracy")  # type: ignore[arg-type]


def _calibration(report: Report) -> Iterable[Signal]:
    scores = report.scores.get(report.shipped)
    if scores is None or not math.isfinite(scores.ece):
        return
    words = f"confidence is off by {_percent(scores.ece)} on average"
    yield Signal("green", words) if scores.ece <= _MOST_ECE else Signal("yellow", words)


def _data(report: Report) -> Iterable[Signal]:
    if report.test_openings > 1:
        yield Signal(
            "yellow", f"the sealed test part was opened {report.test_openings} times: its figures grow too kind"
        )
    if report.divided_by == "stratified":
        yield Signal("yellow", "the images were divided at random: other cameras, days or objects may give less")
    elif report.divided_by:
        yield Signal("green", f"the images were divided by {report.divided_by}")
    yield from (Signal("yellow", warning) for warning in report.warnings)
    if report.notices:
        yield Signal("yellow", "what may be done with the images and the model: see the notices below")


def _artefacts(report: Report) -> Iterable[Signal]:
    if report.refused:
        yield Signal("yellow", f"not packed: {', '.join(report.refused)}")
    parity = report.parity.get(report.shipped)
    if parity is not None:
        words = f"{_percent(parity.agreement)} of its answers are those of the network it was made from"
        yield Signal("green", f"{report.shipped}: {words}")


def operating_point(confusion: tuple[tuple[int, ...], ...], positive: int) -> dict[str, tuple[float, float]]:
    """Where the answers of two labels lie: `roc` (false, true positive rate) and `pr` (recall, precision)."""
    table = np.asarray(confusion, dtype=float)
    hit, miss = table[positive, positive], table[positive, 1 - positive]
    alarm, quiet = table[1 - positive, positive], table[1 - positive, 1 - positive]
    recall = hit / max(hit + miss, 1)
    return {
        "roc": (float(alarm / max(alarm + quiet, 1)), float(recall)),
        "pr": (float(recall), float(hit / max(hit + alarm, 1))),
    }


def with_signals(report: Report) -> Report:
    """The same report, judged."""
    return msgspec.structs.replace(report, signals=judge(report))


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"
