"""Retention: merge old windows by hour, delete other old messages, and keep expired ones from being stored again."""

from __future__ import annotations

import hashlib
import time
from collections import defaultdict
from collections.abc import Iterable
from functools import reduce
from typing import Any

import msgspec
from msgspec.structs import replace
from sqlalchemy import Connection, delete, func, select
from sqlalchemy.exc import SQLAlchemyError

from eyas_device.telemetry.messages import Window, encode, merge
from eyas_host.fleet.store.clocks import forget_starts, rewrite_corrected
from eyas_host.fleet.store.database import Store
from eyas_host.fleet.store.faults import StoreError, first_line
from eyas_host.fleet.store.ranges import union
from eyas_host.fleet.store.tables import drift_hours, expired, hourly_windows, messages, quarantine

_DAY_S = 86400.0
_CHUNK = 2000
"""Messages in one transaction, for which collectors wait."""

_Hour = tuple[str, str, int, str, str, str, str]
"""Device, site, hour since 1970, model, artefact, arm, digest: key of a merged window."""


class Retention(msgspec.Struct, frozen=True, kw_only=True):
    """Retention periods, in days from arrival."""

    windows_days: float = 30.0
    """Older windows are merged by hour; merged windows stay. What plots of drift show is deleted."""
    events_days: float = 365.0
    """Events, profiles, results, statuses, and windows of a newer schema, are kept for this many days."""
    quarantine_days: float = 30.0
    quarantine_max: int = 100_000
    """Max. quarantined messages, whatever their age; the newest are kept."""


class Expired(msgspec.Struct, frozen=True, kw_only=True):
    """Numbers of expired messages."""

    merged: int
    """Windows merged by hour."""
    deleted: int
    """Other messages."""
    quarantined: int


def expire(store: Store, retention: Retention | None = None, *, now: float | None = None) -> Expired:
    """Merge and delete messages older than `retention`; collectors may run meanwhile.

    Each step is a transaction that keeps other writers out: an interrupted run leaves a consistent store, and several
    runs at once merge each window once.

    Args:
        store: The store.
        retention: Retention periods.
        now: Current time, seconds since 1970.

    Raises:
        StoreError: the store cannot be written.

    """
    retention, now = retention or Retention(), time.time() if now is None else now
    try:
        with store.begin(exclusive=True) as connection:
            rewrite_corrected(connection)
        is_window = (messages.c.kind == "window") & (messages.c.problem == "")
        merged = _expire_all(store, is_window, now - retention.windows_days * _DAY_S)
        deleted = _expire_all(store, ~is_window, now - retention.events_days * _DAY_S)
        with store.begin(exclusive=True) as connection:
            forget_starts(connection, now - max(retention.windows_days, retention.events_days) * _DAY_S)
        _expire_hours(store, now - retention.windows_days * _DAY_S)
        quarantined = _expire_quarantine(store, now - retention.quarantine_days * _DAY_S, retention.quarantine_max)
    except SQLAlchemyError as error:
        raise StoreError(f"the store cannot be written: {first_line(error)}; run it again later") from None
    return Expired(merged=merged, deleted=deleted, quarantined=quarantined)


def _expire_all(store: Store, which: Any, before: float) -> int:
    total = 0
    while True:
        with store.begin(exclusive=True) as connection:
            number = _expire_chunk(connection, which, before)
        total += number
        if number < _CHUNK:
            return total


def _expire_hours(store: Store, before: float) -> None:
    """Delete what plots of drift show, an hour at a time."""
    c = drift_hours.c
    while True:
        with store.begin(exclusive=True) as connection:
            oldest = connection.execute(select(func.min(c.hour))).scalar_one()
            if oldest is None or oldest >= before // 3600:
                return
            connection.execute(delete(drift_hours).where(c.hour == oldest))


def _expire_chunk(connection: Connection, which: Any, before: float) -> int:
    """Expire the oldest messages: merge windows by hour, delete the others, and record the sequence numbers."""
    c = messages.c
    query = (
        select(c.device, c.spool, c.sequence, c.kind, c.site, c.payload, c.problem, c.time)
        .where(which, c.received < before)
        .order_by(c.received)
        .limit(_CHUNK)
    )
    rows = connection.execute(query).all()
    hours: dict[_Hour, list[Window]] = defaultdict(list)
    spools: dict[tuple[str, str], list[tuple[int, int]]] = defaultdict(list)
    for device, spool, sequence, kind, site, payload, problem, moment in rows:
        spools[device, spool].append((sequence, sequence))
        if kind == "window" and not problem:
            window = replace(msgspec.json.decode(payload, type=Window), time=moment)
            hour = (device, site, int(moment // 3600), window.model, window.artefact, window.arm, window.digest)
            hours[hour].append(window)
    for hour, windows in hours.items():
        _merge_into_hour(connection, hour, windows)
    for (device, spool), ranges in spools.items():
        _record_expired(connection, device, spool, ranges)
        for first, last in union(ranges):
            own = (c.device == device, c.spool == spool, c.sequence >= first, c.sequence <= last)
            connection.execute(delete(messages).where(*own, which, c.received < before))
    return len(rows)


def _merge_into_hour(connection: Connection, hour: _Hour, windows: Iterable[Window]) -> None:
    key = hashlib.sha256(msgspec.json.encode(hour if hour[-1] else hour[:-1])).hexdigest()  # agents 0.1.0 send none
    same = hourly_windows.c.key == key
    stored = connection.execute(select(hourly_windows.c.payload).where(same)).scalar_one_or_none()
    earlier = [] if stored is None else [msgspec.json.decode(stored, type=Window)]
    payload = encode(reduce(merge, [*earlier, *windows])).decode()
    connection.execute(delete(hourly_windows).where(same))
    row = {"key": key, "device": hour[0], "hour": hour[2], "payload": payload}
    connection.execute(hourly_windows.insert(), row)


def _record_expired(connection: Connection, device: str, spool: str, ranges: Iterable[tuple[int, int]]) -> None:
    same = (expired.c.device == device, expired.c.spool == spool)
    stored = connection.execute(select(expired.c.first, expired.c.last).where(*same))
    earlier = [(int(first), int(last)) for first, last in stored]
    connection.execute(delete(expired).where(*same))
    rows = [{"device": device, "spool": spool, "first": f, "last": last} for f, last in union([*earlier, *ranges])]
    connection.execute(expired.insert(), rows)


def _expire_quarantine(store: Store, before: float, max_count: int) -> int:
    c = quarantine.c
    with store.begin(exclusive=True) as connection:
        oldest = select(c.id).order_by(c.id.desc()).offset(max_count).limit(1)
        beyond = connection.execute(oldest).scalar_one_or_none()
        old = c.received < before if beyond is None else (c.received < before) | (c.id <= beyond)
        return int(connection.execute(delete(quarantine).where(old)).rowcount)
