"""What chance does on stable days: how scores are distributed, how they follow each other, how high CUSUMs climb.

One calibration serves all devices of a model: what differs between devices is in their profiles. It begins with what
independent normal scores would do and learns from steps without an alarm.
"""

from __future__ import annotations

import math
from statistics import NormalDist

import numpy as np

from eyas_host.fleet.drift.detectors import ALLOWANCES
from eyas_host.fleet.drift.measures import DIRECTIONS, MEASURES, SCALARS, Floats

CHARTS = SCALARS * 2 * len(ALLOWANCES) + 1
"""CUSUMs of a device: two sides and two allowances of each measure, and one of all directions."""
CHANNELS = SCALARS + 1
"""What the e-detector bets on: each measure, and the directions together."""
ALARMS_PER_MONTH = 0.1
"""Alarms of a device in 30 days without drift, all charts together."""
MAX_SCORE = 4.0
"""Scores are cut there, so that no single step alarms."""
_LIMIT, _BINS = 8.0, 160
_WIDTH = 2 * _LIMIT / _BINS
_PRIOR_SCORES = 500.0
"""Weight of the normal distribution beside what was seen, steps."""
LAGS = (1, 6)
"""Steps between the pairs that say how steps follow each other."""
_PRIOR_PHI, _PRIOR_SHARE, _PRIOR_PAIRS = 0.93, 0.5, 200.0
_MAX_PHI = 0.985
_MAX_STEP = 6.0
"""A step that differs by more counts as if it differed by so much, in standard deviations of what is new."""
_HEIGHTS = 96
_LOWEST, _GROWTH = 0.2, 1.08
"""Bins of the daily maxima: heights from .2 on, each 8 % higher."""
_PRIOR_DAYS = 30.0
"""Weight of the theory of independent scores beside the daily maxima that were seen."""
_TOLERANCE = 1.5
"""Deviation of a whole day that is no drift, in root mean squares of what stable days deviate."""
_MAX_COUNT = 3e6
_ACCUMULATED, _REFRESHED = ("pairs", "scores", "products", "heights", "daily"), "refreshed."
_normal = NormalDist()
_EDGES = np.linspace(-_LIMIT, _LIMIT, _BINS + 1)
_PRIOR = np.diff(np.array([_normal.cdf(edge) for edge in _EDGES]))
_EDGES_OF_HEIGHTS = _LOWEST * _GROWTH ** np.arange(_HEIGHTS)
_PRIOR_50, _PRIOR_90, _PRIOR_DECAY = (
    np.array([*np.tile(of_scalars, 2 * SCALARS), of_directions])
    for of_scalars, of_directions in (((12.0, 4.23, 1.41), 7.85), ((20.2, 6.11, 2.07), 9.4), ((5.0, 1.15, 0.4), 0.75))
)
"""Median, 90 % quantile and decay of the daily maxima for independent normal scores; from 6,000 simulated days."""


class Calibration:
    """Accumulates stable steps of all devices of a model; `refresh` computes from them what scores are judged by."""

    def __init__(self) -> None:
        self.pairs = np.zeros((2, 2, MEASURES))
        """Sums of z(t) z(t-lag) and of z(t-lag)², for the lags `LAGS`."""
        self.scores = np.zeros((MEASURES + 1, _BINS))
        """Innovations of each measure, and of the directions' joint length, by bins of a tenth."""
        self.products = np.zeros((DIRECTIONS + 1, DIRECTIONS))
        """Sums of products of the directions' scores; their number in the last row."""
        self.heights = np.zeros((CHARTS, _HEIGHTS))
        """Daily maxima of each chart."""
        self.daily = np.zeros((2, MEASURES + 1))
        """Sums of squared daily means of innovations, and their number."""
        self.day = -1
        """Day of the last refresh."""
        self._refreshed: dict[str, Floats] = {}
        self.refresh()

    def refresh(self, day: int = -1) -> None:
        """Compute tables and thresholds from what was accumulated."""
        self.day = day
        self._refreshed = {name: getattr(self, name).copy() for name in _ACCUMULATED}
        self._fit_filter()
        counts = self.scores + _PRIOR_SCORES * _PRIOR
        total = counts.sum(axis=1, keepdims=True)
        above = counts[:, ::-1].cumsum(axis=1)[:, ::-1]
        self._upper, self._lower = (above + 1) / (total + 1), (total - above + counts + 1) / (total + 1)
        middle = (total - above + counts / 2) / total
        self._normal = np.array([[_normal.inv_cdf(min(max(p, 1e-12), 1 - 1e-12)) for p in row] for row in middle])
        self._normal = np.clip(self._normal, -MAX_SCORE, MAX_SCORE)
        n = self.products[-1, 0] + 100.0
        covariance = (self.products[:-1] + 100.0 * np.eye(DIRECTIONS)) / n
        self._whitening = np.linalg.inv(np.linalg.cholesky(covariance + 0.02 * np.eye(DIRECTIONS)))
        days = self.daily[1]
        self.tolerance = _TOLERANCE * np.sqrt((self.daily[0] + 30 * 0.06**2) / (days + 30))
        self.thresholds = self._thresholds(ALARMS_PER_MONTH)

    def _fit_filter(self) -> None:
        """Fit how deviations follow each other: a slow autoregression seen through the noise of single steps.

        Correlations r(lag) = share phi^lag give phi and the share of the slow part in the variance; the rest is the
        steady state of the Kalman filter for them.
        """
        (products, squares) = self.pairs[:, 0], self.pairs[:, 1]
        prior = _PRIOR_SHARE * _PRIOR_PHI ** np.array(LAGS)[:, None]
        near, far = np.clip((products + _PRIOR_PAIRS * prior) / (squares + _PRIOR_PAIRS), 1e-3, 0.99)
        self.phi = np.clip((far / near) ** (1 / (LAGS[1] - LAGS[0])), 0.0, _MAX_PHI)
        share = np.clip(near / np.maximum(self.phi, 1e-3), 0.0, 0.98)
        variance = np.ones(MEASURES)
        for _ in range(200):
            variance = np.square(self.phi) * variance * (1 - variance / (variance + 1 - share)) + share * (
                1 - np.square(self.phi)
            )
        self.gain = variance / (variance + 1 - share)
        self._scale = np.sqrt(variance + 1 - share)

    def innovations(self, z: Floats, expected: Floats, gap: Floats) -> tuple[Floats, Floats]:
        """What is new in each step, standardized, and what is expected of the next one; both [n, MEASURES].

        Args:
            z: Deviations from the profiles, [n, MEASURES]; NaN where there is none.
            expected: What was expected of the step after the last one.
            gap: Steps since that one, [n].

        """
        prior = expected * self.phi ** np.maximum(gap - 1.0, 0.0)[:, None]
        difference = z - prior
        learned = np.clip(np.nan_to_num(difference), -_MAX_STEP * self._scale, _MAX_STEP * self._scale)
        return difference / self._scale, self.phi * (prior + self.gain * learned)

    def standardize(self, innovations: Floats) -> Floats:
        """Normal scores, [n, MEASURES or + 1], of innovations: standard normal on stable days, whatever their form."""
        rows = np.arange(innovations.shape[1])
        found = self._normal[rows, _bin(innovations)]
        return np.where(np.isnan(innovations), np.nan, found)

    def whiten(self, scores: Floats) -> Floats:
        """Uncorrelated scores of the directions, [n, DIRECTIONS], and [n, 1] the cube root of their mean square."""
        white = scores @ self._whitening.T
        joint = np.cbrt(np.square(white).mean(axis=1, keepdims=True))
        centre, scale = 1 - 2 / (9 * DIRECTIONS), math.sqrt(2 / (9 * DIRECTIONS))  # Wilson & Hilferty, 1931
        return np.concatenate([white, (joint - centre) / scale], axis=1)

    def tails(self, innovations: Floats) -> Floats:
        """p-values [n, CHANNELS, 2] of innovations [n, MEASURES + 1], after what stable days deviate: up and down."""
        rows = np.array([*range(SCALARS), MEASURES])
        of = innovations[:, rows]
        tolerance = self.tolerance[rows]
        up = self._upper[rows, _bin(of - tolerance)]
        down = self._lower[rows, _bin(of + tolerance)]
        down[:, -1] = 1.0  # images that are more alike than usual are no drift
        return np.where(np.isnan(of)[..., None], np.nan, np.stack([up, down], axis=2))

    def add_pairs(self, lag: int, z: Floats, before: Floats) -> None:
        """Learn how steps follow each other, from [n, MEASURES] and those `LAGS[lag]` steps before."""
        both = np.isfinite(z) & np.isfinite(before)
        a, b = np.clip(np.where(both, z, 0.0), -5, 5), np.clip(np.where(both, before, 0.0), -5, 5)
        self.pairs[lag] += np.array([(a * b).sum(axis=0), np.square(b).sum(axis=0)])

    def add_innovations(self, innovations: Floats, scores: Floats) -> None:
        """Learn how innovations [n, MEASURES + 1] are distributed, and how the directions' scores correlate."""
        seen = np.isfinite(innovations)
        flat = (np.arange(MEASURES + 1) * _BINS + _bin(innovations))[seen]
        self.scores += np.bincount(flat, minlength=self.scores.size).reshape(self.scores.shape)
        directions = scores[:, SCALARS:MEASURES]
        whole = directions[np.isfinite(directions).all(axis=1)]
        self.products[:-1] += whole.T @ whole
        self.products[-1] += len(whole)

    def add_days(self, maxima: Floats, means: Floats) -> None:
        """Learn from stable days: maxima [n, CHARTS] of the charts, and mean innovations [n, MEASURES + 1]."""
        bins = np.clip(np.searchsorted(_EDGES_OF_HEIGHTS, maxima), 0, _HEIGHTS - 1)
        flat = (np.arange(CHARTS) * _HEIGHTS + bins).ravel()
        self.heights += np.bincount(flat, minlength=self.heights.size).reshape(self.heights.shape)
        seen = np.isfinite(means)
        self.daily += np.array([np.where(seen, np.square(means), 0.0).sum(axis=0), seen.sum(axis=0)])
        for array in (self.heights, self.scores):
            if array.sum() > _MAX_COUNT * len(array):
                array *= 0.5

    def expected(self, heights: Floats) -> Floats:
        """Alarms of one device in 30 days without drift at such heights [..., CHARTS], all charts at their own."""
        level, decay = self._tail
        return np.asarray(30.0 * CHARTS * np.minimum(1.0, 0.1 * np.exp(-(heights - level) / decay)))

    def _thresholds(self, per_month: float) -> Floats:
        """Height of each chart that is reached by chance on `per_month` of 30 days, all charts together.

        Maxima of stretches of a random walk with a negative drift have an exponential tail. It is fitted between the
        median and the 90 % quantile, so that drift in a few of the days that were taken as stable does not matter.
        """
        n = self.heights.sum(axis=1)
        cumulative = self.heights.cumsum(axis=1)
        seen_90, seen_50 = (
            _EDGES_OF_HEIGHTS[np.minimum((cumulative < share * n[:, None]).sum(axis=1), _HEIGHTS - 1)]
            for share in (0.9, 0.5)
        )
        weight = n / (n + _PRIOR_DAYS)
        level = weight * seen_90 + (1 - weight) * _PRIOR_90
        middle = weight * seen_50 + (1 - weight) * _PRIOR_50
        decay = np.maximum((level - middle) / math.log(5.0), _PRIOR_DECAY) * (1 + 1 / np.sqrt(n + _PRIOR_DAYS))
        self._tail = level, decay
        per_chart_day = per_month / 30.0 / CHARTS
        return np.asarray(level + decay * math.log(0.1 / per_chart_day))

    def arrays(self) -> dict[str, Floats]:
        """What was accumulated by now and by the last refresh, to be stored."""
        now = {name: getattr(self, name) for name in _ACCUMULATED}
        return now | {_REFRESHED + name: array for name, array in self._refreshed.items()} | {"day": np.array(self.day)}

    @classmethod
    def of(cls, arrays: dict[str, Floats]) -> Calibration:
        """A calibration that was stored; arrays of another shape, of another version, are left out."""
        found = cls()
        for prefix in (_REFRESHED, ""):
            for name in _ACCUMULATED:
                stored = arrays.get(prefix + name)
                if stored is not None and stored.shape == getattr(found, name).shape and np.isfinite(stored).all():
                    setattr(found, name, stored.astype(np.float64))
            if prefix:
                found.refresh(int(arrays.get("day", -1)))
        return found


def _bin(innovations: Floats) -> np.ndarray[tuple[int, ...], np.dtype[np.int64]]:
    scaled = np.nan_to_num((innovations + _LIMIT) / _WIDTH)
    return np.clip(scaled, 0, _BINS - 1).astype(np.int64)
