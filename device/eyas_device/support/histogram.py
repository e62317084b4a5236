"""Logarithmic histograms of durations: memory that does not grow, quantiles within one bin."""

from __future__ import annotations

import math
from collections import Counter

_FINEST_MS = 0.01
_STEP = 1.01
"""Neighbouring bins of the latency histogram differ by 1 %: the error of a quantile."""
QUANTILES = {"p50": 0.5, "p90": 0.9, "p99": 0.99}


class Latencies:
    """A logarithmic histogram of durations in milliseconds: quantiles within 1 %, the maximum exact."""

    def __init__(self) -> None:
        self._bins: Counter[int] = Counter()
        self._count = 0
        self._max = 0.0

    def add(self, milliseconds: float) -> None:
        """Count one duration."""
        self._bins[round(math.log(max(milliseconds, _FINEST_MS) / _FINEST_MS, _STEP))] += 1
        self._count += 1
        self._max = max(self._max, milliseconds)

    def quantile(self, part: float) -> float:
        """The smallest duration that `part` (0..1) of all do not exceed, milliseconds; 0 if nothing was counted."""
        seen = 0
        for number, count in sorted(self._bins.items()):
            seen += count
            if seen >= part * self._count:
                return min(_FINEST_MS * _STEP**number, self._max)
        return 0.0

    def summary(self) -> dict[str, float]:
        """p50, p90, p99 and max, milliseconds; empty if nothing was counted."""
        if not self._count:
            return {}
        quantiles = {name: round(self.quantile(part), 3) for name, part in QUANTILES.items()}
        return quantiles | {"max": round(self._max, 3)}
