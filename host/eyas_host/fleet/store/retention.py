"""How long what is kept: old windows are merged to hours, the rest is deleted, and nothing that went comes back."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterable
from functools import reduce
from typing import Any

import msgspec
from sqlalchemy import Connection, delete, func, select
from sqlalchemy.exc import SQLAlchemyError

from eyas_device.telemetry.messages import Window, encode, merge
from eyas_host.fleet.store.ranges import union
from eyas_host.fleet.store.store import Store
from eyas_host.fleet.store.tables import StoreError, first_line, gone, messages, quarantine, rolled

_DAY_S = 86400.0
_CHUNK = 2000
"""Messages that go in one transaction: collectors wait for it."""

_Hour = tuple[str, str, int, str, str, str]
"""Device, site, hour since 1970, model, artefact, arm: what one merged window stands for."""


class Keep(msgspec.Struct, frozen=True, kw_only=True):
    """Days that things are kept, counted from their arrival."""

    windows_days: float = 30.0
    """Afterwards windows are merged to hours, which stay."""
    events_days: float = 365.0
    """Events, profiles, results and statuses."""
    poison_days: float = 30.0
    poison_most: int = 100_000
    """Of the quarantine the newest are kept, however young the others are."""


class Pruned(msgspec.Struct, frozen=True, kw_only=True):
    """What went."""

    rolled: int
    """Windows that were merged."""
    deleted: int
    """Other messages."""
    poison: int


def prune(store: Store, keep: Keep | None = None, *, now: float | None = None) -> Pruned:
    """Merge and delete what is older than `keep` says; collectors may go on meanwhile.

    Each step is a transaction of its own: an interrupted run leaves a right store. Raises `StoreError` if it cannot be
    written.
    """
    keep, now = keep or Keep(), time.time() if now is None else now
    try:
        merged = _all_chunks(store, messages.c.kind == "window", now - keep.windows_days * _DAY_S)
        deleted = _all_chunks(store, messages.c.kind != "window", now - keep.events_days * _DAY_S)
        poison = _prune_poison(store, now - keep.poison_days * _DAY_S, keep.poison_most)
    except SQLAlchemyError as error:
        raise StoreError(f"the store cannot be pruned: {first_line(error)}; run it again later") from None
    return Pruned(rolled=merged, deleted=deleted, poison=poison)


def _all_chunks(store: Store, which: Any, before: float) -> int:
    total = 0
    while True:
        with store.begin() as connection:
            number = _chunk(connection, which, before)
        total += number
        if number < _CHUNK:
            return total


def _chunk(connection: Connection, which: Any, before: float) -> int:
    """Let the oldest messages go: merge those that are windows, and note that they were here."""
    c = messages.c
    wanted = (
        select(c.device, c.spool, c.sequence, c.kind, c.site, c.payload)
        .where(which, c.received < before)
        .order_by(c.received)
        .limit(_CHUNK)
    )
    rows = connection.execute(wanted).all()
    hours: dict[_Hour, list[Window]] = defaultdict(list)
    spools: dict[tuple[str, str], list[tuple[int, int]]] = defaultdict(list)
    for device, spool, sequence, kind, site, payload in rows:
        spools[device, spool].append((sequence, sequence))
        if kind == "window":
            window = msgspec.json.decode(payload, type=Window)
            hours[device, site, int(window.time // 3600), window.model, window.artefact, window.arm].append(window)
    for hour, windows in hours.items():
        _roll(connection, hour, windows)
    for (device, spool), ranges in spools.items():
        _note_gone(connection, device, spool, ranges)
        for first, last in union(ranges):
            own = (c.device == device, c.spool == spool, c.sequence >= first, c.sequence <= last)
            connection.execute(delete(messages).where(*own, which, c.received < before))
    return len(rows)


def _roll(connection: Connection, hour: _Hour, windows: Iterable[Window]) -> None:
    names = ("device", "site", "hour", "model", "artefact", "arm")
    same = [rolled.c[name] == value for name, value in zip(names, hour, strict=True)]
    before = connection.execute(select(rolled.c.payload).where(*same)).scalar_one_or_none()
    known = [] if before is None else [msgspec.json.decode(before, type=Window)]
    payload = encode(reduce(merge, [*known, *windows])).decode()
    connection.execute(delete(rolled).where(*same))
    connection.execute(rolled.insert(), {**dict(zip(names, hour, strict=True)), "payload": payload})


def _note_gone(connection: Connection, device: str, spool: str, ranges: Iterable[tuple[int, int]]) -> None:
    same = (gone.c.device == device, gone.c.spool == spool)
    known = [
        (int(first), int(last)) for first, last in connection.execute(select(gone.c.first, gone.c.last).where(*same))
    ]
    connection.execute(delete(gone).where(*same))
    rows = [{"device": device, "spool": spool, "first": f, "last": last} for f, last in union([*known, *ranges])]
    connection.execute(gone.insert(), rows)


def _prune_poison(store: Store, before: float, most: int) -> int:
    with store.begin() as connection:
        newest = connection.execute(select(func.max(quarantine.c.id))).scalar_one() or 0
        old = (quarantine.c.received < before) | (quarantine.c.id <= newest - most)
        return int(connection.execute(delete(quarantine).where(old)).rowcount)
