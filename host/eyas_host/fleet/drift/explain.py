"""What the state of a device says of its alarm: which measures moved, how sure that is, and how it goes on."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from msgspec.structs import replace

from eyas_host.fleet.drift.alarms import Alarm, Change
from eyas_host.fleet.drift.calibration import CHARTS
from eyas_host.fleet.drift.detectors import ALLOWANCES, benjamini_hochberg
from eyas_host.fleet.drift.fleet_state import PATTERN_SLOTS, Model
from eyas_host.fleet.drift.measures import IMAGE, MIX, MODEL, OF_LABEL, SCALARS, SPREAD, STEP_S, Floats, measure, names
from eyas_host.fleet.drift.profile import STEPS_OF_DAY, Ints

ALPHA = 0.05
"""False discovery rate of confirmed alarms."""
_MOVED = 0.6
"""A family moved if one of its charts is above this multiple of its threshold."""
_CHANGES = 5
_MIN_DAYS = 2.0
"""Days after which an alarm is called lasting or periodic."""
_QUIET_SHARE, _QUIET_SLOTS = 1 / 3, 3
"""A periodic alarm is this much weaker in at least so many eighths of the day,"""
_CLEAR = 1.0
"""and at least so strong in the strongest one, standard deviations of a step."""


def opened(model: Model, row: int, *, id: str) -> Alarm:
    """The alarm of a device whose chart has just reached its threshold."""
    rows = np.array([row])
    number = int(model.view("leading")[row])
    alarm = Alarm(
        id=id,
        device=model.devices[row],
        opened=float(model.view("opened")[row] + 1) * STEP_S,
        since=float(model.view("onset")[row]) * STEP_S,
        leading=chart_name(model, number),
        course="new",
    )
    return _measured(alarm, model, rows, model.ratios()[rows], "")


def closed(alarm: Alarm, at: float, why: str) -> Alarm:
    """The alarm, closed."""
    return replace(alarm, state="closed", closed=at, why_closed=why)


def standing(models: Mapping[str, Model], alarms: Mapping[str, Alarm], reasons: Mapping[str, str]) -> dict[str, Alarm]:
    """How open alarms stand now: device -> alarm.

    Confirmed is one whose e-value stands out among all devices at a false discovery rate of `ALPHA`; it stays so.
    """
    evidence = {
        device: float(value)
        for model in models.values()
        for device, value in zip(model.devices, model.view("evidence"), strict=True)
    }
    confirmed = dict(zip(evidence, benjamini_hochberg(np.array([*evidence.values()]), ALPHA), strict=True))
    found: dict[str, Alarm] = {}
    for digest in {alarm.digest for alarm in alarms.values()}:
        model = models[digest]
        own = [alarm for alarm in alarms.values() if alarm.digest == digest]
        rows = np.array([model.row_of[alarm.device] for alarm in own])
        ratios = model.ratios(model.rows[rows])
        for number, alarm in enumerate(own):
            at = rows[number : number + 1]
            state = "confirmed" if alarm.state == "confirmed" or confirmed[alarm.device] else "suspected"
            found[alarm.device] = replace(
                _measured(alarm, model, at, ratios[number : number + 1], reasons.get(alarm.device, alarm.ood_reason)),
                state=state,
                course=course(model, int(at[0])),
            )
    return found


def course(model: Model, row: int) -> str:
    """`lasting`, `periodic`, or `new` in the first two days."""
    last, since = float(model.view("last_step")[row]), float(model.view("opened")[row])
    if last - since < _MIN_DAYS * STEPS_OF_DAY:
        return "new"
    total, count = model.view("pattern")[row].T
    if (count < 6).any() or len(count) != PATTERN_SLOTS:
        return "lasting"
    means = total / count
    quiet = means < _QUIET_SHARE * means.max()
    return "periodic" if means.max() >= _CLEAR and quiet.sum() >= _QUIET_SLOTS else "lasting"


def chart_name(model: Model, number: int) -> str:
    """What a chart follows: `confidence, down`."""
    if number == CHARTS - 1:
        return "image directions"
    per_measure = 2 * len(ALLOWANCES)
    side = "up" if number % per_measure < len(ALLOWANCES) else "down"
    return f"{names(model.labels)[number // per_measure]}, {side}"


def _measured(alarm: Alarm, model: Model, rows: Ints, ratios: Floats, ood: str) -> Alarm:
    row = int(rows[0])
    by_chance = float(model.calibration.expected(ratios * model.calibration.thresholds).min())
    return replace(
        alarm,
        ratio=float(max(ratios.max(), model.view("peak")[row])),
        by_chance=min(by_chance, alarm.by_chance) if alarm.ratio else by_chance,
        e_value=float(model.view("evidence")[row]),
        changes=_changes(model, rows, ratios[0]),
        families=families(ratios[0]),
        ood_reason=ood,
    )


def families(ratios: Floats) -> tuple[str, ...]:
    """Kinds of measures that moved, from the charts' ratios [CHARTS]."""
    of_measure = ratios[:-1].reshape(SCALARS, -1).max(axis=1)
    strengths = {
        "images": max(of_measure[list(IMAGE)].max(), ratios[-1]),
        "spread": of_measure[list(SPREAD)].max(),
        "certainty": of_measure[[*MODEL, *OF_LABEL]].max(),
        "classes": of_measure[list(MIX)].max(),
    }
    return tuple(name for name, strength in strengths.items() if strength >= _MOVED)


def _changes(model: Model, rows: Ints, ratios: Floats) -> tuple[Change, ...]:
    """The measures that moved most: those whose charts are highest."""
    level = model.view("level")[rows][0]
    usual = model.profiles.overall(rows)[0]
    now = measure(model.view("recent")[rows].astype(np.float64))[0]
    strength = np.concatenate([ratios[:-1].reshape(SCALARS, -1).max(axis=1), np.full(len(level) - SCALARS, ratios[-1])])
    strength = np.where(np.isfinite(level), strength * (0.1 + np.abs(level)), -1.0)
    own = names(model.labels)
    return tuple(
        Change(
            measure=own[number],
            deviations=round(float(level[number]), 2),
            usual=None if not np.isfinite(usual[number]) else round(float(usual[number]), 4),
            now=None if not np.isfinite(now[number]) else round(float(now[number]), 4),
        )
        for number in np.argsort(-strength)[:_CHANGES]
        if strength[number] > 0
    )
