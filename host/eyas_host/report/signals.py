"""Remarks beside the verdict: what is worth a look (yellow) and what is well (green)."""

from __future__ import annotations

import itertools
import math
import unicodedata
from collections.abc import Iterable, Sequence

import numpy as np

from eyas_host.evaluation.cost import CostFigures
from eyas_host.evaluation.robustness import Robustness, RobustnessRow
from eyas_host.report.model import Report, Signal, Variant

FEW_TEST_IMAGES = 30
"""Images of a class below which its recall is known to about +-0.18 at best (95 %, binomial)."""
WIDE = 0.05
"""Half-width of an interval above which it is reported."""
_MIN_RATIO = 0.9
"""Balanced accuracy over the teacher's."""
_MAX_ECE = 0.05

MIN_DROP = 0.1
"""Balanced accuracy lost by a change that a device has to notice."""
MIN_FLAGGED = 0.9
"""Fraction of its windows that a device has to call out of distribution then."""
_MAX_FALSE_ALARMS = 0.01

_MAX_NAMES = 6

_SPLIT_BY = {
    "folders": "the images were split as their folders divide them",
    "column": "the images were split as their table divides them",
}


def judge(report: Report) -> tuple[Signal, ...]:
    """All remarks, those worth a look first; none without figures of the shipped variant."""
    own = next((variant for variant in report.variants if variant.name == report.shipped), None)
    if own is None:
        return ()
    signals = itertools.chain(
        _accuracy(report, own),
        _cost(report.cost) if report.cost is not None else (),
        _against_teacher(report, own),
        _calibration(report),
        _data(report),
        _robustness(report.robustness) if report.robustness is not None else (),
        _artefacts(report),
    )
    return tuple(sorted(signals, key=lambda signal: signal.level == "green"))


def _accuracy(report: Report, own: Variant) -> Iterable[Signal]:
    low, high = own.balanced_accuracy_ci
    if (high - low) / 2 > WIDE:
        text = f"balanced accuracy is known to {(high - low) * 50:.0f} points either way only: the test set is small"
        yield Signal("yellow", text)
    validation = next((variant for variant in report.validation_variants if variant.name == own.name), None)
    if validation is not None and high < validation.balanced_accuracy:
        promised = f"balanced accuracy was {_percent(validation.balanced_accuracy)} on validation"
        yield Signal("yellow", f"{promised}, above the test set's interval")


def _cost(figures: CostFigures) -> Iterable[Signal]:
    test = next((own for own in figures.splits if own.split == "test"), None)
    if test is not None and test.decided > test.likeliest:
        unit = f" {figures.decision.currency}".rstrip()
        yield Signal(
            "yellow", f"the most probable label would have cost less on the test set: {test.likeliest:,.4g}{unit}"
        )


def _against_teacher(report: Report, own: Variant) -> Iterable[Signal]:
    teacher = next((variant for variant in report.variants if variant.name == "teacher"), None)
    if teacher is None or not teacher.balanced_accuracy:
        return
    ratio = own.balanced_accuracy / teacher.balanced_accuracy
    level, only = ("green", "") if ratio >= _MIN_RATIO else ("yellow", "only ")
    yield Signal(level, f"{only}{100 * ratio:.0f} % of the teacher's balanced accuracy")  # type: ignore[arg-type]


def _calibration(report: Report) -> Iterable[Signal]:
    scores = report.scores.get(report.shipped)
    if scores is None or not math.isfinite(scores.ece):
        return
    error = max(scores.ece, scores.classwise_ece or 0.0)
    text = f"confidence is off by {_percent(scores.ece)} on average"
    if scores.classwise_ece is not None:
        text += f", the probability of a label by {_percent(scores.classwise_ece)}"
    if sum(map(sum, scores.confusion)) < FEW_TEST_IMAGES * len(report.labels):
        yield Signal("yellow", f"{text}: too few test images for a firm figure")
    else:
        yield Signal("green" if error <= _MAX_ECE else "yellow", text)


def _data(report: Report) -> Iterable[Signal]:
    if report.test_accesses > 1:
        yield Signal(
            "yellow", f"the held-out test set was read {report.test_accesses} times: its figures become optimistic"
        )
    if report.split_by == "stratified":
        yield Signal("yellow", "the images were split at random: other cameras, days or objects may do worse")
    elif report.split_by:
        yield Signal("green", _SPLIT_BY.get(report.split_by, f"the images were split by {report.split_by}"))
    yield from (Signal("yellow", warning) for warning in report.warnings)
    if report.notices:
        yield Signal("yellow", "the use of the images and the model is restricted: see the notices")


def _robustness(robustness: Robustness) -> Iterable[Signal]:
    blind = unnoticed(robustness)
    for row in blind:
        noticed = (
            f"devices flag only {100 * row.flagged:.0f} % of such windows" if row.flagged else "no device notices it"
        )
        yield Signal(
            "yellow", f"{row.change}: balanced accuracy falls to {_percent(row.balanced_accuracy)}, and {noticed}"
        )
    costly = [row for row in robustness.rows if row.drop >= MIN_DROP]
    if costly and not blind:
        yield Signal("green", f"devices notice all {len(costly)} changes of light, focus or view that cost accuracy")
    if robustness.flagged is not None and robustness.flagged > _MAX_FALSE_ALARMS:
        yield Signal(
            "yellow",
            f"{_percent(robustness.flagged)} of the windows of unchanged images are called out of distribution",
        )


def _artefacts(report: Report) -> Iterable[Signal]:
    if report.refused:
        yield Signal("yellow", f"not packed: {', '.join(report.refused)}")
    parity = report.parity.get(report.shipped)
    if parity is not None:
        agreement = f"agrees with the network it was made from on {_percent(parity.agreement)} of the images"
        yield Signal("green", f"{report.shipped} {agreement}")


def unnoticed(robustness: Robustness) -> tuple[RobustnessRow, ...]:
    """Changes that cost accuracy without being called out of distribution in nearly all windows."""
    return robustness.unnoticed(min_drop=MIN_DROP, min_flagged=MIN_FLAGGED)


def operating_point(confusion: tuple[tuple[int, ...], ...], positive: int) -> dict[str, tuple[float, float]]:
    """Operating point for two labels: `roc` (false, true positive rate) and `pr` (recall, precision)."""
    table = np.asarray(confusion, dtype=float)
    hit, miss = table[positive, positive], table[positive, 1 - positive]
    alarm, quiet = table[1 - positive, positive], table[1 - positive, 1 - positive]
    recall = hit / max(hit + miss, 1)
    return {
        "roc": (float(alarm / max(alarm + quiet, 1)), float(recall)),
        "pr": (float(recall), float(hit / max(hit + alarm, 1))),
    }


def isolated(label: str) -> str:
    """The label as a part of an English sentence: one with letters that run from right to left is isolated (UAX 9)."""
    right_to_left = any(unicodedata.bidirectional(letter) in ("R", "AL") for letter in label)
    return f"\u2068{label}\u2069" if right_to_left else label


def class_names(names: Sequence[str]) -> str:
    """`a, b and c`; of many only the first few, and how many more there are."""
    shown, more = [isolated(name) for name in names[:_MAX_NAMES]], len(names) - _MAX_NAMES
    if more > 0:
        return f"{', '.join(shown)} and {more} more"
    return " and ".join(filter(None, (", ".join(shown[:-1]), shown[-1])))


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"
