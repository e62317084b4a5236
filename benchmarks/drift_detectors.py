"""Other detectors on the mean confidence of steps, as scores that can be compared with any threshold.

Those of river are run once for each of some settings: they give no score.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.floating]
Bools = npt.NDArray[np.bool_]

REARM = 288
"""Steps of quiet after which a further alarm counts as another one: a day."""


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


def river_alarms(make: Callable[[Any], Any], settings: Any, values: Floats, learned: int) -> dict[Any, Bools]:
    """Alarms [steps - learned, streams] of a detector of river, for each setting; it learns from all earlier steps."""
    found = {}
    for setting in settings:
        alarms = np.zeros((len(values) - learned, values.shape[1]), bool)
        for stream in range(values.shape[1]):
            detector = make(setting)
            for step, value in enumerate(values[:, stream].tolist()):
                detector.update(value)
                if step >= learned and detector.drift_detected:
                    alarms[step - learned, stream] = True
        found[setting] = alarms
    return found


def river_detectors(kswin: bool) -> Mapping[str, tuple[Callable[[Any], Any], tuple[Any, ...]]]:
    """Detectors of river with their settings, the default first, from sensitive to patient; none without river."""
    try:
        from river import drift
    except ImportError:
        return {}
    found: dict[str, tuple[Callable[[Any], Any], tuple[Any, ...]]] = {
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
    if kswin:
        found["KSWIN"] = (lambda alpha: drift.KSWIN(alpha=alpha, seed=0), (0.005, 1e-4, 1e-8, 1e-12))
    return found


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
