"""Aggregation of predictions in constant memory, for the status line and the telemetry windows."""

from __future__ import annotations

import math
import time
from bisect import bisect_right
from collections import Counter

import numpy as np
import numpy.typing as npt

from eyas_device.predict import Prediction, Probabilities
from eyas_device.reference import Floats, Reference
from eyas_device.support.histogram import LogHistogram
from eyas_device.telemetry.messages import CONFIDENCE_EDGES, GROWTH, TENTHS, Health, Sketch, Window

MAX_BINS = 128
"""Maximum bins of a window's histogram of durations, so that its size is bounded: as many as keep the quantiles of
durations that spread over a factor of several hundred."""
MAX_DIRECTIONS = 8
_CONFIDENCE_UNITS = 10_000


class LoopStats:
    """Counts and latencies of the predictions since its creation."""

    def __init__(self, *, growth: float = 1.01) -> None:
        """Start counting; `growth` is the ratio of neighbouring latency bins."""
        self.frames = 0
        self.uncertain = 0
        self.unreadable = 0
        """Frames that could not be decoded or were black."""
        self.counts: Counter[str] = Counter()
        """Label -> predictions."""
        self.latency = LogHistogram(growth)
        self._started = time.monotonic()

    def add(self, prediction: Prediction, latency_ms: float) -> None:
        """Count one prediction and its latency, decoding included."""
        self.frames += 1
        self.uncertain += prediction.uncertain
        self.counts[prediction.label] += 1
        self.latency.add(latency_ms)

    def seconds(self) -> float:
        """Seconds since its creation."""
        return time.monotonic() - self._started


class WindowAggregator:
    """Aggregates predictions and image descriptors into a telemetry window."""

    def __init__(self) -> None:
        self.stats = LoopStats(growth=GROWTH)
        self._nonfinite = 0
        self._confidence_bins: dict[str, list[int]] = {}
        self._confidence_sum: Counter[str] = Counter()
        """Label -> sum of confidences, in units of 1 / `_CONFIDENCE_UNITS`: integers add up exactly."""
        self._margin, self._entropy = [0] * TENTHS, [0] * TENTHS
        self._age = LogHistogram(GROWTH)
        self._images = 0
        self._mean = np.zeros(0)
        self._m2 = np.zeros(0)

    def add(self, prediction: Prediction, latency_ms: float, age_ms: float) -> None:
        """Count one prediction."""
        self.stats.add(prediction, latency_ms)
        self._age.add(age_ms)
        margin, entropy = uncertainty(prediction.probabilities)
        finite = prediction.finite and math.isfinite(prediction.confidence)
        confidence = min(max(prediction.confidence, 0.0), 1.0) if finite else 0.0
        self._nonfinite += not finite
        bins = self._confidence_bins.setdefault(prediction.label, [0] * (len(CONFIDENCE_EDGES) + 1))
        bins[bisect_right(CONFIDENCE_EDGES, confidence)] += 1
        self._confidence_sum[prediction.label] += round(confidence * _CONFIDENCE_UNITS)
        self._margin[_tenth(margin)] += 1
        self._entropy[_tenth(entropy)] += 1

    def add_projection(self, projection: Floats) -> None:
        """Add an image's projection on the principal directions, float [k], to the sketch (Welford's update)."""
        if len(self._mean) != len(projection):
            self._images, self._mean, self._m2 = 0, np.zeros(len(projection)), np.zeros(len(projection))
        self._images += 1
        difference = projection - self._mean
        self._mean += difference / self._images
        self._m2 += difference * (projection - self._mean)

    def window(self, model: str, artefact: str, *, arm: str, dropped: int, health: Health, digest: str = "") -> Window:
        """Return the aggregated window."""
        stats, images = self.stats, self._images
        return Window(
            seconds=round(stats.seconds(), 3),
            model=model,
            digest=digest,
            artefact=artefact,
            arm=arm,
            frames=stats.frames,
            dropped=dropped,
            unreadable=stats.unreadable,
            uncertain=stats.uncertain,
            counts=dict(stats.counts),
            nonfinite=self._nonfinite,
            confidence_bins={label: tuple(bins) for label, bins in self._confidence_bins.items()},
            confidence_sum={
                label: round(units / _CONFIDENCE_UNITS, 2) for label, units in self._confidence_sum.items()
            },
            margin=tuple(self._margin),
            entropy=tuple(self._entropy),
            sketch=Sketch(n=images, mean=_rounded(self._mean), m2=_rounded(self._m2)) if images else Sketch(),
            latency_ms=stats.latency.summary(),
            age_ms=self._age.summary(),
            latency_bins=stats.latency.folded(MAX_BINS),
            age_bins=self._age.folded(MAX_BINS),
            camera=health.camera,
            losses=health.losses,
            ood_quantile=health.ood_quantile,
            ood_images=health.ood_images,
            ood_reason=health.ood_reason,
            temperature_c=health.temperature_c,
            throttled=health.throttled,
        )


def uncertainty(probabilities: Probabilities) -> tuple[float, float]:
    """Return the margin (best minus second-best probability) and the entropy normalised by log(classes), both 0..1."""
    values = sorted(probabilities.tolist(), reverse=True)
    if len(values) < 2:
        return 1.0, 0.0
    entropy = -sum(p * math.log(p) for p in values if p > 0) / math.log(len(values))
    return values[0] - values[1], min(max(entropy, 0.0), 1.0)


def project(descriptor: Floats, reference: Reference) -> Floats:
    """Project a descriptor on the first principal directions, in standard deviations of the training images."""
    projection = reference.components[:MAX_DIRECTIONS] @ ((descriptor - reference.mean) / reference.scale)
    return np.asarray(projection / reference.spread[:MAX_DIRECTIONS], dtype=np.float32)


def _tenth(fraction: float) -> int:
    return min(max(int(fraction * TENTHS), 0), TENTHS - 1)


def _rounded(values: npt.NDArray[np.float64]) -> tuple[float, ...]:
    return tuple(float(f"{value:.5g}") for value in values)
