"""The store of a fleet's messages: SQLite by default, PostgreSQL by URL.

The key of a message is (device, spool, sequence): duplicates are stored once, also after the first copy expired. When
`Store.add` returns, the batch survives a power cut (SQLite: write-ahead log, synced at each commit).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, TypeVar

import msgspec
from sqlalchemy import Connection, bindparam, exists, func, inspect, literal_column, or_, select
from sqlalchemy.exc import SQLAlchemyError

from eyas_device.support.closing import Closing
from eyas_device.telemetry.messages import Event, Header, Status, Window
from eyas_host.fleet.store.tables import (
    READING,
    VERSION,
    StoreError,
    devices,
    expired,
    first_line,
    hourly_windows,
    insert_into,
    messages,
    metadata,
    open_engine,
    quarantine,
    version,
    without_password,
)
from eyas_host.fleet.store.validate import ValidMessage

QUARANTINE_BYTES = 16 * 1024
"""Max. stored bytes of a quarantined payload."""
_PAGE = 2000
"""Rows fetched at a time."""
_SEEN_S = 10.0
"""Resolution of `DeviceRecord.last_seen`, seconds."""

_Message = TypeVar("_Message", bound=Header)


class QuarantinedMessage(msgspec.Struct, frozen=True):
    """An invalid message and the reason."""

    topic: str
    reason: str
    payload: bytes


class Batch(msgspec.Struct, frozen=True):
    """Messages to commit together."""

    received: float
    """Time of arrival, seconds since 1970."""
    messages: Sequence[ValidMessage] = ()
    quarantined: Sequence[QuarantinedMessage] = ()


class DeviceRecord(msgspec.Struct, frozen=True):
    """Last status of a device, and when it last sent anything."""

    device: str
    site: str
    last_seen: float
    """Arrival of its last message, within ten seconds; seconds since 1970 by the collector's clock."""
    status_received: float
    """Arrival of its last status, seconds since 1970; 0 if there is none."""
    status: Status


class Store(Closing):
    """Messages of a fleet. Several stores, also of several processes, may share a database; a store is not thread-safe.

    `url` is an SQLAlchemy URL, e.g. `sqlite:///fleet.db`; `create` makes the tables where there are none. Raises
    `StoreError` if it cannot be opened.
    """

    def __init__(self, url: str, *, create: bool = True) -> None:
        self._engine = open_engine(url, create=create)
        self._last_seen: dict[str, float] = {}
        """Device -> last written `last_seen`."""
        try:
            self._prepare(without_password(url), create=create)
        except BaseException as error:
            self.close()
            if isinstance(error, SQLAlchemyError):
                raise StoreError(
                    f"store {without_password(url)}: {first_line(error)}; check that it can be written"
                ) from None
            raise
        self._insert = self._insert_new()

    def close(self) -> None:
        """Close all connections."""
        self._engine.dispose()

    def begin(self) -> AbstractContextManager[Connection]:
        """Open a write transaction; leaving it commits."""
        return self._engine.begin()

    def add(self, batch: Batch) -> int:
        """Commit a batch durably and return how many of its messages are new.

        Raises `sqlalchemy.exc.OperationalError` if the database cannot write now (full disk, locked); then nothing of
        the batch is stored, and it can be added again.
        """
        rows = [_row(m, batch.received) for m in batch.messages if not m.is_will]
        new = 0
        with self.begin() as connection:
            if rows:
                new = connection.execute(self._insert, rows).rowcount
            if batch.quarantined:
                connection.execute(quarantine.insert(), [_quarantine_row(q, batch.received) for q in batch.quarantined])
            self._update_devices(connection, batch)
        return new

    def counts(self) -> dict[str, int]:
        """Count stored messages by kind, and quarantined ones under `quarantine`."""
        with self._reading() as connection:
            by_kind = select(messages.c.kind, func.count()).group_by(messages.c.kind)
            counts = {str(kind): int(number) for kind, number in connection.execute(by_kind)}
            counts["quarantine"] = int(connection.execute(select(func.count()).select_from(quarantine)).scalar_one())
        return counts

    def windows(self, device: str | None = None, *, since: float = 0.0) -> Iterator[Window]:
        """Iterate over windows from `since` on (seconds since 1970, device clock), oldest first.

        Expired windows come first, merged into one for each hour, model, artefact and arm.
        """
        hours = (
            select(hourly_windows.c.payload)
            .where((hourly_windows.c.hour + 1) * 3600 > since)
            .order_by(hourly_windows.c.hour)
        )
        if device is not None:
            hours = hours.where(hourly_windows.c.device == device)
        yield from self._decoded(hours, Window)
        yield from self._decoded(_query("window", device, since), Window)

    def events(self, device: str | None = None, *, since: float = 0.0) -> Iterator[Event]:
        """Iterate over hard samples from `since` on (seconds since 1970, device clock), oldest first."""
        return self._decoded(_query("event", device, since), Event)

    def devices(self) -> list[DeviceRecord]:
        """All known devices, sorted by name."""
        with self._reading() as connection:
            rows = connection.execute(select(devices).order_by(devices.c.device)).mappings().all()
        return [
            DeviceRecord(
                r["device"],
                r["site"],
                r["last_seen"],
                r["status_received"],
                msgspec.json.decode(r["status"], type=Status),
            )
            for r in rows
        ]

    def quarantined(self, *, limit: int = 100) -> list[QuarantinedMessage]:
        """The latest quarantined messages, with the first bytes of each payload."""
        c = quarantine.c
        query = select(c.topic, c.reason, c.payload).order_by(c.id.desc()).limit(limit)
        with self._reading() as connection:
            return [QuarantinedMessage(str(t), str(r), str(p).encode()) for t, r, p in connection.execute(query)]

    def sequences(self, device: str, spool: str) -> list[int]:
        """Sequence numbers of a spool's stored messages, in order; without expired ones."""
        c = messages.c
        query = select(c.sequence).where(c.device == device, c.spool == spool).order_by(c.sequence)
        with self._reading() as connection:
            return [int(number) for (number,) in connection.execute(query)]

    def _reading(self) -> Connection:
        return self._engine.connect().execution_options(**{READING: True})

    def _decoded(self, query: Any, kind: type[_Message]) -> Iterator[_Message]:
        with self._reading() as connection:
            for (payload,) in connection.execution_options(yield_per=_PAGE).execute(query):
                yield msgspec.json.decode(payload, type=kind)

    def _prepare(self, name: str, *, create: bool) -> None:
        with self.begin() as connection:
            there = set(inspect(connection).get_table_names())
            if version.name not in there:
                if there & set(metadata.tables):
                    raise StoreError(f"store {name}: it has tables of another program; use another database")
                if not create:
                    raise StoreError(f"store {name}: there is no store; `eyas collect` creates one")
                metadata.create_all(connection)
                connection.execute(version.insert(), {"version": VERSION})
            found = connection.execute(select(func.max(version.c.version))).scalar_one()
            if found != VERSION:
                raise StoreError(f"store {name}: version {found}, not {VERSION}; use the Eyas that wrote it")

    def _insert_new(self) -> Any:
        """Insert messages that are neither stored nor expired."""
        values = select(*(bindparam(c.name, type_=c.type) for c in messages.columns)).where(
            ~exists(literal_column("1"))
            .where(expired.c.device == bindparam("device"))
            .where(expired.c.spool == bindparam("spool"))
            .where(expired.c.first <= bindparam("sequence"))
            .where(expired.c.last >= bindparam("sequence"))
        )
        names = [column.name for column in messages.columns]
        return insert_into(self._engine, messages).from_select(names, values).on_conflict_do_nothing()

    def _update_devices(self, connection: Connection, batch: Batch) -> None:
        """Update `last_seen` of devices (every ten seconds) and their status where it is newer."""
        senders = {m.id.device: m.id.site for m in batch.messages if not m.is_will}
        due = [name for name in senders if batch.received - self._last_seen.get(name, 0.0) >= _SEEN_S]
        if due:
            insert = insert_into(self._engine, devices)
            upsert = insert.on_conflict_do_update(
                index_elements=["device"], set_={"last_seen": insert.excluded.last_seen, "site": insert.excluded.site}
            )
            new = {"last_seen": batch.received, "status_received": 0.0, "spool": "", "sequence": -1}
            new["status"] = '{"state":"online"}'
            connection.execute(upsert, [new | {"device": name, "site": senders[name]} for name in due])
            self._last_seen.update(dict.fromkeys(due, batch.received))
        for message in batch.messages:
            if message.kind == "status":
                self._update_status(connection, message, batch.received)

    def _update_status(self, connection: Connection, message: ValidMessage, received: float) -> None:
        a, insert = message.id, insert_into(self._engine, devices)
        row: dict[str, object] = {"device": a.device, "site": a.site, "last_seen": received}
        row |= {"status_received": received, "status": message.payload}
        if message.is_will:  # it has no sequence number
            newer, change = None, {"status_received": received, "status": message.payload}
        else:
            newer = or_(devices.c.spool != a.spool, devices.c.sequence < a.sequence)
            change = row | {"spool": a.spool, "sequence": a.sequence}
        upsert = insert.on_conflict_do_update(index_elements=["device"], set_=change, where=newer)
        connection.execute(upsert, row | {"spool": a.spool, "sequence": a.sequence})


def _query(kind: str, device: str | None, since: float) -> Any:
    c = messages.c
    query = select(c.payload).where(c.kind == kind, c.time >= since).order_by(c.time)
    return query if device is None else query.where(c.device == device)


def _row(message: ValidMessage, received: float) -> dict[str, object]:
    a = message.id
    return {
        "device": a.device,
        "spool": a.spool,
        "sequence": a.sequence,
        "kind": message.kind,
        "site": a.site,
        "time": message.message.time,
        "received": received,
        "model": getattr(message.message, "model", ""),
        "payload": message.payload,
    }


def _quarantine_row(message: QuarantinedMessage, received: float) -> dict[str, object]:
    return {
        "received": received,
        "topic": _safe(message.topic.encode("utf-8", "replace")[:1024]),
        "reason": _safe(message.reason.encode("utf-8", "replace")[:1024]),
        "size": len(message.payload),
        "payload": _safe(message.payload[:QUARANTINE_BYTES]),
    }


def _safe(data: bytes) -> str:
    """Decode to text that every database stores: escape NUL and what is not UTF-8."""
    return data.decode("utf-8", "backslashreplace").replace("\x00", "\\x00")
