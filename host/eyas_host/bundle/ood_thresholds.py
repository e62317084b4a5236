"""How far the images of a healthy camera are from the usual: the table for out-of-distribution detection.

A camera's last thirty images may show thirty scenes (a conveyor), one scene (a fixed view), or a few, one after the
other. Such streams are drawn from the validation images, also from one sub-population alone, because a healthy line
shows hardly any defects. For each number of different scenes, the threshold is the deviation that few of these streams
reach at any moment. Tails are exponential above a high quantile: a few images make no threshold.

Source: exceedances with an exponential tail, Davison & Smith, "Models for Exceedances over High Thresholds", 1990.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt
from scipy.stats import norm

from eyas_device.image_statistics import STATISTICS
from eyas_device.ood import (
    CERTAINTY,
    DETAILS,
    DETAILS_OF_LABEL,
    HISTORY,
    LAYOUT,
    LAYOUT_OF_LABEL,
    NAMES,
    OF_LABEL,
    TOGETHER,
    deviations,
    normal_scores,
    scene_distances,
)
from eyas_device.reference import ScoreTable
from eyas_host.evaluation.ood_streams import Streams, observe

Values = npt.NDArray[np.float64]
Rows = npt.NDArray[np.intp]

FALSE_ALARMS = 0.003
"""Fraction of streams of thirty validation images that may be flagged at any moment. Images that were not calibrated on
are a little farther away; this leaves room below one per cent."""
_SCENES = (1, 2, 3, 5, 10, 20, HISTORY)
"""Different scenes in a stream."""
_EFFECTIVE = np.array([1, 1.5, 2, 3, 4, 6, 8, 12, 16, 20, 25, 30], dtype=np.float64)
_STREAMS = 600
"""Streams for each number of scenes, with all images and with one sub-population."""
_HALF = np.array([0, 0.25, 0.5, 0.75, 1, 1.3, 1.6, 1.9, 2.2, 2.5, 3, 3.5, 4, 5, 6, 8, 12])
_SCORES = np.concatenate([-_HALF[:0:-1], _HALF])
"""Normal scores at which the quantiles are stored."""
_EXCEEDING = 20
"""Values beyond the quantile from which a tail is exponential."""
_MIN_SUBPOPULATION = 20
_ERRORS = 3.0
_MIN_VALIDATION = 100
"""With fewer validation images the training images are calibrated on too."""
_GROWTH = 1.02
_DISTANCES = (LAYOUT, DETAILS, TOGETHER, LAYOUT_OF_LABEL, DETAILS_OF_LABEL)
_FITTED = (LAYOUT, DETAILS, CERTAINTY, *OF_LABEL)
"""Training images look too good by these, because reference and model were fitted to them."""
_RESOLUTION = {statistic.name: statistic.resolution for statistic in STATISTICS} | dict.fromkeys(_FITTED, 0.1)


class Measured(NamedTuple):
    """Images by the statistics of `eyas_device.ood.NAMES`."""

    values: Values
    """float64 [n, names]; NaN: not measured."""
    groups: tuple[Sequence[str], ...]
    """Ways to divide the images into sub-populations, each with a name for every image."""


def fit_table(train: Measured, validation: Measured, *, seed: int = 0) -> ScoreTable:
    """Fit what is usual to both sets, and thresholds to the validation images."""
    measured = [row for row, name in enumerate(NAMES) if np.isfinite(validation.values[:, row]).all()]
    names = tuple(NAMES[row] for row in measured)
    both = np.concatenate([train.values, validation.values])
    quantiles = [
        score_quantiles(validation.values[:, row] if name in _FITTED else both[:, row], _RESOLUTION[name])
        for name, row in zip(names, measured, strict=True)
    ]
    table = ScoreTable(
        names=names,
        scores=_SCORES.astype(np.float32),
        quantiles=np.stack(quantiles).astype(np.float32),
        low=np.zeros(len(names), np.float32),
        high=np.zeros(len(names), np.float32),
        distinct=1.0,
        effective=_EFFECTIVE.astype(np.float32),
        thresholds=np.ones(len(_EFFECTIVE), np.float32),
    )

    def scored(values: Values) -> Values:
        return np.stack([normal_scores(row, table) for row in values[:, measured]])

    of_validation = scored(validation.values)
    known = np.array([name not in _FITTED for name in names])
    everything, groups = of_validation, validation.groups
    if len(of_validation) < _MIN_VALIDATION:
        of_train = np.where(known, scored(train.values), np.nan)
        everything = np.concatenate([of_validation, of_train])
        groups = tuple([*a, *b] for a, b in zip(validation.groups, train.groups, strict=True))
    low, high = _usual(everything, groups)
    if len(of_validation) >= _MIN_VALIDATION:
        more_low, more_high = _usual(np.where(known, scored(train.values), 0.0), train.groups)
        low, high = np.minimum(low, more_low), np.maximum(high, more_high)
    generator = np.random.default_rng(seed)
    everything = np.where(np.isnan(everything), 0.0, everything)
    table = msgspec.structs.replace(
        table,
        low=low.astype(np.float32),
        high=high.astype(np.float32),
        distinct=_distinct(scene_distances(everything, names), generator),
    )
    # Closer to the usual than all others is no reason for an alarm.
    for name in set(_DISTANCES) & set(names):
        table.low[names.index(name)] = _SCORES[0]
    return msgspec.structs.replace(table, thresholds=_thresholds(everything, groups, table, generator))


def score_quantiles(values: Values, resolution: float) -> Values:
    """The values at the normal scores `_SCORES`, ascending, of float64 [n].

    Beyond the quantile that some twenty values exceed, the tail is exponential with their mean excess. `resolution` is
    the smallest standard deviation.
    """
    fraction = min(0.98, max(0.75, 1.0 - _EXCEEDING / len(values)))
    from_score = float(norm.ppf(fraction))
    middle = float(np.median(values))
    found = np.quantile(values, norm.cdf(_SCORES))
    for sign in (-1.0, 1.0):
        edge = float(np.quantile(sign * values, fraction))
        beyond = sign * values[sign * values > edge] - edge
        excess = max(float(beyond.mean()) if len(beyond) else 0.0, 0.4 * resolution)
        tail = sign * _SCORES > from_score
        heights = norm.logsf(from_score) - norm.logsf(np.abs(_SCORES[tail]))
        found[tail] = sign * (edge + excess * heights)
    least = middle + resolution * _SCORES
    spread = np.where(_SCORES >= 0, np.maximum(found, least), np.minimum(found, least))
    return np.asarray(np.maximum.accumulate(spread))


def exceeded_by(values: Values, fraction: float) -> float:
    """The value that this fraction of float64 [n] exceed; where it is rare, by an exponential tail above 0.9."""
    edge = float(np.quantile(values, 0.9))
    beyond = values[values > edge] - edge
    tail = edge + (float(beyond.mean()) * float(np.log(0.1 / fraction)) if len(beyond) else 0.0)
    return max(tail, float(np.quantile(values, 1.0 - fraction))) if fraction * len(values) > 2 else tail


def _usual(scores: Values, groups: tuple[Sequence[str], ...]) -> tuple[Values, Values]:
    """Lowest and highest mean score, [names] each, of all images and of each sub-population that is large enough.

    Each mean is taken three standard errors away: what it is in the images to come is known no better.
    """
    populations = [np.arange(len(scores)), *(rows for rows in _rows(groups) if len(rows) >= _MIN_SUBPOPULATION)]
    low, high = [], []
    for rows in populations:
        known = ~np.isnan(scores[rows])
        count = np.maximum(1, known.sum(axis=0))
        mean = np.where(known, scores[rows], 0.0).sum(axis=0) / count
        variance = np.where(known, np.square(scores[rows] - mean), 0.0).sum(axis=0) / count
        error = _ERRORS * np.sqrt(variance / count)
        low.append(mean - error)
        high.append(mean + error)
    return np.min(low, axis=0), np.max(high, axis=0)


def _rows(groups: tuple[Sequence[str], ...]) -> list[Rows]:
    """The images of each sub-population."""
    found = []
    for names in groups:
        array = np.asarray(names)
        found += [np.flatnonzero(array == name) for name in sorted(set(names))]
    return found


def _distinct(distances: Values, generator: np.random.Generator) -> float:
    """The distance to the nearest of thirty random images that nine of ten images have at least."""
    count = min(HISTORY, len(distances))
    nearest = []
    for _ in range(200):
        chosen = generator.choice(len(distances), count, replace=False)
        among = distances[np.ix_(chosen, chosen)] + np.diag(np.full(count, np.inf))
        nearest.append(among.min(axis=1))
    return max(float(np.quantile(np.concatenate(nearest), 0.1)), 1e-3)


def _thresholds(
    scores: Values, groups: tuple[Sequence[str], ...], table: ScoreTable, generator: np.random.Generator
) -> npt.NDArray[np.float32]:
    distances = scene_distances(scores, table.names)
    whole = [np.arange(len(scores))]
    parts = [rows for rows in _rows(groups) if len(rows) >= _MIN_SUBPOPULATION] or whole
    streams = []
    for scenes_shown in _SCENES:
        for pools in (whole, parts):
            drawn = draw_streams(pools, scenes_shown, _STREAMS, generator)
            drawn_again = resample(drawn, pools, generator)
            streams.append(observe(drawn, scores[drawn_again], distances, table))
    scenes = np.concatenate([stream.scenes.ravel() for stream in streams])
    deviation = np.concatenate([stream.deviation.ravel() for stream in streams])
    edges = np.concatenate([[0.0], 0.5 * (_EFFECTIVE[1:] + _EFFECTIVE[:-1]), [np.inf]])
    found = np.empty(len(_EFFECTIVE))
    found[0] = exceeded_by(deviations(scores, table).max(axis=1), FALSE_ALARMS)
    for number in range(1, len(found)):
        near = (scenes > edges[number]) & (scenes <= edges[number + 1])
        found[number] = exceeded_by(deviation[near], FALSE_ALARMS) if near.sum() >= 200 else found[number - 1]
    found = np.maximum(np.minimum.accumulate(found), 0.05)
    while any(flagged(stream, found) > FALSE_ALARMS for stream in streams):
        found *= _GROWTH
    return found.astype(np.float32)


def draw_streams(pools: Sequence[Rows], scenes: int, count: int, generator: np.random.Generator) -> Rows:
    """Streams of thirty images, [count, 30]: this many different ones, each from a random moment to the next."""
    streams = np.empty((count, HISTORY), dtype=np.intp)
    for row in range(count):
        pool = pools[int(generator.integers(len(pools)))]
        images = generator.choice(pool, min(scenes, len(pool)), replace=False)
        changes = np.sort(generator.choice(np.arange(1, HISTORY), len(images) - 1, replace=False))
        streams[row] = images[np.searchsorted(changes, np.arange(HISTORY), side="right")]
    return streams


def resample(streams: Rows, pools: Sequence[Rows], generator: np.random.Generator) -> Rows:
    """Streams with the same scenes in time, each replaced by a random image of the same pool, with replacement.

    Thirty of eighty images without replacement have a mean that varies less than that of thirty images to come.
    """
    again = np.empty_like(streams)
    for row, stream in enumerate(streams):
        pool = next(pool for pool in pools if stream[0] in pool)
        _, scene = np.unique(stream, return_inverse=True)
        again[row] = generator.choice(pool, int(scene.max()) + 1)[scene]
    return again


def flagged(streams: Streams, thresholds: Values) -> float:
    """Fraction of streams that are flagged at any moment."""
    allowed = np.interp(streams.scenes, _EFFECTIVE, thresholds)
    return float((streams.deviation > allowed).any(axis=1).mean())
