"""Whether to ship: the figures of the held-out test set against the bounds of the recipe's `[accept]`.

A bound is met if the whole 95 % interval of its figure keeps it, missed if the whole interval breaks it, and open
otherwise: then the test set is too small to tell. One missed bound: do not ship. One open bound: look.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from scipy.stats import norm

from eyas_host.evaluation.bootstrap import wilson_interval
from eyas_host.evaluation.metrics import Scores
from eyas_host.evaluation.robustness import RobustnessRow
from eyas_host.recipe.accept import AcceptSection
from eyas_host.report.model import Check, Outcome, Report, Ship, Variant
from eyas_host.report.signals import MIN_DROP, MIN_FLAGGED, WIDE, class_names, isolated

Interval = tuple[float, float]


def decide(report: Report, accept: AcceptSection) -> Ship:
    """The verdict on the shipped variant, with one check for each bound that applies."""
    own = next((variant for variant in report.variants if variant.name == report.shipped), None)
    scores = report.decided or report.scores.get(report.shipped)
    if own is None or scores is None:
        unknown = Check(bound="", outcome="missed", text=f"{report.shipped} was not measured on the held-out test set")
        return _verdict((unknown,))
    checks = (
        *_test_log(report),
        *_balanced_accuracy(report, scores, accept),
        *_positive_class(report, scores, accept),
        *_each_class(report, scores, accept),
        *_cost(report, accept),
        *_int8(report, own, accept),
        *_ood_coverage(report, accept),
    )
    return _verdict(checks)


def _verdict(checks: tuple[Check, ...]) -> Ship:
    by_outcome = {outcome: tuple(c.text for c in checks if c.outcome == outcome) for outcome in _ORDER}
    ordered = tuple(sorted(checks, key=lambda check: _ORDER.index(check.outcome)))
    if by_outcome["missed"]:
        return Ship(verdict="do not ship", reasons=by_outcome["missed"] + by_outcome["open"], checks=ordered)
    if by_outcome["open"]:
        return Ship(verdict="look", reasons=by_outcome["open"], checks=ordered)
    return Ship(verdict="ship", reasons=by_outcome["met"], checks=ordered)


_ORDER: tuple[Outcome, ...] = ("missed", "open", "met")


class _Figure(NamedTuple):
    """A figure with its interval, and what to call it."""

    name: str
    value: float
    interval: Interval
    images: int
    """Test images that it rests on."""

    def __str__(self) -> str:
        low, high = self.interval
        return f"{self.name} is {_percent(self.value)} (95 % interval {_percent(low)} to {_percent(high)})"


def _at_least(bound: str, figure: _Figure, required: float) -> Check:
    """The check of a figure that must not be lower than `required`."""
    low, high = figure.interval
    asked = f"at least {_percent(required)} is asked for"
    if not math.isfinite(figure.value):
        return Check(bound=bound, outcome="open", text=f"{figure.name} was not measured; {asked}")
    if low >= required:
        return Check(bound=bound, outcome="met", text=f"{figure}; {asked}")
    if high < required:
        return Check(bound=bound, outcome="missed", text=f"{figure}, but {asked}")
    return Check(bound=bound, outcome="open", text=f"{figure}; {asked}: {_too_few(figure.images)}")


def _test_log(report: Report) -> Iterable[Check]:
    for problem in report.test_log_problems:
        text = f"how often the held-out test set was read is not known: {problem}"
        yield Check(bound="", outcome="missed", text=text)


def _balanced_accuracy(report: Report, scores: Scores, accept: AcceptSection) -> Iterable[Check]:
    figure = _Figure(
        "balanced accuracy",
        scores.balanced_accuracy,
        _interval(report, "balanced_accuracy", scores.balanced_accuracy_ci),
        sum(map(sum, scores.confusion)),
    )
    (low, high), chance = figure.interval, 1 / len(report.labels)
    if low <= chance:
        firm = figure.value <= chance or (high - low) / 2 <= WIDE
        text = f"{figure}: no better than chance ({_percent(chance)})"
        text += "" if firm else f", as far as can be told; {_too_few(figure.images)}"
        yield Check(bound="", outcome="missed" if firm else "open", text=text)
    if accept.min_balanced_accuracy is not None:
        yield _at_least("min_balanced_accuracy", figure, accept.min_balanced_accuracy)
    elif accept.min_recall is None and report.cost is None:
        text = (
            f"{figure}; whether that is enough, the recipe does not say: set [accept] min_balanced_accuracy or "
            "min_recall, or a [cost] table"
        )
        yield Check(bound="min_balanced_accuracy", outcome="open", text=text)


def _positive_class(report: Report, scores: Scores, accept: AcceptSection) -> Iterable[Check]:
    if accept.min_recall is None:
        return
    label = report.positive_class
    if label not in report.labels:
        yield Check(bound="min_recall", outcome="open", text="recall of the positive class: the class is not known")
        return
    yield _recall("min_recall", _recall_figures(report, scores)[report.labels.index(label)], accept.min_recall)


def _each_class(report: Report, scores: Scores, accept: AcceptSection) -> Iterable[Check]:
    """One check for all classes; it names the one with the lowest recall."""
    required, figures = accept.min_worst_recall, _recall_figures(report, scores)
    if not required or not figures:
        return
    checks = [_recall("min_worst_recall", figure, required) for figure in figures]
    worst = {outcome: [n for n, c in enumerate(checks) if c.outcome == outcome] for outcome in _ORDER}
    outcome = next(outcome for outcome in _ORDER if worst[outcome])
    lowest = min(worst[outcome], key=lambda n: (figures[n].value, -figures[n].images))
    others = [report.labels[n] for n in worst[outcome] if n != lowest]
    text = checks[lowest].text
    if outcome == "met":
        text = f"every class: the lowest {text}"
    elif others:
        text += f"; likewise {class_names(others)}"
    yield Check(bound="min_worst_recall", outcome=outcome, text=text)


def _recall(bound: str, figure: _Figure, required: float) -> Check:
    """The check of a recall; where it is open, it says how many images could decide it."""
    if not figure.images:
        text = f"{figure.name} is not known: the test set has no image of it"
        return Check(bound=bound, outcome="open", text=text)
    check = _at_least(bound, figure, required)
    needed = math.ceil(round(float(norm.ppf(0.975)) ** 2 * required / (1 - required), 9))
    if check.outcome != "open" or figure.images >= needed:
        return check
    text = f"{check.text}; even if all are right, at least {needed} independent images are needed"
    return Check(bound=bound, outcome="open", text=text)


def _recall_figures(report: Report, scores: Scores) -> list[_Figure]:
    return [
        _Figure(f"recall of {isolated(label)}", own.recall, own.recall_ci or (0.0, 1.0), own.support)
        for label, own in zip(report.labels, scores.classes, strict=False)
    ]


def _cost(report: Report, accept: AcceptSection) -> Iterable[Check]:
    test = next((own for own in report.cost.splits if own.split == "test"), None) if report.cost else None
    if report.cost is None or test is None:
        return
    unit = f" {report.cost.decision.currency}".rstrip()
    low, high = test.interval or (0.0, math.inf)
    limit = accept.max_cost_ratio * test.constant
    between = f" (95 % interval {low:,.4g} to {high:,.4g})" if test.interval else ""
    figure = f"the mean cost per image is {test.decided:,.4g}{unit}{between}"
    asked = f"always predicting {isolated(report.cost.constant_label)} costs {test.constant:,.4g}"
    if accept.max_cost_ratio < 1:
        asked += f", of which at most {_percent(accept.max_cost_ratio)} ({limit:,.4g}) is accepted"
    if high < limit:
        yield Check(bound="max_cost_ratio", outcome="met", text=f"{figure}; {asked}")
    elif low >= limit:
        yield Check(bound="max_cost_ratio", outcome="missed", text=f"{figure}, but {asked}")
    else:
        yield Check(bound="max_cost_ratio", outcome="open", text=f"{figure}; {asked}: {_too_few(test.images)}")


def _int8(report: Report, own: Variant, accept: AcceptSection) -> Iterable[Check]:
    if own.precision == "fp32" or accept.max_int8_loss >= 1:
        return
    loss = report.test_losses.get(own.name)
    asked = f"a loss of at most {_points(accept.max_int8_loss)} points is accepted"
    if loss is None:
        text = f"what {own.precision} lost on the test set was not measured; {asked}"
        yield Check(bound="max_int8_loss", outcome="open", text=text)
        return
    low, high = loss.interval
    verb = "lost" if loss.loss >= 0 else "gained"
    figure = (
        f"{own.precision} {verb} {_points(abs(loss.loss))} points of balanced accuracy on the test set "
        f"(95 % interval {_points(low)} to {_points(high)} lost)"
    )
    if high <= accept.max_int8_loss:
        yield Check(bound="max_int8_loss", outcome="met", text=f"{figure}; {asked}")
    elif low > accept.max_int8_loss:
        yield Check(bound="max_int8_loss", outcome="missed", text=f"{figure}, but {asked}")
    else:
        images = sum(map(sum, report.scores[own.name].confusion)) if own.name in report.scores else 0
        yield Check(bound="max_int8_loss", outcome="open", text=f"{figure}; {asked}: {_too_few(images)}")


def _ood_coverage(report: Report, accept: AcceptSection) -> Iterable[Check]:
    """The fraction of costly changes that devices notice, between those surely and those possibly noticed."""
    if accept.min_ood_coverage is None:
        return
    measured = report.robustness
    if measured is None or measured.flagged is None:
        text = "whether devices notice changes of light, focus and view was not measured"
        yield Check(bound="min_ood_coverage", outcome="open", text=text)
        return
    costly = [row for row in measured.rows if row.drop >= MIN_DROP]
    asked = f"at least {_percent(accept.min_ood_coverage)} of them are asked for"
    if not costly:
        text = f"no change of light, focus or view costs {_points(MIN_DROP)} points of balanced accuracy"
        yield Check(bound="min_ood_coverage", outcome="met", text=text)
        return
    limits = [_flagged_interval(row, measured.windows) for row in costly]
    surely, possibly = (np.mean([limit[side] >= MIN_FLAGGED for limit in limits]) for side in (0, 1))
    seen = sum((row.flagged or 0.0) >= MIN_FLAGGED for row in costly)
    missed = [row.change for row in costly if (row.flagged or 0.0) < MIN_FLAGGED]
    text = f"devices notice {seen} of {len(costly)} changes that cost accuracy"
    text += f", but not {class_names(missed)}" if missed else ""
    if surely >= accept.min_ood_coverage:
        yield Check(bound="min_ood_coverage", outcome="met", text=f"{text}; {asked}")
    elif possibly < accept.min_ood_coverage:
        yield Check(bound="min_ood_coverage", outcome="missed", text=f"{text}; {asked}")
    else:
        yield Check(
            bound="min_ood_coverage",
            outcome="open",
            text=f"{text}; {asked}: {measured.windows} windows are too few to tell",
        )


def _flagged_interval(row: RobustnessRow, windows: int) -> Interval:
    flagged = round((row.flagged or 0.0) * windows)
    return wilson_interval(np.arange(windows) < flagged) if windows else (0.0, 1.0)


def _interval(report: Report, figure: str, otherwise: Interval) -> Interval:
    """The interval under the bundle's decision rule where it was computed."""
    return report.intervals.get(report.shipped, {}).get(figure, otherwise) if report.decided else otherwise


def _too_few(images: int) -> str:
    return f"{images:,} test image{'' if images == 1 else 's'} are too few to tell" if images else "it cannot be told"


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def _points(value: float) -> str:
    return f"{100 * value:.1f}"
