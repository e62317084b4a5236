"""A plot of drift as SVG: small, sharp at any size, with a title and a description for those who do not see it.

The upper panel has the measure beside its profile, the lower one the chart beside its threshold. Colours are CSS
variables: those of the page, or in a file of its own those of `style.css.j2`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence

import msgspec
import numpy as np
from markupsafe import Markup

from eyas_device.support.logs import clean
from eyas_host.fleet.drift.history import Series
from eyas_host.fleet.drift.measures import Floats
from eyas_host.fleet.status import utc
from eyas_host.report.page import environment

PACKAGE = "eyas_host.fleet.drift"
"""Has the templates."""
BAND = 2.0
"""Half of the height of the band, standard deviations."""
TOP_OF_CHART = 2.1
"""Charts are cut at twice their thresholds."""
WIDTH, HEIGHT = 960, 362
LEFT, RIGHT = 52, 948
UPPER, LOWER = (44, 232), (268, 336)
"""Top and bottom of the panels."""
_NAME, _HEADING = 64, 48
_DAY_S, _MAX_DAYS, _MAX_TICKS = 86_400.0, 10, 6


class Panel(msgspec.Struct, frozen=True):
    """Maps times and values to places in the drawing."""

    begin: float
    end: float
    low: float
    high: float
    top: float
    bottom: float

    def x(self, moment: float) -> float:
        """Place of a time, seconds since 1970; cut at the edges."""
        share = (moment - self.begin) / (self.end - self.begin)
        return LEFT + min(max(share, 0.0), 1.0) * (RIGHT - LEFT)

    def y(self, value: float) -> float:
        """Place of a value; not far beyond the edges."""
        share = (value - self.low) / (self.high - self.low)
        return self.bottom - min(max(share, -1.0), 2.0) * (self.bottom - self.top)


def draw(series: Series, *, alone: bool = False, id_: str = "plot") -> Markup:
    """The plot.

    Args:
        series: What it shows.
        alone: As a file of its own, with its colours; else for a page that has them.
        id_: Begin of the ids in it, unique on a page.

    """
    begin, end = (float(series.times[at]) + side * series.step_s / 2 for at, side in ((0, -1), (-1, 1)))
    low, high = _range([series.values, *band(series)])
    upper = Panel(begin, end, low, high, *UPPER)
    lower = Panel(begin, end, 0.0, TOP_OF_CHART, *LOWER)
    until = series.closed or end
    return Markup(
        environment(PACKAGE)
        .get_template("plot.svg.j2")
        .render(
            alone=alone,
            id=id_,
            title=f"{clean(series.measure, 100)} of {clean(series.device, _NAME)}",
            description=describe(series),
            width=WIDTH,
            height=HEIGHT,
            left=LEFT,
            right=RIGHT,
            upper=UPPER,
            lower=LOWER,
            measure=clean(series.measure, _HEADING),
            chart=clean(series.chart, _HEADING),
            per="an hour" if series.step_s <= 3600 else f"{series.step_s / 3600:.0f} hours",
            ticks=[(_place(upper.y(value)), f"{value:.6g}") for value in ticks(low, high)],
            days=[(_place(upper.x(moment)), text) for moment, text in days(begin, end)],
            band=" ".join(_polygons(upper, series.times, *band(series))),
            usual=path(upper, series.times, series.usual),
            others=[path(upper, series.times, one) for one in series.others],
            values=path(upper, series.times, series.values),
            heights=path(lower, series.times, series.heights),
            areas=" ".join(_polygons(lower, series.times, 0.0 * series.heights, series.heights)),
            threshold=_place(lower.y(1.0)),
            since=_place(upper.x(series.since)) if series.since > begin else None,
            since_text=utc(series.since),
            opened=_place(upper.x(series.opened)) if begin < series.opened < end else None,
            alarm=(_place(upper.x(series.since)), _place(upper.x(until) - upper.x(series.since)))
            if series.since
            else None,
        )
    )


def describe(series: Series) -> str:
    """What the plot shows, in words."""
    text = f"{clean(series.measure, 100)}, from {utc(float(series.times[0]))} to {utc(float(series.times[-1]))}."
    seen = series.values[np.isfinite(series.values)]
    usual = series.usual[np.isfinite(series.usual)]
    if len(usual):
        text += f" Usually {usual.min():.3g} to {usual.max():.3g} by the hour of the day."
    if len(seen):
        text += f" At the end {seen[-1]:.3g}."
    if series.since:
        text += f" Drift since {utc(series.since)}, noticed {utc(series.opened)}."
    if series.closed:
        text += f" Closed {utc(series.closed)}."
    highest = series.heights[np.isfinite(series.heights)]
    if len(highest):
        text += f" The chart of {clean(series.chart, 100)} reached {highest.max():.2f} times its threshold."
    if series.others:
        text += f" {len(series.others)} more of the site for comparison."
    return text


def band(series: Series) -> tuple[Floats, Floats]:
    """Bottom and top of the band around what is usual; a share stays between 0 and 1."""
    low, high = (series.usual + side * BAND * series.spread for side in (-1, 1))
    return (np.maximum(low, 0.0), np.minimum(high, 1.0)) if series.rate else (low, high)


def path(panel: Panel, times: Floats, values: Floats) -> str:
    """The path of a line; it has gaps where there are no values, and a dot where there is one between gaps."""
    parts = []
    for run in _runs(values):
        points = [f"{_place(panel.x(times[at]))},{_place(panel.y(values[at]))}" for at in run]
        parts.append("M" + "L".join(points) + ("h0" if len(points) == 1 else ""))
    return "".join(parts)


def ticks(low: float, high: float) -> list[float]:
    """Three to six round numbers within a range."""
    size = 10 ** math.floor(math.log10((high - low) / _MAX_TICKS))
    for factor in (1, 2, 2.5, 5, 10, 20):
        step = size * factor
        first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
        if last - first < _MAX_TICKS:
            return [number * step for number in range(first, last + 1)]
    raise AssertionError((low, high))


def days(begin: float, end: float) -> list[tuple[float, str]]:
    """Midnights within a stretch of time, some hours of a short one, and their names."""
    every = _DAY_S * max(1, math.ceil((end - begin) / _DAY_S / _MAX_DAYS))
    if end - begin < 2.5 * _DAY_S:
        every = _DAY_S / (4 if end - begin > _DAY_S else 8)
    first = math.ceil(begin / every) * every
    moments = [first + number * every for number in range(int((end - first) // every) + 1)]
    return [(moment, _day(moment) if moment % _DAY_S == 0 else _hour(moment)) for moment in moments]


def _day(moment: float) -> str:
    return time.strftime("%-d %b", time.gmtime(moment))


def _hour(moment: float) -> str:
    return time.strftime("%H:%M", time.gmtime(moment))


def _range(arrays: Sequence[Floats]) -> tuple[float, float]:
    """Range of all values, with some room."""
    everything = np.concatenate(arrays)
    seen = everything[np.isfinite(everything)]
    low, high = (float(seen.min()), float(seen.max())) if len(seen) else (0.0, 1.0)
    room = 0.06 * (high - low) or max(0.05 * abs(high), 0.01)
    return low - room, high + room


def _polygons(panel: Panel, times: Floats, low: Floats, high: Floats) -> Iterator[str]:
    for run in _runs(low + high):
        there = [f"{_place(panel.x(times[at]))},{_place(panel.y(high[at]))}" for at in run]
        back = [f"{_place(panel.x(times[at]))},{_place(panel.y(low[at]))}" for at in reversed(run)]
        yield "M" + "L".join([*there, *back]) + "Z"


def _runs(values: Floats) -> list[list[int]]:
    """Positions of finite values, those next to each other together."""
    at = np.flatnonzero(np.isfinite(values))
    return [run.tolist() for run in np.split(at, np.flatnonzero(np.diff(at) > 1) + 1) if len(run)]


def _place(value: float) -> float:
    return round(float(value), 1)
