"""Whether a retraining is due: open alarms that call for one, enough labelled samples, and none that waits or runs.

It reads the store and writes nothing. What was tried is known from the registry's log and the runs' `retrain.json`, so
that a store from yesterday's backup does not forget it.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path

import msgspec

from eyas_device.support.logs import clean
from eyas_host.fleet.drift.alarms import Alarm
from eyas_host.fleet.drift.causes import ADVICE, CALLS_FOR_RETRAINING
from eyas_host.fleet.drift.errors import DriftError
from eyas_host.fleet.drift.records import DriftRecords
from eyas_host.fleet.retrain.usable import Found, Usable, usable
from eyas_host.fleet.samples.records import samples
from eyas_host.fleet.status import utc
from eyas_host.fleet.store.database import Store
from eyas_host.pipeline.runner import LINEAGE_SPLIT
from eyas_host.retrain.state import ENDED, KEPT_OUT, Reason, Retraining, next_version, read_state
from eyas_host.versions.record import VersionRecord
from eyas_host.versions.registry import ADDED, CHALLENGER, Registry

STALE_S = 86_400.0
"""Age of the last look for drift above which its alarms say nothing of today."""
_DAY_S = 86_400.0
_SHOWN = 4


class Demands(msgspec.Struct, frozen=True, kw_only=True):
    """What a retraining needs."""

    min_labels: int = 20
    """New labelled images of each class."""
    more_labels: int = 100
    """So many further ones end the wait after a version that was kept out."""
    per_device: int = 100
    """New images of one device, at most."""
    people: int = 1
    """So many have to agree on a label."""
    cooldown_s: float = _DAY_S
    """Time since the last version, or the last one that was kept out, seconds."""
    new_class: bool = False
    """Whether labels count that the champion does not know."""


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """The retraining that is due."""

    version: str
    reason: Reason
    images: tuple[Usable, ...] = ()
    goes_on: bool = False
    """Whether it was begun, and allowed, before: its images are there."""


class Look(msgspec.Struct, frozen=True, kw_only=True):
    """What a look at the store found."""

    lines: tuple[str, ...]
    """For people."""
    plan: Plan | None = None
    """None: nothing is due."""


def look(store: Store, registry: Registry, parent: VersionRecord, runs: Path, demands: Demands, *, now: float) -> Look:
    """Look whether a retraining of the champion `parent` is due.

    Args:
        store: The fleet's store.
        registry: Where versions are kept.
        parent: The champion.
        runs: Folder of runs.
        demands: What a retraining needs.
        now: The time, seconds since 1970.

    Raises:
        DriftError: nobody looks for drift, so that no alarm means nothing.

    """
    if (begun := unfinished(runs, parent)) is not None:
        version = begun.version.rpartition("@")[2]
        why = begun.reason.describe()
        return Look(
            lines=(f"{begun.version}: begun {utc(begun.began)} and not finished; it goes on ({why})",),
            plan=Plan(version=version, reason=begun.reason, goes_on=True),
        )
    _require_a_look(store, now)
    alarms, lines = _calling(DriftRecords(store).alarms(), parent)
    if not alarms:
        return Look(lines=(*lines, f"{parent.name}: no open alarm calls for a retraining"))
    if waits := _challenger(registry, parent):
        return Look(lines=(*lines, waits))
    from eyas_host.data.manifest import SplitManifest, known_images  # imports what a training needs

    split = msgspec.json.decode(registry.open_file(parent, str(LINEAGE_SPLIT)) or b"{}", type=SplitManifest)
    found = usable(
        samples(store, labelled=True),
        known_images(split),
        labels=() if demands.new_class else parent.labels,
        now=now,
        people=demands.people,
        per_device=demands.per_device,
    )
    lines += _describe(found, parent, demands)
    if missing := _missing(found, parent, demands):
        return Look(lines=(*lines, f"not yet: {missing} missing; eyas samples queue lists what to label"))
    if waits := _waits(registry, parent, runs, found, demands, now):
        return Look(lines=(*lines, waits))
    version = _free_version(registry, parent, runs)
    causes = Counter(alarm.cause for alarm in alarms)
    reason = Reason(
        why=", ".join(f"{cause} ({count})" for cause, count in causes.items()),
        alarms=tuple(alarm.id for alarm in alarms),
        images=tuple(one.sha256 for one in found.images),
    )
    due = f"due: {parent.name} to {parent.model}@{version} with {len(found.images)} new images, in {runs}"
    return Look(lines=(*lines, due), plan=Plan(version=version, reason=reason, images=found.images))


def unfinished(runs: Path, parent: VersionRecord) -> Retraining | None:
    """A retraining of this version that the store's alarms began, and that was interrupted."""
    for path in sorted(runs.glob(f"{parent.model}-*/retrain.json")):
        state = read_state(path.parent)
        if state is not None and state.parent == parent.name and state.reason.alarms and state.stage not in ENDED:
            return state
    return None


def _require_a_look(store: Store, now: float) -> None:
    """Raise an error if drift was not looked for lately: a store from a backup, a collector that does not run."""
    updated = DriftRecords(store).position().updated
    if not updated:
        raise DriftError(f"{store.name}: nobody has looked for drift yet; eyas collect does, and so does eyas drift")
    if abs(now - updated) > STALE_S:
        raise DriftError(
            f"{store.name}: windows were looked at {utc(updated)} last, and it is {utc(now)}: a store from a backup, a "
            "collector that stands still, or a wrong clock; eyas drift reads what has arrived since"
        )


def _calling(alarms: Sequence[Alarm], parent: VersionRecord) -> tuple[list[Alarm], list[str]]:
    """The alarms that call for a retraining of a version, and lines about all."""
    own = [alarm for alarm in alarms if _is_of(alarm, parent)]
    by_cause: defaultdict[str, list[Alarm]] = defaultdict(list)
    for alarm in sorted(own, key=lambda alarm: alarm.device):
        by_cause[alarm.cause].append(alarm)
    lines = []
    for cause, those in by_cause.items():
        names = ", ".join(clean(alarm.device, 64) for alarm in those[:_SHOWN])
        more = f" and {len(those) - _SHOWN} more" if len(those) > _SHOWN else ""
        confirmed = sum(alarm.state == "confirmed" for alarm in those)
        line = f"{cause}: {names}{more} ({confirmed} confirmed, {len(those) - confirmed} suspected)"
        if cause not in CALLS_FOR_RETRAINING:
            advice = ADVICE[cause].format(device=those[0].device) if cause in ADVICE else those[0].advice
            line += f"; no retraining helps: {clean(advice, 400)}"
        lines.append(line)
    if others := len(alarms) - len(own):
        lines.append(f"alarms of other versions than {parent.name}: {others}")
    return [alarm for alarm in own if alarm.cause in CALLS_FOR_RETRAINING], lines


def _is_of(alarm: Alarm, version: VersionRecord) -> bool:
    """Whether the device ran this version; agents that send no digest are known by the version's name."""
    if not alarm.digest or alarm.digest.startswith("="):
        return alarm.model == f"{version.model} {version.version}"
    return version.digest.startswith(alarm.digest)


def _challenger(registry: Registry, parent: VersionRecord) -> str:
    """What is said while a challenger waits for its trial; empty if none does."""
    name = registry.aliases().get(parent.model, {}).get(CHALLENGER, "")
    record = next((one for one in registry.versions(parent.model) if one.version == name), None)
    if record is None or record.version == parent.version or _is_older(registry, record, parent):
        return ""
    return (
        f"{record.name} waits as {CHALLENGER}: a rollout tries it; "
        f"eyas models alias {CHALLENGER} {parent.model}@ --drop takes it back"
    )


def _is_older(registry: Registry, one: VersionRecord, other: VersionRecord) -> bool:
    """Whether a version was added before another one of its model: by the log's order, whatever clocks said."""
    added = [event.version for event in registry.history() if event.what == ADDED and event.model == one.model]
    if one.version in added and other.version in added:
        return added.index(one.version) < added.index(other.version)
    return one.added < other.added


def _describe(found: Found, parent: VersionRecord, demands: Demands) -> list[str]:
    counts = found.counts
    names = [*parent.labels, *sorted(set(counts) - set(parent.labels))]
    line = (
        f"new labelled images with consent: {len(found.images)} ({', '.join(f'{x} {counts.get(x, 0)}' for x in names)})"
    )
    out = ", ".join(f"{count} {why}" for why, count in sorted(found.left_out.items()))
    return [line, f"left out: {out}"] if out else [line]


def _missing(found: Found, parent: VersionRecord, demands: Demands) -> str:
    """Which classes lack how many images."""
    counts = found.counts
    few = {x: demands.min_labels - counts.get(x, 0) for x in dict.fromkeys((*parent.labels, *sorted(counts)))}
    return ", ".join(f"{label} {number}" for label, number in few.items() if number > 0)


def _waits(registry: Registry, parent: VersionRecord, runs: Path, found: Found, demands: Demands, now: float) -> str:
    """Why it is not tried again yet; empty if nothing is against it.

    What came last is that by the log's order: a clock that was wrong neither holds anything up for longer than the
    cooldown, nor hides that a version was kept out.
    """
    versions, days = registry.versions(parent.model), f"{demands.cooldown_s / _DAY_S:g}"
    log = [one for one in registry.history() if one.what in (ADDED, KEPT_OUT) and one.model == parent.model]
    failed = log[-1] if log and log[-1].what == KEPT_OUT else None
    if failed is None:
        newest = next((one for one in versions if log and one.version == log[-1].version), versions[-1])
        if abs(now - newest.added) >= demands.cooldown_s:
            return ""
        return f"not yet: {newest.name} was added {utc(newest.added)}; the cooldown is {days} days"
    state = read_state(runs / f"{parent.model}-{failed.version}")
    used = set(state.reason.images) if state is not None else set()
    further = sum(one.sha256 not in used for one in found.images) if used else 0
    if further >= demands.more_labels or (abs(now - failed.time) >= demands.cooldown_s and (further or not used)):
        return ""
    return (
        f"not yet: {parent.model}@{failed.version} was kept out {utc(failed.time)} ({failed.note}); the alarms stay "
        f"open. It is tried again with {demands.more_labels} further labels (there are {further}), or after {days} "
        "days with any"
    )


def _free_version(registry: Registry, parent: VersionRecord, runs: Path) -> str:
    """The first next version whose name and folder nothing has."""
    taken = {one.version for one in registry.versions(parent.model)}
    version = registry.versions(parent.model)[-1].version
    while version in taken or (runs / f"{parent.model}-{version}").exists():
        version = next_version(version)
    return version
