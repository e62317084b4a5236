"""Other detectors on the mean confidence of steps, as scores that can be compared with any threshold.

Those of river are run once for each of some settings: they give no score.
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from scipy import stats

Floats = npt.NDArray[np.floating]
Bools = npt.NDArray[np.bool_]

REARM = 288
"""Steps of quiet after which a further alarm counts as another one: a day."""
CALM = 30
"""Stable streams on which a setting is tried before it meets the others."""


class Kswin(NamedTuple):
    """A setting of river's KSWIN."""

    alpha: float
    window: int
    """Steps that it remembers."""
    recent: int
    """The last of them, which are compared with as many of the others."""


KSWIN_DEFAULT = Kswin(0.005, 100, 30)
KSWIN_WINDOWS = ((100, 30), (2016, 288))
"""Remembered and compared steps: the default, and a day beside six days."""


def ks_scores(values: Floats, learned: int, length: int) -> Floats:
    """Kolmogorov-Smirnov statistic, times the root of the sample, of the last `length` steps against the learned ones.

    Args:
        values: [steps, streams].
        learned: Number of the first steps that are the reference.
        length: Steps that are compared.

    Returns:
        Scores [steps - learned, streams].

    """
    found = np.zeros((len(values) - learned, values.shape[1]), np.float32)
    above = (np.arange(length) + 1) / length
    for stream in range(values.shape[1]):
        own = values[:, stream]
        reference = np.sort(own[:learned][np.isfinite(own[:learned])])
        ranks = np.searchsorted(reference, own[learned - length + 1 :], side="right") / len(reference)
        windows = np.sort(np.lib.stride_tricks.sliding_window_view(ranks, length), axis=1)
        distance = np.maximum(above - windows, windows - (above - 1 / length)).max(axis=1)
        found[:, stream] = np.sqrt(length) * distance
    return found


def river_alarms(
    make: Callable[[Any], Any], setting: Any, values: Floats, learned: int, enough: Callable[[Bools], bool] | None
) -> Bools:
    """Alarms [steps - learned, streams] of a detector of river; it learns from all earlier steps.

    Args:
        make: Setting -> detector.
        setting: Of the detector.
        values: [steps, streams].
        learned: Steps without alarms.
        enough: Whether the alarms on the last `CALM` streams are few enough to go on with the others; if not, the
            result is empty.

    """
    alarms = np.zeros((len(values) - learned, values.shape[1]), bool)
    for place, stream in enumerate(reversed(range(values.shape[1]))):
        if place == CALM and enough is not None and not enough(alarms[:, -CALM:]):
            return np.zeros((0, 0), bool)
        detector = make(setting)
        for step, value in enumerate(values[:, stream].tolist()):
            detector.update(value)
            if step >= learned and detector.drift_detected:
                alarms[step - learned, stream] = True
    return alarms


def river_detectors() -> Mapping[str, tuple[Callable[[Any], Any], tuple[Any, ...]]]:
    """Detectors of river with their settings, the default first, from sensitive to patient; none without river."""
    try:
        from river import drift
    except ImportError:
        return {}
    return {
        "ADWIN": (lambda delta: drift.ADWIN(delta=delta), (0.002, 1e-3, 3e-4, 1e-4, 1e-5, 1e-10, 1e-20)),
        "Page-Hinkley": (
            lambda setting: drift.PageHinkley(delta=setting[0], threshold=setting[1]),
            (
                (0.005, 50.0),
                (0.005, 0.05),
                (0.005, 0.2),
                (0.005, 0.8),
                (0.02, 0.2),
                (0.02, 0.5),
                (0.03, 1.0),
                (0.05, 2.0),
            ),
        ),
    }


def kswin_alarms(setting: Kswin, values: Floats, learned: int) -> Bools:
    """Alarms [steps - learned, streams] of river's KSWIN, all streams at once; `values` are [steps, streams]."""
    return _kswin(setting, values)[1][learned:]


def kswin_alpha(window: int, recent: int, values: Floats, learned: int, stable: Bools, per_month: float) -> float:
    """An alpha with `per_month` alarms in 30 stable days at most.

    It begins with the p-values of a KSWIN that never alarms. One that forgets after an alarm is quieter: tenfold alphas
    are tried until there are too many alarms.

    Args:
        window: Steps that it remembers, at most `learned`.
        recent: The last of them, which are compared with as many of the others.
        values: [steps, streams].
        learned: Steps without alarms.
        stable: Which of the later steps count, [steps - learned, streams].
        per_month: Wanted alarms.

    """
    p_values = _kswin(Kswin(0.0, window, recent), values)[0][learned:]
    alpha = float(10 ** -calibrate(-np.log10(np.maximum(p_values, 1e-300)), stable, per_month))
    while alpha < 0.1:
        if rate(kswin_alarms(Kswin(10 * alpha, window, recent), values, learned), stable) > per_month:
            break
        alpha *= 10
    return alpha


def _kswin(setting: Kswin, values: Floats) -> tuple[Floats, Bools]:
    """P-values and alarms of `river.drift.KSWIN(alpha, window_size, stat_size, seed=0)`, both [steps, streams].

    Its decisions are river's, as the tests compare: after an alarm it forgets everything and its dice begin again, so
    that the steps which it draws follow from the number of tests since then, and streams can be followed together.
    """
    window, recent = setting.window, setting.recent
    steps, streams = values.shape
    dice = random.Random(0)
    draws = np.array([dice.sample(range(window - recent), recent) for _ in range(max(0, steps - window + 1))])
    p_of = np.array([_p_value(recent, apart) for apart in range(recent + 1)])
    p_values, alarms = np.ones((steps, streams)), np.zeros((steps, streams), bool)
    begin = np.zeros(streams, int)
    """Step at which each detector began again."""
    sign = np.repeat([1, -1], recent)
    for step in range(steps):
        ready = np.flatnonzero(step - begin >= window - 1)
        if not len(ready):
            continue
        drawn = step - window + 1 + draws[step - begin[ready] - window + 1]
        latest = np.broadcast_to(np.arange(step - recent + 1, step + 1), drawn.shape)
        both = values[np.concatenate([drawn, latest], axis=1), ready[:, None]]
        apart = np.abs(np.cumsum(sign[np.argsort(both, axis=1)], axis=1)).max(axis=1)
        p_values[step, ready] = p_of[apart]
        alarm = (p_of[apart] <= setting.alpha) & (apart / recent > 0.1)
        alarms[step, ready] = alarm
        begin[ready[alarm]] = step + 1
    return p_values, alarms


@cache
def _p_value(count: int, apart: int) -> float:
    """Of two samples of `count` values whose distribution functions are `apart` / `count` apart."""
    one = np.arange(count, dtype=float)
    with warnings.catch_warnings():  # as river does: exact p-values near 0 may be out of reach
        warnings.simplefilter("ignore", category=RuntimeWarning)
        return float(stats.ks_2samp(one, one + apart - 0.5 * (apart > 0)).pvalue)


def episodes(alarms: Bools) -> int:
    """Alarms, of which those within a day of the one before are the same one; over all streams."""
    total = 0
    for stream in range(alarms.shape[1]):
        at = np.flatnonzero(alarms[:, stream])
        total += bool(len(at)) + int((np.diff(at) > REARM).sum())
    return total


def rate(alarms: Bools, stable: Bools) -> float:
    """Alarms in 30 days of a stream, among its stable steps."""
    return float(episodes(alarms & stable) / (stable.sum() / 8640))


def calibrate(scores: Floats, stable: Bools, per_month: float) -> float:
    """The lowest threshold at which scores alarm `per_month` of 30 stable days at most."""
    low, high = 0.0, float(scores.max()) + 1.0
    for _ in range(30):
        middle = (low + high) / 2
        if rate(scores >= middle, stable) > per_month:
            low = middle
        else:
            high = middle
    return high


def delays(alarms: Bools, start: Floats, limit: int) -> Floats:
    """Hours from the begin of each stream's drift to its next alarm; `limit` steps where there is none by then."""
    found = np.empty(len(start))
    for stream, begin in enumerate(np.ceil(start).astype(int)):
        at = np.flatnonzero(alarms[begin : begin + limit, stream])
        found[stream] = (at[0] + 1 if len(at) else limit) / 12
    return found
