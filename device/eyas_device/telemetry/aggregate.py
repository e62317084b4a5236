"""What happens in a few seconds, counted in memory that does not grow, to become a telemetry window."""

from __future__ import annotations

import math
import time
from collections import Counter

import numpy as np
import numpy.typing as npt

from eyas_device.bundle import Floats, Reference
from eyas_device.predict import Prediction, Probabilities
from eyas_device.telemetry.messages import TENTHS, Health, Sketch, Window, duration_bin, durations

MOST_BINS = 18
"""Of a histogram of durations; the rarest ones are counted with their neighbour, so that a window keeps its size."""
MOST_DIRECTIONS = 8


class WindowAggregator:
    """What was answered since it was made."""

    def __init__(self) -> None:
        self.unreadable = 0
        self._started = time.monotonic()
        self.frames = self._uncertain = 0
        self._counts: Counter[str] = Counter()
        self._confidence: dict[str, list[int]] = {}
        self._margin, self._entropy = [0] * TENTHS, [0] * TENTHS
        self._latency: Counter[int] = Counter()
        self._age: Counter[int] = Counter()
        self._longest = [0.0, 0.0]
        self._seen = 0
        self._mean = np.zeros(0)
        self._m2 = np.zeros(0)

    def add(self, prediction: Prediction, latency_ms: float, age_ms: float) -> None:
        """Count one answer."""
        self.frames += 1
        self._uncertain += prediction.uncertain
        self._counts[prediction.label] += 1
        margin, entropy = uncertainty(prediction.probabilities)
        tenths = self._confidence.get(prediction.label)
        if tenths is None:
            tenths = self._confidence[prediction.label] = [0] * TENTHS
        tenths[_tenth(prediction.confidence)] += 1
        self._margin[_tenth(margin)] += 1
        self._entropy[_tenth(entropy)] += 1
        self._latency[duration_bin(latency_ms)] += 1
        self._age[duration_bin(age_ms)] += 1
        self._longest = [max(self._longest[0], latency_ms), max(self._longest[1], age_ms)]

    def look(self, place: Floats) -> None:
        """Add where an image lies along the principal directions, float [k], to the sketch (Welford's update)."""
        if len(self._mean) != len(place):
            self._seen, self._mean, self._m2 = 0, np.zeros(len(place)), np.zeros(len(place))
        self._seen += 1
        off = place - self._mean
        self._mean += off / self._seen
        self._m2 += off * (place - self._mean)

    def window(self, model: str, artefact: str, *, arm: str, dropped: int, vitals: Health) -> Window:
        """All of it."""
        return Window(
            seconds=round(time.monotonic() - self._started, 3),
            model=model,
            artefact=artefact,
            arm=arm,
            frames=self.frames,
            dropped=dropped,
            unreadable=self.unreadable,
            uncertain=self._uncertain,
            counts=dict(self._counts),
            confidence={label: tuple(tenths) for label, tenths in self._confidence.items()},
            margin=tuple(self._margin),
            entropy=tuple(self._entropy),
            sketch=Sketch(n=self._seen, mean=_rounded(self._mean), m2=_rounded(self._m2)) if self._seen else Sketch(),
            latency_ms=durations(self._latency, self._longest[0]),
            age_ms=durations(self._age, self._longest[1]),
            latency_bins=fold(self._latency),
            age_bins=fold(self._age),
            camera=vitals.camera,
            losses=vitals.losses,
            ood_quantile=vitals.ood_quantile,
            temperature_c=vitals.temperature_c,
            throttled=vitals.throttled,
        )


def uncertainty(probabilities: Probabilities) -> tuple[float, float]:
    """The best probability minus the second best, and the entropy divided by log(classes); both 0..1."""
    values = sorted(probabilities.tolist(), reverse=True)
    if len(values) < 2:
        return 1.0, 0.0
    entropy = -sum(p * math.log(p) for p in values if p > 0) / math.log(len(values))
    return values[0] - values[1], min(max(entropy, 0.0), 1.0)


def place(descriptor: Floats, reference: Reference) -> Floats:
    """Where an image lies along the first principal directions, in standard deviations of the training images."""
    along = reference.components[:MOST_DIRECTIONS] @ ((descriptor - reference.mean) / reference.scale)
    return np.asarray(along / reference.spread[:MOST_DIRECTIONS], dtype=np.float32)


def fold(bins: Counter[int], most: int = MOST_BINS) -> dict[int, int]:
    """At most `most` bins: the rarest, one after the other, are counted with the nearer neighbour."""
    numbers = dict(sorted(bins.items()))
    while len(numbers) > most:
        rarest = min(numbers, key=lambda number: (numbers[number], number))
        count = numbers.pop(rarest)
        numbers[min(numbers, key=lambda number: (abs(number - rarest), -number))] += count
    return numbers


def _tenth(share: float) -> int:
    return min(max(int(share * TENTHS), 0), TENTHS - 1)


def _rounded(values: npt.NDArray[np.float64]) -> tuple[float, ...]:
    return tuple(float(f"{value:.5g}") for value in values)
