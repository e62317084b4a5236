"""How every device stands, for people and programs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import msgspec
import numpy as np

from eyas_device.support.logs import clean
from eyas_host.fleet.drift.alarms import Alarm
from eyas_host.fleet.drift.estimate import Estimate, estimate
from eyas_host.fleet.drift.fleet_state import Model
from eyas_host.fleet.drift.measures import STEP_S, frames_of, measure
from eyas_host.fleet.drift.monitor import Monitor
from eyas_host.fleet.drift.profile import STEPS_OF_DAY
from eyas_host.fleet.drift.rules import findings
from eyas_host.fleet.status import utc

_ORDER = ("confirmed", "suspected", "learning", "stable")


class DeviceDrift(msgspec.Struct, frozen=True, kw_only=True):
    """How a device stands."""

    device: str
    site: str
    model: str
    digest: str
    state: str
    """`learning`, `stable`, or the state of its alarm: `suspected` or `confirmed`."""
    learned: float
    """Share of the days that a device learns before it is watched, 0..1."""
    last: float
    """End of the last step that counts, seconds since 1970."""
    frames: float
    """Predictions of about the last day."""
    confidence: float | None
    """Mean confidence of about the last day."""
    usual_confidence: float | None
    """Mean confidence of its profile."""
    ratio: float
    """Highest chart as a multiple of its threshold."""
    e_value: float
    """Evidence against "no drift"."""
    estimated: Estimate | None = None
    """Accuracy of about the last day, without labels."""
    rules: tuple[str, ...] = ()
    """What plain rules say."""
    alarm: Alarm | None = None


def devices(
    monitor: Monitor, *, site: str = "", names: Sequence[str] = (), min_confidence: float = 0.0
) -> list[DeviceDrift]:
    """All devices that are followed, those with an alarm first; mean confidences below `min_confidence` are named."""

    def wanted(device: str) -> bool:
        return (not site or monitor.sites.get(device) == site) and (not names or device in names)

    found = [one for model in monitor.models.values() for one in _of_model(monitor, model, min_confidence, wanted)]
    return sorted(found, key=lambda one: (_ORDER.index(one.state), -one.ratio, one.device))


def _of_model(
    monitor: Monitor, model: Model, min_confidence: float, wanted: Callable[[str], bool]
) -> Iterable[DeviceDrift]:
    if not len(model):
        return
    recent = model.view("recent").astype(np.float64)
    now, frames = measure(recent)[:, 0], frames_of(recent)
    usual = model.profiles.overall(np.arange(len(model)))
    reference = monitor.references.get(model.digest)
    stages, highest = model.stage(monitor.tuning), model.ratios().max(axis=1)
    first, last, evidence = (model.view(name) for name in ("first_step", "last_step", "evidence"))
    needed = (monitor.tuning.profile_days + monitor.tuning.calibration_days) * STEPS_OF_DAY
    for row, device in enumerate(model.devices):
        if monitor.digests.get(device) != model.digest or not wanted(device):
            continue
        alarm = monitor.alarms.get(device)
        watched = stages[row] == 2
        estimated = estimate(recent[row], model.labels, reference)
        yield DeviceDrift(
            device=device,
            site=monitor.sites.get(device, ""),
            model=monitor.names.get(model.digest, ""),
            digest=model.digest,
            state=alarm.state if alarm else "stable" if watched else "learning",
            learned=1.0 if watched else min(0.99, max(0.0, float(last[row] - first[row])) / needed),
            last=float(last[row] + 1) * STEP_S,
            frames=round(float(frames[row])),
            confidence=_finite(now[row]),
            usual_confidence=_finite(usual[row, 0]),
            ratio=round(float(highest[row]), 3),
            e_value=float(f"{evidence[row]:.3g}"),
            estimated=estimated,
            rules=findings(recent[row], usual[row], model.labels, reference, estimated, min_confidence=min_confidence),
            alarm=alarm,
        )


def states(monitor: Monitor) -> dict[str, str]:
    """The state of every device that is followed, as in `DeviceDrift.state`."""
    found = {}
    for model in monitor.models.values():
        for device, stage in zip(model.devices, model.stage(monitor.tuning).tolist(), strict=True):
            if monitor.digests.get(device) == model.digest:
                alarm = monitor.alarms.get(device)
                found[device] = alarm.state if alarm else "stable" if stage == 2 else "learning"
    return found


def table(rows: Sequence[DeviceDrift]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Headings and cells of the list of devices."""
    headings = ("device", "site", "state", "confidence", "usual", "since", "likely cause")
    cells: list[tuple[str, ...]] = [
        (
            clean(one.device, 64),
            clean(one.site, 64),
            one.state if one.state != "learning" else f"learning ({one.learned:.0%})",
            _number(one.confidence),
            _number(one.usual_confidence),
            utc(one.alarm.since) if one.alarm else "",
            one.alarm.cause if one.alarm else "",
        )
        for one in rows
    ]
    return headings, cells


def describe(alarm: Alarm) -> list[str]:
    """An alarm in some lines: what, where, since when, how sure, what to do."""
    where = {"device": "this device alone", "site": f"{alarm.others} more of site {alarm.site}"}
    scope = where.get(alarm.scope, f"{alarm.others} more of the fleet")
    moved = ", ".join(
        f"{change.measure} {change.deviations:+.1f} sd" + _from_to(change.usual, change.now)
        for change in alarm.changes[:3]
    )
    sure = f"chance does this to a device {alarm.by_chance:.2g} times in 30 days"
    if alarm.e_value >= 1:
        sure += f"; evidence {alarm.e_value:.3g}, chance reaches it with p <= {1 / alarm.e_value:.2g}"
    return [
        f"{clean(alarm.device, 64)}: {alarm.cause} ({alarm.state}, {alarm.course}; {scope})",
        f"  what   {clean(moved, 400)}" + (f"; it says: {clean(alarm.ood_reason, 200)}" if alarm.ood_reason else ""),
        f"  since  {utc(alarm.since)}, noticed {utc(alarm.opened)}",
        f"  sure   {sure}",
        f"  do     {clean(alarm.advice, 400)}",
    ]


def more_of(one: DeviceDrift) -> list[str]:
    """The estimated accuracy of a device, with its caveat, and what the rules say; in some lines."""
    lines = []
    if one.estimated:
        by_bins = one.estimated.by_bins
        best = one.estimated.average_confidence if by_bins is None else by_bins
        lines.append(f"  accuracy {best:.3f} without labels, {one.estimated.caveat}")
    return [*lines, *(f"  rule   {clean(text, 200)}" for text in one.rules)]


def summary(rows: Sequence[DeviceDrift]) -> str:
    """One line of numbers."""
    counts = {state: sum(one.state == state for one in rows) for state in _ORDER}
    return f"{len(rows)} devices: " + ", ".join(f"{number} {state}" for state, number in counts.items() if number)


def _from_to(usual: float | None, now: float | None) -> str:
    return "" if usual is None or now is None else f" ({usual:.3g} usually, {now:.3g} in the last day)"


def _finite(value: float) -> float | None:
    return round(float(value), 4) if np.isfinite(value) else None


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
