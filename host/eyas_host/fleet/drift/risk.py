"""Prediction-powered risk monitoring: few true labels and many predictions bound the accuracy, at any time.

A label costs a person's time; a prediction's confidence costs nothing, and its mean over all predictions is known. A
labelled sample therefore counts with what is new in it: its error minus what its confidence had announced, plus what
the confidences of all predictions announce. If confidences say something, that varies less than errors do, and fewer
labels are needed; if they are wrong, the bound is wider and still right.

The bound is by betting: for each error rate m that would be too low, a gambler bets that samples are right more often
than m allows; m is excluded when a mixture of stakes has multiplied the money by 1 / alpha. That may be looked at after
every label (Ville's inequality). What has to hold: samples are drawn at random, and the accuracy is the same for the
time that is looked at. After a drift the bound speaks of its best time.

Sources: Waudby-Smith & Ramdas, "Estimating means of bounded random variables by betting", JRSS B 2024; Angelopoulos et
al., "Prediction-powered inference", Science 2023; Zhang et al., "Prediction-powered risk monitoring", arXiv 2602.02229.
"""

from __future__ import annotations

import msgspec
import numpy as np

from eyas_host.fleet.drift.measures import Floats

ALPHA = 0.05
_STAKES = np.geomspace(0.01, 0.9, 14)
"""Fractions of the largest stake that cannot ruin."""
_GRID = 250
_PRIOR_LABELS = 10.0
"""Labels after which half of what confidences seem to explain is believed."""


class RiskBound(msgspec.Struct, frozen=True, kw_only=True):
    """What is known of the accuracy after some labels."""

    labels: int
    """Labelled samples."""
    accuracy: float
    """Estimate."""
    lower: float
    """The accuracy is at least this, with probability 1 - alpha at all times together."""
    upper: float
    """It is at most this, with the same probability."""


class RiskMonitor:
    """Bounds the accuracy from labelled samples, one after the other.

    Args:
        alpha: Probability that the lower bound is ever wrong; and the same for the upper one.

    """

    def __init__(self, alpha: float = ALPHA) -> None:
        self._level = np.log(1 / alpha)
        self._m = (np.arange(_GRID) + 0.5) / _GRID
        self._too_low = np.zeros((_GRID, len(_STAKES)))
        self._too_high = np.zeros((_GRID, len(_STAKES)))
        """Logarithms of the money of the gamblers against each error rate m: that it is at most m, at least m."""
        self._lowest, self._highest = 0.0, 1.0
        self._labels, self._total = 0, 0.0
        self._cross = self._square = 0.0

    def add(self, error: float, announced: float = 0.0, mean_announced: float = 0.0) -> None:
        """Add a labelled sample.

        Args:
            error: 1 if the prediction was wrong, 0 if it was right, or a loss in between.
            announced: What was expected of it: 1 - confidence.
            mean_announced: Mean of that over all predictions that the sample was drawn from.

        Raises:
            ValueError: A number is out of its range.

        """
        if not (0 <= error <= 1 and 0 <= announced <= 1 and 0 <= mean_announced <= 1):
            raise ValueError("error, announced and mean_announced are needed between 0 and 1")
        trust = self._trust()
        x = error - trust * announced + trust * mean_announced
        low, high = trust * (mean_announced - 1), 1 + trust * mean_announced
        m = self._m[:, None]
        self._too_low += np.log1p(_STAKES * (x - m) / np.maximum(m - low, 1e-9))
        self._too_high += np.log1p(_STAKES * (m - x) / np.maximum(high - m, 1e-9))
        self._labels += 1
        self._total += x
        self._cross += (error - mean_announced) * (announced - mean_announced)
        self._square += (announced - mean_announced) ** 2
        self._narrow()

    def bound(self) -> RiskBound:
        """What is known now; bounds never widen again."""
        mean = self._total / self._labels if self._labels else 0.5
        accuracy = 1 - min(max(mean, self._lowest), self._highest)
        return RiskBound(
            labels=self._labels,
            accuracy=float(accuracy),
            lower=float(1 - self._highest),
            upper=float(1 - self._lowest),
        )

    def _trust(self) -> float:
        """How much of what confidences announced is taken off, 0..1; from earlier samples alone."""
        fitted = self._cross / self._square if self._square > 1e-9 else 0.0
        share = self._labels / (self._labels + _PRIOR_LABELS)
        return float(np.clip(share * fitted + (1 - share) * 0.5, 0.0, 1.0))

    def _narrow(self) -> None:
        half = 0.5 / _GRID
        kept = self._m[_log_mean(self._too_high) < self._level]
        self._highest = min(self._highest, kept.max() + half if len(kept) else self._highest)
        kept = self._m[_log_mean(self._too_low) < self._level]
        self._lowest = max(self._lowest, kept.min() - half if len(kept) else self._lowest)


def _log_mean(logs: Floats) -> Floats:
    high = logs.max(axis=1)
    return np.asarray(high + np.log(np.exp(logs - high[:, None]).mean(axis=1)))
