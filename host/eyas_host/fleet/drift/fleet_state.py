"""State of all devices that run one model, as arrays, and what one more step changes.

A device first learns its profile, then what chance does (with the other devices of the model), and is watched after
that. While an alarm holds, nothing of the device is learned.
"""

from __future__ import annotations

import math

import msgspec
import numpy as np
import numpy.typing as npt

from eyas_host.fleet.drift.calibration import CHANNELS, CHARTS, LAGS, Calibration
from eyas_host.fleet.drift.detectors import ALLOWANCES, EXPONENTS, HORIZON, cusum, direction_cusum, e_value, evidence
from eyas_host.fleet.drift.measures import DIRECTIONS, MEASURES, SCALARS, SUMS, Floats, measure
from eyas_host.fleet.drift.profile import STEPS_OF_DAY, STEPS_OF_HOUR, Ints, Profiles, slot_of

PROFILE_DAYS, CALIBRATION_DAYS = 4, 3
"""Days of a device's profile, and days after it from which fleet and device learn what chance does."""
LEVEL_STEPS = 24.0
"""Time constant of the levels that are shown, steps: two hours."""
RECENT_STEPS = float(STEPS_OF_DAY)
"""Time constant of the recent sums: a day."""
OPEN_RATIO, CLOSE_RATIO = 1.0, 0.5
CLOSE_STEPS = STEPS_OF_DAY
"""An alarm opens when a chart reaches its threshold, and closes when all were below half of theirs for a day."""
_CAP = 2.0
"""Charts are cut at this multiple of their thresholds, so that an alarm can close."""
PATTERN_SLOTS = 8

_FIELDS: dict[str, tuple[int, ...]] = {
    "first_step": (),
    "last_step": (),
    "seen": (),
    "watched": (),
    "z": (MEASURES,),
    "z_far": (MEASURES,),
    "z_far_step": (),
    "expected": (MEASURES,),
    "chart": (SCALARS, 2, len(ALLOWANCES)),
    "zero": (SCALARS, 2, len(ALLOWANCES)),
    "directions": (DIRECTIONS,),
    "directions_zero": (),
    "wealth": (CHANNELS, 2, len(EXPONENTS)),
    "level": (MEASURES,),
    "recent": (SUMS,),
    "day_max": (CHARTS,),
    "day_sum": (MEASURES + 1,),
    "day_count": (),
    "alarm": (),
    "opened": (),
    "onset": (),
    "leading": (),
    "peak": (),
    "quiet": (),
    "pattern": (PATTERN_SLOTS, 2),
    "evidence": (),
    "slot": (),
    "slot_profile": (3, MEASURES),
    "hour": (),
    "hour_sum": (MEASURES,),
    "hour_count": (MEASURES,),
    "hour_chart": (SCALARS + 1,),
}
"""Field -> shape of a device's state. Steps are numbers of `STEP_S` seconds since 1970, -1 if there is none."""
_OFFSETS = dict(
    zip(_FIELDS, np.concatenate([[0], np.cumsum([math.prod(s) for s in _FIELDS.values()])]).tolist(), strict=False)
)
WIDTH = sum(math.prod(shape) for shape in _FIELDS.values())
WIDTH_WITHOUT_HOURS = _OFFSETS["hour"]
"""Width of states that were stored before hours were kept."""


class Hour(msgspec.Struct, frozen=True):
    """What a device showed in an hour."""

    device: str
    hour: int
    """Hours since 1970."""
    digest: str
    values: Floats
    """Means of the measures of its steps, [MEASURES]; NaN where there is none."""
    charts: Floats
    """Highest charts as multiples of their thresholds, [SCALARS + 1]: of each measure, and of all directions."""


class Tuning(msgspec.Struct, frozen=True, kw_only=True):
    """How long devices learn."""

    profile_days: float = PROFILE_DAYS
    """Days that a device's profile is learned from."""
    calibration_days: float = CALIBRATION_DAYS
    """Days after these from which it is learned what chance does."""


class Model:
    """Devices that run one model: rows of one array, profiles, and the calibration that they share."""

    def __init__(self, digest: str, labels: tuple[str, ...], calibration: Calibration | None = None) -> None:
        self.digest, self.labels = digest, labels
        self.calibration = calibration or Calibration()
        self.devices: list[str] = []
        self.row_of: dict[str, int] = {}
        self.rows = np.zeros((0, WIDTH), np.float32)
        self.profiles = Profiles.empty(0)
        self.stored_profiles: set[int] = set()
        """Rows whose profile changed since it was stored."""
        self.hours: list[Hour] = []
        """Hours that ended since they were stored."""

    def __len__(self) -> int:
        return len(self.devices)

    def view(self, name: str, rows: npt.NDArray[np.float32] | None = None) -> npt.NDArray[np.float32]:
        """One field of all devices (or of some rows), writable."""
        shape, start = _FIELDS[name], _OFFSETS[name]
        array = self.rows if rows is None else rows
        return array[:, start : start + math.prod(shape)].reshape(len(array), *shape)

    def add(self, devices: list[str]) -> None:
        """Add devices that are not there yet."""
        new = [name for name in dict.fromkeys(devices) if name not in self.row_of]
        if not new:
            return
        fresh = np.zeros((len(new), WIDTH), np.float32)
        self.row_of |= {name: len(self.devices) + number for number, name in enumerate(new)}
        self.devices += new
        self.rows = np.concatenate([self.rows, fresh])
        self.profiles = self.profiles.grown(len(new))
        self.forget(np.array([self.row_of[name] for name in new]))

    def forget(self, rows: Ints) -> None:
        """Let devices learn again: their present images and predictions become what is usual."""
        fresh = np.zeros((len(rows), WIDTH), np.float32)
        for name in ("first_step", "last_step", "z_far_step", "leading", "slot", "hour"):
            self.view(name, fresh)[:] = -1
        for name in ("z", "z_far"):
            self.view(name, fresh)[:] = np.nan
        self.view("level", fresh)[:] = np.nan
        self.view("wealth", fresh)[:] = -np.inf
        self.rows[rows] = fresh
        self.profiles.forget(rows)
        self.stored_profiles |= set(rows.tolist())

    def stage(self, tuning: Tuning, rows: Ints | None = None) -> npt.NDArray[np.int64]:
        """0: learns its profile, 1: learns what chance does, 2: is watched."""
        first, last, seen = (self.view(name) for name in ("first_step", "last_step", "seen"))
        if rows is not None:
            first, last, seen = first[rows], last[rows], seen[rows]
        age = np.where(first < 0, -1.0, last - first)
        profile = tuning.profile_days * STEPS_OF_DAY
        learned = (age >= profile) & (seen >= profile / 2)
        watched = learned & (age >= profile + tuning.calibration_days * STEPS_OF_DAY)
        return learned.astype(np.int64) + watched

    def advance(self, rows: Ints, steps: Ints, sums: Floats, tuning: Tuning) -> tuple[list[int], list[int]]:
        """Let one step of each of some devices count; return the rows whose alarm opened, and whose alarm closed.

        Args:
            rows: Different rows, [n].
            steps: Number of the step of each, [n]; later than its last one.
            sums: Sums over the windows of the step, [n, SUMS].
            tuning: How long devices learn.

        """
        day = int(steps.max()) // STEPS_OF_DAY
        if day != self.calibration.day:
            self.calibration.refresh(day)
        own = self.rows[rows]
        before = self.view("alarm", own).copy()
        values = measure(sums)
        last = self.view("last_step", own)
        new_day = (last >= 0) & (last // STEPS_OF_DAY != steps // STEPS_OF_DAY)
        if new_day.any():
            self._end_day(own, new_day, self.stage(tuning, rows))
        gap = np.where(last >= 0, steps - last, 1.0)
        first = self.view("first_step", own)
        first[first < 0] = steps[first < 0]
        last[:] = steps
        self.view("seen", own)[:] += 1
        self._remember(own, sums)
        self.rows[rows] = own  # `stage` reads the ages
        stage = self.stage(tuning, rows)
        z = np.where((stage > 0)[:, None], self.profiles.deviations(rows, steps, values), np.nan)
        self._score(own, steps, z, stage, gap)
        learning = self.view("alarm", own) == 0
        if learning.any():
            self._learn(own, rows, steps, values, learning)
        self._keep_hour(own, rows, steps, values)
        self.rows[rows] = own
        after = self.view("alarm", own)
        return rows[after > before].tolist(), rows[after < before].tolist()

    def _learn(
        self, own: npt.NDArray[np.float32], rows: Ints, steps: Ints, values: Floats, learning: npt.NDArray[np.bool_]
    ) -> None:
        """Let profiles learn. The present hour is kept in the state, so that a profile is stored once an hour."""
        self.profiles.learn(rows[learning], steps[learning], values[learning])
        slot, hours = self.view("slot", own), slot_of(steps)
        self.stored_profiles |= set(rows[learning & (slot != hours)].tolist())
        slot[learning] = hours[learning]
        self.view("slot_profile", own)[learning] = self.profiles.hour(rows[learning], hours[learning])

    def _keep_hour(self, own: npt.NDArray[np.float32], rows: Ints, steps: Ints, values: Floats) -> None:
        """Add up the present hour for the plots; one that ended goes to `hours`."""
        hour, hours = self.view("hour", own), steps // STEPS_OF_HOUR
        names = ("hour_sum", "hour_count", "hour_chart")
        ended = np.flatnonzero((hour >= 0) & (hour != hours))
        self.hours += self._hours_of(own[ended], rows[ended])
        fresh = hour != hours
        hour[:] = hours
        total, count, chart = (self.view(name, own) for name in names)
        for array in (total, count, chart):
            array[fresh] = 0
        total += np.nan_to_num(values)
        count += np.isfinite(values)
        chart[:] = np.maximum(chart, _by_measure(self.ratios(own)))

    def present_hours(self, rows: Ints) -> list[Hour]:
        """The hours of some devices that have not ended."""
        begun = rows[self.view("hour")[rows] >= 0]
        return self._hours_of(self.rows[begun], begun)

    def _hours_of(self, own: npt.NDArray[np.float32], rows: Ints) -> list[Hour]:
        hour, total, count, chart = (self.view(name, own) for name in ("hour", "hour_sum", "hour_count", "hour_chart"))
        means = np.where(count > 0, total / np.maximum(count, 1), np.nan)
        return [
            Hour(self.devices[row], int(hour[n]), self.digest, means[n].copy(), chart[n].copy())
            for n, row in enumerate(rows)
        ]

    def restore(self, row: int, state: npt.NDArray[np.float32], profile: bytes) -> None:
        """Restore the state of a device as it was stored; one of another version is left out."""
        if state.size == WIDTH_WITHOUT_HOURS:
            state = np.concatenate([state, self.rows[row, WIDTH_WITHOUT_HOURS:]])
        if state.size != WIDTH:
            return
        self.rows[row] = state
        self.profiles.unpack(row, profile)
        slot = int(self.view("slot")[row])
        if slot >= 0:
            self.profiles.set_hour(row, slot, self.view("slot_profile")[row])

    def _remember(self, own: npt.NDArray[np.float32], sums: Floats) -> None:
        """Keep the sums of about the last day, for rates and estimates."""
        recent = self.view("recent", own)
        recent *= 1 - 1 / RECENT_STEPS
        recent += np.nan_to_num(sums)

    def _score(
        self, own: npt.NDArray[np.float32], steps: Ints, z: Floats, stage: npt.NDArray[np.int64], gap: Floats
    ) -> None:
        calibration, expected = self.calibration, self.view("expected", own)
        innovations, expected[:] = calibration.innovations(z, expected.astype(np.float64), gap)
        scores = calibration.standardize(innovations)
        white = calibration.whiten(scores[:, SCALARS:])
        innovations = np.concatenate([innovations, white[:, -1:]], axis=1)
        calm = (stage > 0) & (self.view("alarm", own) == 0)
        if calm.any():
            self._pair(own, steps, z, calm, gap)
            calibration.add_innovations(innovations[calm], scores[calm])
        known = np.isfinite(z).any(axis=1)
        self.view("z", own)[:] = z
        self._chart(own, steps, scores[:, :SCALARS], white[:, :-1])
        self._bet(own, calibration.tails(innovations), stage)
        level = self.view("level", own)
        z_cut = np.clip(z, -20, 20)
        level[:] = np.where(
            np.isnan(z), level, np.where(np.isnan(level), 0.0, level) * (1 - 1 / LEVEL_STEPS) + z_cut / LEVEL_STEPS
        )
        self.view("day_sum", own)[:] += np.nan_to_num(innovations)
        self.view("day_count", own)[:] += known
        self._judge(own, steps, z, stage)

    def _pair(
        self, own: npt.NDArray[np.float32], steps: Ints, z: Floats, calm: npt.NDArray[np.bool_], gap: Floats
    ) -> None:
        """Learn from this step and the one before, and every half an hour from the one half an hour before."""
        next_to = calm & (gap == LAGS[0])
        self.calibration.add_pairs(0, z[next_to], self.view("z", own)[next_to])
        due = calm & (steps % LAGS[1] == 0)
        far, since = self.view("z_far", own), self.view("z_far_step", own)
        apart = due & (steps - since == LAGS[1])
        self.calibration.add_pairs(1, z[apart], far[apart])
        far[due], since[due] = z[due], steps[due]

    def _chart(self, own: npt.NDArray[np.float32], steps: Ints, scores: Floats, white: Floats) -> None:
        chart, directions = self.view("chart", own), self.view("directions", own)
        cap = _CAP * self.calibration.thresholds
        chart[:] = np.minimum(cusum(chart, scores.astype(np.float32)), cap[:-1].reshape(chart.shape[1:]))
        directions[:] = direction_cusum(directions, white.astype(np.float32))
        length = np.sqrt(np.square(directions).sum(axis=1))
        directions *= np.minimum(1.0, cap[-1] / np.maximum(length, 1e-9))[:, None]
        zero, zero_of_directions = self.view("zero", own), self.view("directions_zero", own)
        zero[:] = np.where(chart <= 0, steps[:, None, None, None], zero)
        zero_of_directions[:] = np.where(length <= 1e-6, steps, zero_of_directions)
        day_max = self.view("day_max", own)
        day_max[:] = np.maximum(day_max, self._heights(own))

    def _bet(self, own: npt.NDArray[np.float32], tails: Floats, stage: npt.NDArray[np.int64]) -> None:
        wealth, watched = self.view("wealth", own), self.view("watched", own)
        watching = stage == 2
        if not watching.any():
            return
        wealth[watching] = evidence(wealth[watching], tails[watching].astype(np.float32))
        watched[watching] += 1
        over = watching & (watched % HORIZON == 0) & (self.view("alarm", own) == 0)
        wealth[over] = -np.inf
        self.view("evidence", own)[watching] = np.minimum(e_value(wealth[watching]), 1e30)

    def _heights(self, own: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """Present heights of all charts, [n, CHARTS]."""
        length = np.sqrt(np.square(self.view("directions", own)).sum(axis=1, keepdims=True))
        return np.concatenate([self.view("chart", own).reshape(len(own), -1), length], axis=1)

    def ratios(self, rows: npt.NDArray[np.float32] | None = None) -> Floats:
        """Heights of all charts as multiples of their thresholds, [n, CHARTS]."""
        own = self.rows if rows is None else rows
        return np.asarray(self._heights(own) / self.calibration.thresholds)

    def _judge(self, own: npt.NDArray[np.float32], steps: Ints, z: Floats, stage: npt.NDArray[np.int64]) -> None:
        """Open and close alarms."""
        ratios = self.ratios(own)
        highest = ratios.max(axis=1)
        alarm, quiet, peak = (self.view(name, own) for name in ("alarm", "quiet", "peak"))
        leading = self.view("leading", own)
        starts = (stage == 2) & (alarm == 0) & (highest >= OPEN_RATIO)
        if starts.any():
            best = ratios.argmax(axis=1)
            zeros = np.concatenate(
                [self.view("zero", own).reshape(len(own), -1), self.view("directions_zero", own)[:, None]], axis=1
            )
            onset = zeros[np.arange(len(own)), best] + 1
            alarm[starts], leading[starts] = 1, best[starts]
            self.view("opened", own)[starts], self.view("onset", own)[starts] = steps[starts], onset[starts]
            peak[starts] = quiet[starts] = 0
            self.view("pattern", own)[starts] = 0
        holds = alarm > 0
        if not holds.any():
            return
        peak[holds] = np.maximum(peak, highest)[holds]
        quiet[:] = np.where(holds & (highest < CLOSE_RATIO), quiet + 1, 0)
        slot = (steps % STEPS_OF_DAY) * PATTERN_SLOTS // STEPS_OF_DAY
        moved = self._leading_deviation(z, leading)
        counted = holds & np.isfinite(moved)
        pattern = self.view("pattern", own)
        pattern[counted, slot[counted], 0] += np.clip(moved, -20, 20)[counted]
        pattern[counted, slot[counted], 1] += 1
        ends = holds & (quiet >= CLOSE_STEPS)
        alarm[ends] = 0

    def _leading_deviation(self, z: Floats, leading: npt.NDArray[np.float32]) -> Floats:
        """Deviation of the measure that leads each alarm, in its direction; for the directions their mean length."""
        number = leading.astype(np.int64)
        per_measure = 2 * len(ALLOWANCES)
        of = np.clip(number // per_measure, 0, SCALARS - 1)
        sign = np.where(number % per_measure < len(ALLOWANCES), 1.0, -1.0)
        length = np.sqrt(np.square(z[:, SCALARS:]).mean(axis=1)) - 1.0
        return np.asarray(np.where(number == CHARTS - 1, length, sign * z[np.arange(len(z)), of]))

    def _end_day(
        self, own: npt.NDArray[np.float32], ended: npt.NDArray[np.bool_], stage: npt.NDArray[np.int64]
    ) -> None:
        """Learn from days that ended without an alarm, after a first one for the charts to settle."""
        count, total, maxima = (self.view(name, own) for name in ("day_count", "day_sum", "day_max"))
        stable = ended & (stage > 0) & (self.view("alarm", own) == 0) & (count >= STEPS_OF_DAY / 2)
        if stable.any():
            self.calibration.add_days(maxima[stable], total[stable] / count[stable][:, None])
        for array in (count, total, maxima):
            array[ended] = 0


def _by_measure(ratios: Floats) -> Floats:
    """The highest chart of each measure, and that of the directions: [n, CHARTS] -> [n, SCALARS + 1]."""
    of_scalars = ratios[:, :-1].reshape(len(ratios), SCALARS, -1).max(axis=2)
    return np.concatenate([of_scalars, ratios[:, -1:]], axis=1)
