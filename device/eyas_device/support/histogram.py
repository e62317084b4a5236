"""Logarithmic histograms of durations: constant memory, quantiles within half a bin."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import accumulate, pairwise

_MIN_MS = 0.01
_MAX_MS = _MIN_MS * 1.05**450
"""Longer durations, of nine hours and more, are counted in the last bin."""
_KEPT = (0.35, 0.997)
"""Fractions between which bins are kept as they are. A quantile from p50 to p99 of many windows lies between them in
each of these windows."""
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
        """Return at most `max_bins` bins that keep the quantiles from p50 to p99, also of merged histograms.

        Adjacent bins of least combined weight and distance are joined, at their weighted mean: first those outside of
        `_KEPT`, and others only if that is not enough. The highest bin stays where it is.
        """
        bins = sorted(self.bins.items())
        first = bisect_left(list(accumulate(count for _, count in bins)), _KEPT[0] * self.bins.total())
        last = bisect_left(list(accumulate(count for _, count in bins)), _KEPT[1] * self.bins.total())
        low, kept, high = bins[:first], bins[first : last + 1], bins[last + 1 :]
        room = max_bins - len(kept)
        if room >= 2:
            low = _joined(low, max(1, room - len(high), room // 2))
            return dict([*low, *kept, *_joined(high, room - len(low))])
        return dict(_joined(bins, max_bins))

    def _bin(self, milliseconds: float) -> int:
        if not milliseconds > _MIN_MS:  # also for NaN
            return 0
        return round(math.log(min(milliseconds, _MAX_MS) / _MIN_MS) / self._step)


def _joined(bins: Sequence[tuple[int, int]], max_bins: int) -> list[tuple[int, int]]:
    """Join adjacent bins, (number, count) in ascending order, until at most `max_bins` are left."""
    found = list(bins)
    while len(found) > max_bins:
        pairs = [(a[1] + b[1]) * (b[0] - a[0]) for a, b in pairwise(found)]
        index = pairs.index(min(pairs))
        (left, few), (right, many) = found[index : index + 2]
        number = right if index + 2 == len(found) else round((left * few + right * many) / (few + many))
        found[index : index + 2] = [(number, few + many)]
    return found
