"""What is measured of a device in each step of five minutes: sums over its windows, and the measures that follow.

Sums can be added up, so a step does not depend on the order of its windows, and a device that floods changes its own
ratios only. A window that contradicts itself (counts that do not add up, more confidence than predictions) is refused.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import msgspec
import numpy as np
import numpy.typing as npt

from eyas_device.telemetry.messages import CONFIDENCE_EDGES, TENTHS, Sketch, Window

Floats = npt.NDArray[np.float64]

STEP_S = 300
"""Length of a step, seconds."""
MAX_LABELS = 6
"""Labels of a model that are followed one by one: the most frequent ones."""
DIRECTIONS = 8
"""Principal directions of a sketch."""
BINS = len(CONFIDENCE_EDGES) + 1
MAX_WINDOW_S = 7200.0
"""A window that was merged over more than this tells no hour of the day, and is left out."""
MIN_FRAMES, MIN_OF_LABEL = 5, 5
"""Predictions below which a step, or a label in it, has no measures."""
_UNSURE_BINS = 2
"""Bins of a confidence below .7."""
_MAX_VALUE = 1e6
"""Largest projection, in standard deviations of the training images, that is believed."""
_TENTH_MIDDLES = (np.arange(TENTHS) + 0.5) / TENTHS
_BIN_MIDDLES = np.array([0.4, 0.6, 0.75, 0.85, 0.925, 0.965, 0.985, 0.9925, 0.997, 0.9995])

_FRAMES, _SUM, _UNSURE, _MARGIN, _ENTROPY, _OOD, _OOD_N, _OOD_FLAGS, _WINDOWS, _IMAGES = range(10)
_MEAN = slice(10, 10 + DIRECTIONS)
_SQUARES = slice(_MEAN.stop, _MEAN.stop + DIRECTIONS)
_COUNTS = slice(_SQUARES.stop, _SQUARES.stop + MAX_LABELS)
_SUMS = slice(_COUNTS.stop, _COUNTS.stop + MAX_LABELS)
_LABEL_BINS = slice(_SUMS.stop, _SUMS.stop + (MAX_LABELS + 1) * BINS)
SUMS = _LABEL_BINS.stop
"""Number of sums of a step."""

_COMMON = ("confidence", "low confidence", "margin", "entropy", "distance", "out of distribution", "spread")
_SCALES = (0.003, 0.01, 0.005, 0.005, 0.02, 0.05, 0.03)
"""Smallest standard deviation of each measure that is believed: stable days may show none at all."""
_SCALE_OF_SHARE, _SCALE_OF_LABEL, _SCALE_OF_DIRECTION = 0.01, 0.005, 0.03
SCALARS = len(_COMMON) + 2 * MAX_LABELS
"""Measures that are followed one by one; after them come the directions, which are followed together."""
MEASURES = SCALARS + DIRECTIONS
MODEL, IMAGE, SPREAD = (0, 1, 2, 3), (4, 5), (6,)
"""Measures of the model's certainty, of the images, and of how much they vary."""
MIX = tuple(range(len(_COMMON), len(_COMMON) + MAX_LABELS))
OF_LABEL = tuple(range(len(_COMMON) + MAX_LABELS, SCALARS))
SCALES = np.array(
    [*_SCALES, *[_SCALE_OF_SHARE] * MAX_LABELS, *[_SCALE_OF_LABEL] * MAX_LABELS, *[_SCALE_OF_DIRECTION] * DIRECTIONS]
)
RATES = np.array([True, True, True, True, True, True, False, *[True] * 2 * MAX_LABELS, *[False] * DIRECTIONS])
"""Which measures are shares or probabilities, 0..1."""


def names(labels: Sequence[str]) -> tuple[str, ...]:
    """The measures' names, for the labels that are followed; `-` where there are fewer."""
    padded = [*labels, *["-"] * (MAX_LABELS - len(labels))]
    return (
        *_COMMON,
        *(f"share of {label}" for label in padded),
        *(f"confidence of {label}" for label in padded),
        *(f"image direction {number + 1}" for number in range(DIRECTIONS)),
    )


class SmallWindow(msgspec.Struct, frozen=True):
    """The fields of a `Window` that matter here: decoding them alone is several times faster."""

    seconds: float = 0.0
    model: str = ""
    digest: str = ""
    arm: str = ""
    merged: int = 1
    frames: int = 0
    counts: dict[str, int] = {}
    confidence_bins: dict[str, tuple[int, ...]] = {}
    confidence_sum: dict[str, float] = {}
    confidence: dict[str, tuple[int, ...]] = {}
    margin: tuple[int, ...] = ()
    entropy: tuple[int, ...] = ()
    sketch: Sketch = Sketch()
    ood_quantile: float | None = None
    ood_reason: str = ""


def sums_of(window: Window | SmallWindow, labels: Sequence[str]) -> list[float] | None:
    """The sums of one window, `SUMS` floats; None for a window without predictions or one that contradicts itself."""
    frames = window.frames
    if frames <= 0 or sum(window.counts.values()) != frames or not _consistent(window):
        return None
    label_sums = window.confidence_sum or _from_tenths(window.confidence)
    total = sum(label_sums.values())
    counts = [float(window.counts.get(label, 0)) for label in labels]
    padding = [0.0] * (MAX_LABELS - len(labels))
    bins = [window.confidence_bins.get(label, ()) for label in labels]
    flat = [float(count) for row in bins for count in (row or (0,) * BINS)] + [0.0] * (BINS * len(padding))
    everything = [float(sum(column)) for column in zip(*window.confidence_bins.values(), strict=True)] or [0.0] * BINS
    sketch = _sketch_sums(window.sketch)
    has_ood = window.ood_quantile is not None
    return [
        float(frames),
        total,
        everything[0] + everything[1] if window.confidence_bins else math.nan,
        _mean_of_tenths(window.margin, frames),
        _mean_of_tenths(window.entropy, frames),
        (window.ood_quantile or 0.0) * window.merged,
        float(window.merged) if has_ood else 0.0,
        float(window.merged) if window.ood_reason else 0.0,
        float(window.merged),
        *sketch,
        *counts,
        *padding,
        *(label_sums.get(label, 0.0) for label in labels),
        *padding,
        *flat,
        *everything,
    ]


def measure(sums: Floats) -> Floats:
    """The measures of steps: sums [n, SUMS] -> [n, MEASURES], NaN where there is too little of something."""
    frames = sums[:, _FRAMES]
    with np.errstate(divide="ignore", invalid="ignore"):
        enough = np.where(frames >= MIN_FRAMES, frames, np.nan)
        images = np.where(sums[:, _IMAGES] >= 2, sums[:, _IMAGES], np.nan)
        counts = np.where(sums[:, _COUNTS] >= MIN_OF_LABEL, sums[:, _COUNTS], np.nan)
        mean = sums[:, _MEAN] / images[:, None]
        variance = np.maximum(sums[:, _SQUARES] / images[:, None] - np.square(mean), 0.0)
        unused = ~np.any(sums[:, _COUNTS] > 0, axis=1)
        shares = np.where(unused[:, None], np.nan, sums[:, _COUNTS] / enough[:, None])
        found = np.column_stack(
            [
                sums[:, _SUM] / enough,
                sums[:, _UNSURE] / enough,
                sums[:, _MARGIN] / enough,
                sums[:, _ENTROPY] / enough,
                sums[:, _OOD] / np.where(sums[:, _OOD_N] > 0, sums[:, _OOD_N], np.nan),
                sums[:, _OOD_FLAGS] / np.where(sums[:, _OOD_N] > 0, sums[:, _OOD_N], np.nan),
                np.log(variance.mean(axis=1) + 1e-3),
                shares,
                sums[:, _SUMS] / counts,
                mean,
            ]
        )
    return np.asarray(found)


def confidence_bins(sums: Floats) -> Floats:
    """Predictions per bin of confidence: [n, SUMS] -> [n, MAX_LABELS + 1, BINS], the labels' and then all."""
    return sums[:, _LABEL_BINS].reshape(len(sums), MAX_LABELS + 1, BINS)


def frames_of(sums: Floats) -> Floats:
    """Number of predictions: [n, SUMS] -> [n]."""
    return np.asarray(sums[:, _FRAMES])


def most_frequent(counts: Mapping[str, float]) -> tuple[str, ...]:
    """The labels to follow."""
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return tuple(sorted(label for label, _ in ordered[:MAX_LABELS]))


def _consistent(window: Window | SmallWindow) -> bool:
    frames = window.frames
    if any(
        value > window.counts.get(label, 0) + 0.01 * window.merged for label, value in window.confidence_sum.items()
    ):
        return False
    for tenths in (window.margin, window.entropy):
        if sum(tenths) not in (0, frames):
            return False
    bins = window.confidence_bins
    return not bins or all(sum(bins.get(label, ())) == count for label, count in window.counts.items())


def _from_tenths(confidence: Mapping[str, Sequence[int]]) -> dict[str, float]:
    """Sums of confidences of agents 0.1.0, which sent tenths only."""
    return {label: float(np.dot(tenths, _TENTH_MIDDLES)) for label, tenths in confidence.items()}


def _mean_of_tenths(tenths: Sequence[int], frames: int) -> float:
    if sum(tenths) != frames:
        return math.nan
    return sum(count * (number + 0.5) for number, count in enumerate(tenths)) / TENTHS


def _sketch_sums(sketch: Sketch) -> list[float]:
    """Images, sum and sum of squares per direction; zeros without a sketch of all directions."""
    n, k = sketch.n, min(len(sketch.mean), len(sketch.m2))
    if n <= 0 or k == 0 or max(map(abs, sketch.mean)) > _MAX_VALUE:
        return [0.0] * (1 + 2 * DIRECTIONS)
    mean = [*sketch.mean[:k], *[0.0] * (DIRECTIONS - k)]
    m2 = [*sketch.m2[:k], *[0.0] * (DIRECTIONS - k)]
    return [
        float(n),
        *(n * value for value in mean),
        *(q + n * value * value for q, value in zip(m2, mean, strict=True)),
    ]
