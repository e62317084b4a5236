"""Logarithmic histograms of durations: constant memory, quantiles within half a bin."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping

_MIN_MS = 0.01
_MAX_MS = _MIN_MS * 1.05**450
"""Longer durations, of nine hours and more, are counted in the last bin."""
QUANTILES = {"p50": 0.5, "p90": 0.9, "p99": 0.99}


class LogHistogram:
    """Histogram of durations in milliseconds: bin n holds durations around 0.01 ms * growth^n.

    A quantile is off by half a bin at most; the maximum is exact.
    """

    def __init__(self, growth: float = 1.01, *, bins: Mapping[int, int] | None = None, max_ms: float = 0.0) -> None:
        """Start empty, or with `bins` (bin -> durations) and the longest of these durations."""
        self.bins: Counter[int] = Counter(bins or {})
        self.max_ms = max_ms
        self._step = math.log(growth)

    def add(self, milliseconds: float) -> None:
        """Count one duration."""
        self.bins[self._bin(milliseconds)] += 1
        self.max_ms = max(self.max_ms, milliseconds)

    def quantile(self, fraction: float) -> float:
        """Return the shortest duration that `fraction` (0..1) of all do not exceed, milliseconds; 0 if empty."""
        count, total = 0, self.bins.total()
        for number, durations in sorted(self.bins.items()):
            count += durations
            if count >= fraction * total:
                return min(_MIN_MS * math.exp(self._step * number), self.max_ms)
        return 0.0

    def summary(self) -> dict[str, float]:
        """Return p50, p90, p99 and max in milliseconds; empty if nothing was counted."""
        if not self.bins.total():
            return {}
        quantiles = {name: round(self.quantile(fraction), 3) for name, fraction in QUANTILES.items()}
        return quantiles | {"max": round(self.max_ms, 3)}

    def folded(self, max_bins: int) -> dict[int, int]:
        """Return at most `max_bins` bins: the rarest, one after the other, are counted with the nearer neighbour."""
        bins = dict(sorted(self.bins.items()))
        while len(bins) > max_bins:
            rarest = min(bins, key=lambda number: (bins[number], number))
            count = bins.pop(rarest)
            bins[min(bins, key=lambda number: (abs(number - rarest), -number))] += count
        return bins

    def _bin(self, milliseconds: float) -> int:
        if not milliseconds > _MIN_MS:  # also for NaN
            return 0
        return round(math.log(min(milliseconds, _MAX_MS) / _MIN_MS) / self._step)
