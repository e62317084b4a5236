"""What a device showed before and during an alarm, hour by hour, beside its profile and other devices of its site."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import numpy as np

from eyas_host.fleet.drift.alarms import Alarm
from eyas_host.fleet.drift.fleet_state import Hour, Model
from eyas_host.fleet.drift.measures import DIRECTIONS, MEASURES, RATES, SCALARS, STEP_S, Floats, names
from eyas_host.fleet.drift.monitor import Monitor
from eyas_host.fleet.drift.profile import STEPS_OF_HOUR, Ints
from eyas_host.fleet.drift.records import DriftRecords

HOUR_S = 3600.0
BEFORE_S, AFTER_S = 3 * 86_400.0, 86_400.0
"""How much of the time before an alarm's begin, and after its end, a plot shows."""
MAX_S = 30 * 86_400.0
"""Longest time that a plot shows: of an alarm that is older, the last part."""
CALM_S = 7 * 86_400.0
"""Time that a plot of a device without an alarm shows."""
MAX_OTHERS = 8
"""Devices of the same site and model in one plot."""
MAX_POINTS = 360
DIRECTIONS_CHART = "image directions"


class Series(msgspec.Struct, frozen=True, kw_only=True):
    """What a plot shows; all arrays have one value for each of the points in time, NaN where there is none."""

    device: str
    site: str
    measure: str
    rate: bool
    """Whether it is a share or a probability, 0..1."""
    chart: str
    """Name of the chart that is shown, without its side."""
    times: Floats
    """Middles of equally long stretches, seconds since 1970."""
    step_s: float
    """Length of a stretch, seconds."""
    values: Floats
    """The measure."""
    usual: Floats
    """Its mean in the device's profile, at that hour of the day."""
    spread: Floats
    """Its standard deviation there, of steps of five minutes."""
    heights: Floats
    """The highest charts as multiples of their thresholds."""
    others: tuple[Floats, ...] = ()
    """The same measure of other devices, each as far from `usual` as it is from its own profile, in deviations."""
    since: float = 0.0
    """When drift began, seconds since 1970; 0 without an alarm."""
    opened: float = 0.0
    closed: float = 0.0


def of_alarm(monitor: Monitor, records: DriftRecords, alarm: Alarm, now: float) -> Series | None:
    """What led to an alarm; None if the store has nothing of that time, or of that model, any more.

    Args:
        monitor: What is known of the devices.
        records: What the store keeps of drift.
        alarm: An open or a closed alarm.
        now: Seconds since 1970.

    """
    model = monitor.models.get(alarm.digest)
    if model is None:
        return None
    end = min(alarm.closed + AFTER_S if alarm.closed else now, _last(model, alarm.device) or now)
    begin = max(alarm.since - BEFORE_S, end - MAX_S)
    name = alarm.leading.rpartition(", ")[0] or alarm.leading
    own = names(model.labels)
    measure = own.index(name) if name in own[:SCALARS] else SCALARS
    stretch = _Stretch(monitor, records, model, alarm.device, begin, end)
    found = stretch.series(measure, from_hour=int(alarm.since // HOUR_S), learned_before=alarm.opened)
    if found is None:
        return None
    return msgspec.structs.replace(found, site=alarm.site, since=alarm.since, opened=alarm.opened, closed=alarm.closed)


def of_device(monitor: Monitor, records: DriftRecords, device: str, now: float) -> Series | None:
    """The last days of a device: its alarm, or else the measure whose chart is highest; None if nothing is known."""
    if (alarm := monitor.alarms.get(device)) is not None:
        return of_alarm(monitor, records, alarm, now)
    model = monitor.models.get(monitor.digests.get(device, ""))
    if model is None or device not in model.row_of:
        return None
    heights = model.view("hour_chart")[model.row_of[device]]
    end = min(now, _last(model, device) or now)
    return _Stretch(monitor, records, model, device, end - CALM_S, end).series(int(heights.argmax()))


def _last(model: Model, device: str) -> float:
    """End of the last step of a device that counts, seconds since 1970; 0 if there is none."""
    row = model.row_of.get(device)
    return 0.0 if row is None else float(model.view("last_step")[row] + 1) * STEP_S


class _Stretch:
    """Hours of a device and of some others of its site."""

    def __init__(
        self, monitor: Monitor, records: DriftRecords, model: Model, device: str, begin: float, end: float
    ) -> None:
        site = monitor.sites.get(device, "")
        near = (name for name in model.devices if monitor.sites.get(name) == site and name != device)
        self._others = sorted(name for name in near if monitor.digests.get(name) == model.digest)[:MAX_OTHERS]
        self._model, self._device, self._site = model, device, site
        first, last = int(begin // HOUR_S), int(end // HOUR_S)
        devices = [device, *self._others]
        hours = records.hours(devices, first, last)
        rows = np.array([model.row_of[name] for name in devices if name in model.row_of], np.int64)
        hours += [hour for hour in model.present_hours(rows) if first <= hour.hour <= last]
        self._of: dict[str, list[Hour]] = {name: [] for name in devices}
        for hour in hours:
            self._of[hour.device].append(hour)
        own = [hour.hour for hour in self._of[device] if hour.digest == model.digest]
        self._hours: Ints = np.arange(min(own), max(own) + 1) if own else np.zeros(0, np.int64)

    def series(self, measure: int, *, from_hour: int = 0, learned_before: float = 0.0) -> Series | None:
        """What is shown of a measure; `SCALARS`: of the image direction that moved most from an hour on.

        The profile is left out if the device learned it after the time `learned_before`: it is not the one of then.
        """
        if not len(self._hours):
            return None
        values, charts = self._arrays(self._of[self._device])
        usual, spread = self._profile(self._device, learned_before)
        chart = min(measure, SCALARS)
        shown = measure
        if measure == SCALARS:
            recent = self._hours >= from_hour
            away = (values - usual)[recent, SCALARS:] / spread[recent, SCALARS:]
            shown = SCALARS + int(np.argmax(np.abs(_mean(away))))
        name = names(self._model.labels)[shown]
        others = []
        for other in self._others:
            of_other, _ = self._arrays(self._of[other])
            own_usual, own_spread = self._profile(other, 0.0)
            others.append((of_other - own_usual)[:, shown] / own_spread[:, shown] * spread[:, shown] + usual[:, shown])
        size = -(-len(self._hours) // MAX_POINTS)
        return Series(
            device=self._device,
            site=self._site,
            measure=name,
            rate=bool(RATES[shown]),
            chart=DIRECTIONS_CHART if measure == SCALARS else name,
            times=_merged(np.asarray((self._hours + 0.5) * HOUR_S, np.float64), size),
            step_s=size * HOUR_S,
            values=_merged(values[:, shown], size),
            usual=_merged(usual[:, shown], size),
            spread=_merged(spread[:, shown], size),
            heights=_merged(charts[:, chart], size, np.fmax),
            others=tuple(_merged(one, size) for one in others if np.isfinite(one).any()),
        )

    def _arrays(self, hours: Sequence[Hour]) -> tuple[Floats, Floats]:
        """Measures [hours, MEASURES] and charts [hours, SCALARS + 1]."""
        values = np.full((len(self._hours), MEASURES), np.nan)
        charts = np.full((len(self._hours), SCALARS + 1), np.nan)
        for one in hours:
            at = one.hour - int(self._hours[0])
            if one.digest == self._model.digest and 0 <= at < len(self._hours):
                values[at], charts[at] = one.values, one.charts
        return values, charts

    def _profile(self, device: str, learned_before: float) -> tuple[Floats, Floats]:
        """Mean and deviation of the measures in the middle of each hour, [hours, MEASURES]; NaN if not known."""
        row = self._model.row_of.get(device)
        nothing = np.full((len(self._hours), MEASURES), np.nan)
        if row is None:
            return nothing, nothing
        begun = float(self._model.view("first_step")[row]) * STEP_S
        if begun < 0 or (learned_before and begun > learned_before):
            return nothing, nothing
        middles = self._hours * STEPS_OF_HOUR + STEPS_OF_HOUR // 2
        return self._model.profiles.expected(np.full(len(middles), row), middles)


def _mean(values: Floats) -> Floats:
    """Mean of each of the directions, [n, DIRECTIONS] -> [DIRECTIONS]; 0 where there is none."""
    assert values.shape[1] == DIRECTIONS
    seen = np.isfinite(values)
    return np.asarray(np.where(seen, values, 0.0).sum(axis=0) / np.maximum(seen.sum(axis=0), 1))


def _merged(values: Floats, size: int, by: np.ufunc = np.add) -> Floats:
    """Values of stretches of `size` values each: their mean, or their maximum; NaN where there is none."""
    if size == 1:
        return values
    padded = np.concatenate([values, np.full(-len(values) % size, np.nan)]).reshape(-1, size)
    if by is np.fmax:
        return np.asarray(np.fmax.reduce(padded, axis=1))
    seen = np.isfinite(padded).sum(axis=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray(np.where(seen > 0, np.nansum(padded, axis=1) / seen, np.nan))
