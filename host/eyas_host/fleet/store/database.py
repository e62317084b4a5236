"""The store of a fleet's messages: SQLite by default, PostgreSQL by URL.

The key of a message is (device, spool, sequence): duplicates are stored once, also after the first copy expired. When
`Store.add` returns, the batch survives a power cut of the database's machine. Writers of one store may work at the same
time; on PostgreSQL they lock rows in the order of their keys, against deadlocks.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, TypeVar

import msgspec
from msgspec.structs import replace
from sqlalchemy import Connection, delete, exists, func, inspect, literal, or_, select
from sqlalchemy.exc import DBAPIError, SQLAlchemyError

from eyas_device.support.closing import Closing
from eyas_device.telemetry.messages import MAX_BYTES, Event, Header, Status, Window
from eyas_host.fleet.store.clocks import Clocks
from eyas_host.fleet.store.engine import READING, insert_into, open_engine, without_password, writing
from eyas_host.fleet.store.faults import StoreError, first_line
from eyas_host.fleet.store.migrate import migrate
from eyas_host.fleet.store.tables import (
    MIGRATIONS,
    VERSION,
    devices,
    expired,
    hourly_windows,
    messages,
    metadata,
    quarantine,
    version,
)
from eyas_host.fleet.store.validate import ValidMessage, read, read_again

QUARANTINE_BYTES = 16 * 1024
"""Max. stored bytes of a quarantined payload whose sender is unknown, so that it is not acknowledged."""
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
    acknowledged: bool = False
    """Whether its sender will forget it: then it is kept whole."""
    key: str = msgspec.field(default_factory=lambda: uuid.uuid4().hex)
    """A batch that is added again, because the outcome of its commit is unknown, quarantines it once."""


class Batch(msgspec.Struct, frozen=True):
    """Messages to commit together."""

    received: float
    """Time of arrival, seconds since 1970."""
    messages: Sequence[ValidMessage] = ()
    quarantined: Sequence[QuarantinedMessage] = ()
    cleared: Sequence[str] = ()
    """Devices whose retained status was removed, and that sent nothing after that: they leave the list of devices."""


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

    `url` is an SQLAlchemy URL, e.g. `sqlite:///fleet.db` or `postgresql://USER@HOST/DATABASE`; `create` makes the
    tables where there are none. Raises `StoreError` if it cannot be opened.
    """

    def __init__(self, url: str, *, create: bool = True) -> None:
        self._engine = open_engine(url, create=create)
        self.name = without_password(url)
        self.id = ""
        """Identity of the database, by whatever URL it is reached."""
        self._last_seen: dict[str, float] = {}
        """Device -> last written `last_seen`."""
        self._clocks = Clocks()
        try:
            self._prepare(create=create)
        except BaseException as error:
            self.close()
            if isinstance(error, SQLAlchemyError):
                raise StoreError(f"store {self.name}: {first_line(error)}; check that it can be written") from None
            raise

    def close(self) -> None:
        """Close all connections."""
        self._engine.dispose()

    def begin(self, *, exclusive: bool = False) -> AbstractContextManager[Connection]:
        """Open a write transaction; leaving it commits. `exclusive` keeps all other writers out."""
        return writing(self._engine, exclusive=exclusive)

    def reading(self) -> Connection:
        """Open a connection that only reads, and keeps no writer out; close it after use."""
        return self._engine.connect().execution_options(**{READING: True})

    def add(self, batch: Batch) -> int:
        """Commit a batch durably and return how many of its messages are new.

        Raises the database's error, see `classify`; the batch can then be added again: what of it is stored already,
        because only the answer of the commit was lost, is not stored twice.
        """
        by_key = sorted(batch.messages, key=lambda m: (m.id.device, m.id.spool, m.id.sequence))
        rows = [_row(m, batch.received) for m in by_key if not m.is_will]
        try:
            with self.begin() as connection:
                self._clocks.correct(connection, rows, batch.received)
                new = self._insert_new(connection, rows, batch.received)
                self._quarantine(connection, batch)
                seen = self._update_devices(connection, batch)
                if batch.cleared:
                    connection.execute(delete(devices).where(devices.c.device.in_(sorted(batch.cleared))))
        except DBAPIError:
            self._clocks = Clocks()
            self._engine.dispose()  # the next try connects again: the address may lead to another server by then
            raise
        self._last_seen.update(dict.fromkeys(seen, batch.received))
        for device in batch.cleared:
            self._last_seen.pop(device, None)
        return new

    def counts(self) -> dict[str, int]:
        """Count stored messages by kind, and quarantined ones under `quarantine`."""
        with self.reading() as connection:
            by_kind = select(messages.c.kind, func.count()).group_by(messages.c.kind)
            counts = {str(kind): int(number) for kind, number in connection.execute(by_kind)}
            counts["quarantine"] = int(connection.execute(select(func.count()).select_from(quarantine)).scalar_one())
        return counts

    def unread(self) -> list[str]:
        """Why stored messages of newer schemas could not be read in full, each reason once."""
        query = select(messages.c.problem).where(messages.c.problem != "").distinct()
        with self.reading() as connection:
            return sorted(str(problem) for (problem,) in connection.execute(query))

    def windows(self, device: str | None = None, *, since: float = 0.0) -> Iterator[Window]:
        """Iterate over windows from `since` on (seconds since 1970), oldest first.

        Expired windows come first, merged into one for each hour, model, artefact and arm. Times are the devices', or
        corrected ones of boards whose clock was wrong. Windows of a newer schema than this version's are left out.
        """
        hours = (
            select(hourly_windows.c.payload, literal(""), literal(0), literal(0.0))
            .where(hourly_windows.c.hour >= int(since // 3600))
            .order_by(hourly_windows.c.hour)
        )
        if device is not None:
            hours = hours.where(hourly_windows.c.device == device)
        yield from self._decoded(hours, Window)
        yield from self._decoded(_query("window", device, since), Window)

    def events(self, device: str | None = None, *, since: float = 0.0) -> Iterator[Event]:
        """Iterate over hard samples from `since` on (seconds since 1970), oldest first; see `windows`."""
        return self._decoded(_query("event", device, since), Event)

    def devices(self) -> list[DeviceRecord]:
        """All known devices, sorted by name."""
        with self.reading() as connection:
            rows = connection.execute(select(devices)).mappings().all()
        return [
            DeviceRecord(
                r["device"],
                r["site"],
                r["last_seen"],
                r["status_received"],
                _status(r["status"]),
            )
            for r in sorted(rows, key=lambda row: str(row["device"]))  # databases sort by languages
        ]

    def quarantined(self, *, limit: int = 100) -> list[QuarantinedMessage]:
        """The latest quarantined messages, with the first bytes of each payload."""
        c = quarantine.c
        query = select(c.topic, c.reason, c.payload).order_by(c.id.desc()).limit(limit)
        with self.reading() as connection:
            return [QuarantinedMessage(str(t), str(r), str(p).encode()) for t, r, p in connection.execute(query)]

    def sequences(self, device: str, spool: str) -> list[int]:
        """Sequence numbers of a spool's stored messages, in order; without expired ones."""
        c = messages.c
        query = select(c.sequence).where(c.device == device, c.spool == spool).order_by(c.sequence)
        with self.reading() as connection:
            return [int(number) for (number,) in connection.execute(query)]

    def _decoded(self, query: Any, kind: type[_Message]) -> Iterator[_Message]:
        with self.reading() as connection:
            rows = connection.execution_options(yield_per=_PAGE).execute(query)
            for payload, problem, corrected, moment in rows:
                if problem:
                    message = read_again("window" if kind is Window else "event", payload)
                    if not isinstance(message, kind):
                        continue
                else:
                    message = msgspec.json.decode(payload, type=kind)
                yield replace(message, time=moment) if corrected else message

    def _prepare(self, *, create: bool) -> None:
        """Check the tables, and create them where there are none; several first starts at once create them once."""
        with self.reading() as connection:
            if connection.dialect.name == "postgresql":
                encoding = connection.exec_driver_sql("SHOW server_encoding").scalar_one()
                if encoding != "UTF8":
                    raise StoreError(f"store {self.name}: its encoding is {encoding}; create the database with UTF8")
            there = self._has_tables(connection)
        if not there:
            if not create:
                raise StoreError(f"store {self.name}: there is no store; `eyas collect` creates one")
            with self.begin(exclusive=True) as connection:
                if not self._has_tables(connection):
                    metadata.create_all(connection)
                    connection.execute(version.insert(), {"version": VERSION, "id": str(uuid.uuid4())})
        with self.reading() as connection:
            found = connection.execute(select(func.max(version.c.version))).scalar_one()
        if found in MIGRATIONS:
            with self.begin(exclusive=True) as connection:
                found = migrate(connection)
        if found == VERSION:
            with self.reading() as connection:
                self.id = str(connection.execute(select(func.max(version.c.id))).scalar_one())
        else:
            raise StoreError(f"store {self.name}: version {found}, not {VERSION}; use the Eyas that wrote it")

    def _has_tables(self, connection: Connection) -> bool:
        there = set(inspect(connection).get_table_names())
        if version.name not in there and there & set(metadata.tables):
            raise StoreError(f"store {self.name}: it has tables of another program; use another database")
        return version.name in there

    def _insert_new(self, connection: Connection, rows: list[dict[str, Any]], received: float) -> int:
        """Insert messages that are neither stored nor expired, and return how many."""
        if not rows:
            return 0
        c = messages.c
        insert = insert_into(self._engine, messages).on_conflict_do_nothing().returning(c.sequence)
        new = len(connection.execute(insert, rows).all())
        if not new:
            return 0
        range_of = (expired.c.device == c.device, expired.c.spool == c.spool)
        is_expired = exists().where(*range_of, expired.c.last >= c.sequence, expired.c.first <= c.sequence)
        kinds = sorted({row["kind"] for row in rows})
        again = delete(messages).where(c.kind.in_(kinds), c.received == received, is_expired).returning(c.sequence)
        return new - len(connection.execute(again).all())

    def _quarantine(self, connection: Connection, batch: Batch) -> None:
        if batch.quarantined:
            insert = insert_into(self._engine, quarantine).on_conflict_do_nothing(index_elements=["key"])
            rows = [_quarantine_row(message, batch.received) for message in batch.quarantined]
            connection.execute(insert, sorted(rows, key=lambda row: str(row["key"])))

    def _update_devices(self, connection: Connection, batch: Batch) -> list[str]:
        """Update the status of devices where it is newer, and `last_seen` of those that are returned.

        `last_seen` is written every ten seconds.
        """
        senders = {m.id.device: m.id.site for m in batch.messages if not m.is_will}
        due = sorted(name for name in senders if batch.received - self._last_seen.get(name, 0.0) >= _SEEN_S)
        statuses = [message for message in batch.messages if message.kind == "status"]
        touched = sorted({*due, *(message.id.device for message in statuses)})
        if touched and connection.dialect.name == "postgresql":
            in_order = select(devices.c.device).where(devices.c.device.in_(touched)).order_by(devices.c.device)
            connection.execute(in_order.with_for_update())
        if due:
            insert = insert_into(self._engine, devices)
            upsert = insert.on_conflict_do_update(
                index_elements=["device"], set_={"last_seen": insert.excluded.last_seen, "site": insert.excluded.site}
            )
            new = {"last_seen": batch.received, "status_received": 0.0, "spool": "", "sequence": -1}
            new["status"] = '{"state":"online"}'
            connection.execute(upsert, [new | {"device": name, "site": senders[name]} for name in due])
        for message in statuses:
            self._update_status(connection, message, batch.received)
        return due

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


def _status(payload: str) -> Status:
    """A stored status; one of a newer schema as far as it can be read."""
    message, _ = read("status", payload.encode())
    assert isinstance(message, Status)
    return message


def _query(kind: str, device: str | None, since: float) -> Any:
    c = messages.c
    query = select(c.payload, c.problem, c.corrected, c.time).where(c.kind == kind, c.time >= since).order_by(c.time)
    return query if device is None else query.where(c.device == device)


def _row(message: ValidMessage, received: float) -> dict[str, Any]:
    a = message.id
    return {
        "device": a.device,
        "spool": a.spool,
        "sequence": a.sequence,
        "kind": message.kind,
        "site": a.site,
        "time": message.message.time,
        "received": received,
        "model": getattr(message.message, "model", "").replace("\x00", "\ufffd"),  # PostgreSQL stores no NUL
        "payload": message.payload,
        "boot": message.message.boot,
        "uptime": message.message.uptime_s,
        "synchronised": message.message.synchronised,
        "corrected": 0,
        "problem": message.problem,
    }


def _quarantine_row(message: QuarantinedMessage, received: float) -> dict[str, object]:
    return {
        "key": message.key,
        "received": received,
        "topic": _safe(message.topic.encode("utf-8", "replace")[:1024]),
        "reason": _safe(message.reason.encode("utf-8", "replace")[:1024]),
        "size": len(message.payload),
        "payload": _safe(message.payload[: MAX_BYTES if message.acknowledged else QUARANTINE_BYTES]),
    }


def _safe(data: bytes) -> str:
    """Decode to text that every database stores: escape NUL and what is not UTF-8."""
    return data.decode("utf-8", "backslashreplace").replace("\x00", "\\x00")
