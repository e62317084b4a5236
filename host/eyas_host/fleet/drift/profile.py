"""What a stable device looks like: mean and spread of each measure for every hour of the day.

Profiles are learned from the first days, hour by hour, so that day and night are no drift, and follow slowly after
that: a step without an alarm counts one 336th of its hour, four weeks.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from eyas_host.fleet.drift.measures import MEASURES, SCALES, STEP_S, Floats

SLOTS = 24
STEPS_OF_HOUR = 86_400 // STEP_S // SLOTS
STEPS_OF_DAY = 86_400 // STEP_S
_MEMORY = 28 * STEPS_OF_HOUR
_MIN_STEPS = 6
"""Steps of an hour below which its profile is not used."""
_POOLED = 12.0
"""Weight of the spread of all hours beside an hour's own, steps."""
_MAX_DEVIATION = 8.0
"""What differs by more from a profile counts as if it differed by so much, standard deviations."""

Ints = npt.NDArray[np.int64]


def slot_of(steps: Ints) -> Ints:
    """The hour of the day of steps, 0..23."""
    return np.asarray((steps % STEPS_OF_DAY) // STEPS_OF_HOUR)


class Profiles:
    """Profiles of n devices: arrays [n, SLOTS, MEASURES]."""

    def __init__(self, count: npt.NDArray[np.float32], mean: npt.NDArray[np.float32], var: npt.NDArray[np.float32]):
        self.count, self.mean, self.var = count, mean, var

    @classmethod
    def empty(cls, devices: int) -> Profiles:
        """Profiles that know nothing."""
        return cls(*(np.zeros((devices, SLOTS, MEASURES), np.float32) for _ in range(3)))

    def grown(self, devices: int) -> Profiles:
        """The same with further, empty ones."""
        more = Profiles.empty(devices)
        return Profiles(*(np.concatenate(pair) for pair in zip(self._all(), more._all(), strict=True)))

    def _all(self) -> tuple[npt.NDArray[np.float32], ...]:
        return self.count, self.mean, self.var

    def forget(self, rows: Ints) -> None:
        """Make some of them empty again."""
        for array in self._all():
            array[rows] = 0

    def packed(self, row: int) -> bytes:
        """One profile to be stored."""
        return np.stack([array[row] for array in self._all()]).astype("<f4").tobytes()

    def unpack(self, row: int, data: bytes) -> None:
        """Restore a profile; one of another version stays empty."""
        found = np.frombuffer(data, "<f4")
        if found.size == 3 * SLOTS * MEASURES:
            for array, values in zip(self._all(), found.reshape(3, SLOTS, MEASURES), strict=True):
                array[row] = values

    def deviations(self, rows: Ints, steps: Ints, values: Floats) -> Floats:
        """How far measures [n, MEASURES] of devices are from their profiles at these steps, in standard deviations.

        NaN where an hour is not known.
        """
        expected, spread = self.expected(rows, steps)
        return np.asarray((values - expected) / spread, dtype=np.float64)

    def expected(self, rows: Ints, steps: Ints) -> tuple[Floats, Floats]:
        """Mean and standard deviation of the measures of devices at these steps, both [n, MEASURES].

        They are interpolated between the middles of neighbouring hours. NaN where an hour is not known.
        """
        position = (steps % STEPS_OF_DAY + 0.5) / STEPS_OF_HOUR - 0.5
        first = np.floor(position).astype(np.int64)
        share = (position - first)[:, None]
        a, b = first % SLOTS, (first + 1) % SLOTS
        total = self.count[rows].sum(axis=1)
        with np.errstate(divide="ignore", invalid="ignore"):
            pooled = (self.count[rows] * self.var[rows]).sum(axis=1) / total
        means, spreads = [], []
        for slot in (a, b):
            n, mean, var = self.count[rows, slot], self.mean[rows, slot], self.var[rows, slot]
            unknown = n < _MIN_STEPS
            means.append(np.where(unknown, np.nan, mean))
            spreads.append((n * var + _POOLED * pooled) / (n + _POOLED))
        mean_a, mean_b = (np.where(np.isnan(own), other, own) for own, other in (means, means[::-1]))
        expected = (1 - share) * mean_a + share * mean_b
        spread = np.sqrt((1 - share) * spreads[0] + share * spreads[1])
        return np.asarray(expected), np.asarray(np.maximum(spread, SCALES))

    def learn(self, rows: Ints, steps: Ints, values: Floats) -> None:
        """Add steps, one for each of these devices: Welford's update, and exponential forgetting after four weeks."""
        slot = slot_of(steps)
        n, mean, var = self.count[rows, slot], self.mean[rows, slot], self.var[rows, slot]
        seen = np.isfinite(values)
        difference = np.where(seen, values - mean, 0.0)
        bound = np.where(n > 2 * STEPS_OF_HOUR, _MAX_DEVIATION * np.maximum(np.sqrt(var), SCALES), np.inf)
        difference = np.clip(difference, -bound, bound)
        after = np.minimum(n + 1, _MEMORY)
        self.count[rows, slot] = np.where(seen, after, n)
        self.mean[rows, slot] = mean + difference / after
        self.var[rows, slot] = np.where(seen, var + (np.square(difference) * (after - 1) / after - var) / after, var)

    def hour(self, rows: Ints, slots: Ints) -> npt.NDArray[np.float32]:
        """One hour of each of some profiles, [n, 3, MEASURES]."""
        return np.stack([array[rows, slots] for array in self._all()], axis=1)

    def set_hour(self, row: int, slot: int, values: npt.NDArray[np.float32]) -> None:
        """Set one hour of a profile, [3, MEASURES]."""
        for array, of_hour in zip(self._all(), values, strict=True):
            array[row, slot] = of_hour

    def overall(self, rows: Ints) -> Floats:
        """Mean of each measure over the hours, [n, MEASURES]; NaN where none is known."""
        n = self.count[rows].astype(np.float64)
        total = n.sum(axis=1)
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.asarray(np.where(total > 0, (n * self.mean[rows]).sum(axis=1) / total, np.nan))
