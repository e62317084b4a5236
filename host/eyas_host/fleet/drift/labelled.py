"""Accuracy on labelled samples: events that devices sent at random, with labels from people.

A table names each event by its identity, `device,spool,sequence,label`. Only events that were drawn at random
(`why` = `sampled`) tell the accuracy: hard samples are wrong more often than others.
"""

from __future__ import annotations

import csv
from collections import Counter, defaultdict
from collections.abc import Mapping
from pathlib import Path

import msgspec
from sqlalchemy import select

from eyas_device.telemetry.messages import Event
from eyas_host.fleet.drift.errors import DriftError
from eyas_host.fleet.drift.reader import Row as WindowRow
from eyas_host.fleet.drift.reader import decode
from eyas_host.fleet.drift.risk import RiskBound, RiskMonitor
from eyas_host.fleet.store.database import Store
from eyas_host.fleet.store.tables import messages

COLUMNS = ("device", "spool", "sequence", "label")
_AROUND_S = 86_400.0
"""Windows from this long before the first sample to as long after the last one tell the mean confidence, seconds."""

Key = tuple[str, str, int]
"""Device, spool, sequence: the identity of an event."""


class Accuracy(msgspec.Struct, frozen=True, kw_only=True):
    """Accuracy on labelled samples."""

    where: str
    """Name of a site, or `fleet`."""
    bound: RiskBound
    """Estimate and bounds."""
    confusion: dict[str, dict[str, int]]
    """True label -> predicted label -> samples."""
    left_out: dict[str, int]
    """Why labels do not count -> how many."""


def read_labels(path: Path) -> dict[Key, str]:
    """Read a table of labels. Raises `DriftError` that says which line is wrong and what is needed."""
    labels: dict[Key, str] = {}
    try:
        with path.open(encoding="utf-8-sig", newline="") as stream:
            rows = csv.DictReader(stream)
            if missing := [name for name in COLUMNS if name not in (rows.fieldnames or ())]:
                raise DriftError(f"{path}: no column {missing[0]!r}; the columns {', '.join(COLUMNS)} are needed")
            for row in rows:
                where = f"{path}, line {rows.line_num}"
                try:
                    key = (row["device"], row["spool"], int(row["sequence"]))
                except (TypeError, ValueError):
                    raise DriftError(f"{where}: sequence {row['sequence']!r}; a whole number is needed") from None
                label = (row["label"] or "").strip()
                if not label:
                    raise DriftError(f"{where}: no label; leave the line out if nobody knows it")
                if labels.setdefault(key, label) != label:
                    raise DriftError(f"{where}: {label!r}, and {labels[key]!r} above for the same sample; keep one")
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DriftError(f"{path}: {getattr(error, 'strerror', None) or error}; a CSV file is needed") from None
    return labels


def accuracies(store: Store, labels: Mapping[Key, str]) -> list[Accuracy]:
    """Accuracy of each site with labelled samples, and of the fleet, in the order of the samples."""
    events, sites, left_out = _events(store, labels)
    if not events:
        return [_accuracy("fleet", [], {}, left_out, 0.0)]
    groups: dict[str, list[Event]] = defaultdict(list)
    for event in events:
        groups[sites[event.device]].append(event)
    found = [("fleet", events), *sorted(groups.items())] if len(groups) > 1 else [("fleet", events)]
    return [
        _accuracy(where, own, labels, left_out if where == "fleet" else Counter(), _mean_announced(store, own))
        for where, own in found
    ]


def _events(store: Store, labels: Mapping[Key, str]) -> tuple[list[Event], dict[str, str], Counter[str]]:
    c = messages.c
    found: list[Event] = []
    sites: dict[str, str] = {}
    left_out: Counter[str] = Counter()
    seen: set[Key] = set()
    with store.reading() as connection:
        for device in sorted({device for device, _, _ in labels}):
            query = select(c.spool, c.sequence, c.site, c.payload).where(c.device == device, c.kind == "event")
            for spool, sequence, site, payload in connection.execute(query):
                key = (device, str(spool), int(sequence))
                if key not in labels:
                    continue
                seen.add(key)
                event = msgspec.json.decode(payload, type=Event)
                if event.why != "sampled":
                    left_out["not drawn at random"] += 1
                elif event.arm:
                    left_out["of a model on probation"] += 1
                else:
                    found.append(event)
                    sites[device] = str(site)
    left_out["not in the store"] += len(labels) - len(seen)
    return sorted(found, key=lambda event: (event.time, event.device, event.sequence)), sites, +left_out


def _mean_announced(store: Store, events: list[Event]) -> float:
    """Mean of 1 - confidence over all predictions of the devices in the time of the samples."""
    c = messages.c
    first, last = events[0].time - _AROUND_S, events[-1].time + _AROUND_S
    frames = total = 0.0
    with store.reading() as connection:
        for device in sorted({event.device for event in events}):
            query = select(c.device, c.site, c.time, c.received, c.payload).where(
                c.device == device, c.kind == "window", c.problem == "", c.time >= first, c.time <= last
            )
            for row in connection.execute(query):
                window = decode(WindowRow(*row))
                if window is not None and not window.arm:
                    frames += window.frames
                    total += min(sum(window.confidence_sum.values()), float(window.frames))
    return 1 - total / frames if frames else 0.5


def _accuracy(
    where: str, events: list[Event], labels: Mapping[Key, str], left_out: Counter[str], mean_announced: float
) -> Accuracy:
    monitor = RiskMonitor()
    confusion: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))
    for event in events:
        label = labels[event.device, event.spool, event.sequence]
        announced = min(max(1 - event.confidence, 0.0), 1.0)
        monitor.add(float(label != event.label), announced, mean_announced)
        confusion[label][event.label] += 1
    return Accuracy(
        where=where,
        bound=monitor.bound(),
        confusion={label: dict(row) for label, row in sorted(confusion.items())},
        left_out=dict(left_out),
    )


def describe(found: Accuracy) -> list[str]:
    """The accuracy in some lines, for people."""
    bound = found.bound
    left = "".join(f"; {number} {why}" for why, number in found.left_out.items())
    if not bound.labels:
        return [f"{found.where}: no labelled samples{left}"]
    lines = [
        f"{found.where}: accuracy {bound.accuracy:.3f} on {bound.labels} labelled samples, at least {bound.lower:.3f} "
        f"(95 %, at any time, if it is the same for all of them){left}"
    ]
    for label, row in found.confusion.items():
        lines.append(f"  {label}: " + ", ".join(f"{number} as {name}" for name, number in sorted(row.items())))
    return lines
