"""Where a fleet's messages are kept: SQLite by default, PostgreSQL by its URL.

A message is stored under (device, spool, sequence): what comes twice is kept once, also after it was rolled up or
deleted. What `Store.add` has returned from survives a power cut (SQLite: write-ahead log, synchronised at each commit).
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
from eyas_host.fleet.store.checked import Checked
from eyas_host.fleet.store.tables import (
    READING,
    VERSION,
    StoreError,
    devices,
    first_line,
    gone,
    insert_into,
    messages,
    metadata,
    open_engine,
    quarantine,
    rolled,
    shown,
    version,
)

KEPT_POISON = 16 * 1024
"""Bytes of a quarantined payload that are kept."""
_PAGE = 2000
"""Rows that a query fetches at a time."""
_SEEN_S = 10.0
"""How precisely it is noted when a device was last heard of."""

_Message = TypeVar("_Message", bound=Header)


class Quarantined(msgspec.Struct, frozen=True):
    """One thing that was no message."""

    topic: str
    reason: str
    payload: bytes


class Batch(msgspec.Struct, frozen=True):
    """What is committed together."""

    received: float
    """Seconds since 1970."""
    messages: Sequence[Checked] = ()
    poison: Sequence[Quarantined] = ()


class Device(msgspec.Struct, frozen=True):
    """A device as its last status and its last sign of life show it."""

    device: str
    site: str
    seen: float
    """When a message of it last arrived, within ten seconds; since 1970 by the collector's clock."""
    told: float
    """When its status arrived; 0 if it never told one."""
    status: Status


class Store(Closing):
    """A fleet's messages. Several stores, of several processes, may share a database; one object serves one thread.

    `url` is SQLAlchemy's, e.g. `sqlite:///fleet.db`. Raises `StoreError` if it cannot be opened.
    """

    def __init__(self, url: str) -> None:
        self._engine = open_engine(url)
        self._noted: dict[str, float] = {}
        """Device -> when it was last noted that it was heard of."""
        try:
            self._prepare(shown(url))
        except BaseException as error:
            self.close()
            if isinstance(error, SQLAlchemyError):
                raise StoreError(f"store {shown(url)}: {first_line(error)}; see that it can be written") from None
            raise
        self._add = self._adding()

    def close(self) -> None:
        """Close all connections."""
        self._engine.dispose()

    def begin(self) -> AbstractContextManager[Connection]:
        """A connection in a transaction that may write; it commits when it is left."""
        return self._engine.begin()

    def add(self, batch: Batch) -> int:
        """Commit a batch, durably, and return how many of its messages are new.

        Raises `sqlalchemy.exc.OperationalError` where the database cannot write now (full disk, locked): nothing of
        the batch is stored then, and adding it again is right.
        """
        rows = [_row(m, batch.received) for m in batch.messages if not m.is_will]
        new = 0
        with self.begin() as connection:
            if rows:
                new = connection.execute(self._add, rows).rowcount
            if batch.poison:
                connection.execute(quarantine.insert(), [_poison_row(p, batch.received) for p in batch.poison])
            self._tell_devices(connection, batch)
        return new

    def counts(self) -> dict[str, int]:
        """How many messages of each kind are stored, and how much is in quarantine."""
        with self._reading() as connection:
            by_kind = select(messages.c.kind, func.count()).group_by(messages.c.kind)
            counts = {str(kind): int(number) for kind, number in connection.execute(by_kind)}
            counts["quarantine"] = int(connection.execute(select(func.count()).select_from(quarantine)).scalar_one())
        return counts

    def windows(self, device: str | None = None, *, since: float = 0.0) -> Iterator[Window]:
        """Windows told at `since` (seconds since 1970, by the devices' clocks) or later, oldest first.

        Those that were rolled up come before the others, one window for each hour, model, artefact and arm.
        """
        hours = select(rolled.c.payload).where((rolled.c.hour + 1) * 3600 > since).order_by(rolled.c.hour)
        if device is not None:
            hours = hours.where(rolled.c.device == device)
        yield from self._decoded(hours, Window)
        yield from self._decoded(_query("window", device, since), Window)

    def events(self, device: str | None = None, *, since: float = 0.0) -> Iterator[Event]:
        """Hard samples told at `since` (seconds since 1970, by the devices' clocks) or later, oldest first."""
        return self._decoded(_query("event", device, since), Event)

    def devices(self) -> list[Device]:
        """All devices that were ever heard of, by name."""
        with self._reading() as connection:
            rows = connection.execute(select(devices).order_by(devices.c.device)).mappings().all()
        return [
            Device(r["device"], r["site"], r["seen"], r["told"], msgspec.json.decode(r["status"], type=Status))
            for r in rows
        ]

    def poison(self, *, limit: int = 100) -> list[Quarantined]:
        """The latest in quarantine; of a payload only the first bytes were kept."""
        c = quarantine.c
        wanted = select(c.topic, c.reason, c.payload).order_by(c.id.desc()).limit(limit)
        with self._reading() as connection:
            return [Quarantined(str(t), str(r), str(p).encode()) for t, r, p in connection.execute(wanted)]

    def sequences(self, device: str, spool: str) -> list[int]:
        """The sequence numbers of a spool that are stored (not those rolled up or deleted), in order."""
        c = messages.c
        wanted = select(c.sequence).where(c.device == device, c.spool == spool).order_by(c.sequence)
        with self._reading() as connection:
            return [int(number) for (number,) in connection.execute(wanted)]

    def _reading(self) -> Connection:
        return self._engine.connect().execution_options(**{READING: True})

    def _decoded(self, query: Any, kind: type[_Message]) -> Iterator[_Message]:
        with self._reading() as connection:
            for (payload,) in connection.execution_options(yield_per=_PAGE).execute(query):
                yield msgspec.json.decode(payload, type=kind)

    def _prepare(self, name: str) -> None:
        with self.begin() as connection:
            there = set(inspect(connection).get_table_names())
            if version.name not in there:
                if there & set(metadata.tables):
                    raise StoreError(f"store {name}: it holds tables of another program; give another place")
                metadata.create_all(connection)
                connection.execute(version.insert(), {"version": VERSION})
            found = connection.execute(select(func.max(version.c.version))).scalar_one()
            if found != VERSION:
                raise StoreError(f"store {name}: version {found}; this Eyas reads {VERSION}: use the one that wrote it")

    def _adding(self) -> Any:
        """Insert unless it is there, or was there once."""
        values = select(*(bindparam(c.name, type_=c.type) for c in messages.columns)).where(
            ~exists(literal_column("1"))
            .where(gone.c.device == bindparam("device"))
            .where(gone.c.spool == bindparam("spool"))
            .where(gone.c.first <= bindparam("sequence"))
            .where(gone.c.last >= bindparam("sequence"))
        )
        names = [column.name for column in messages.columns]
        return insert_into(self._engine, messages).from_select(names, values).on_conflict_do_nothing()

    def _tell_devices(self, connection: Connection, batch: Batch) -> None:
        """Note who was heard of, now and then, and every newer status."""
        heard = {m.address.device: m.address.site for m in batch.messages if not m.is_will}
        due = [name for name in heard if batch.received - self._noted.get(name, 0.0) >= _SEEN_S]
        if due:
            insert = insert_into(self._engine, devices)
            upsert = insert.on_conflict_do_update(
                index_elements=["device"], set_={"seen": insert.excluded.seen, "site": insert.excluded.site}
            )
            unknown = {"seen": batch.received, "told": 0.0, "spool": "", "sequence": -1, "status": '{"state":"online"}'}
            connection.execute(upsert, [unknown | {"device": name, "site": heard[name]} for name in due])
            self._noted.update(dict.fromkeys(due, batch.received))
        for message in batch.messages:
            if message.kind == "status":
                self._tell_status(connection, message, batch.received)

    def _tell_status(self, connection: Connection, message: Checked, received: float) -> None:
        a, insert = message.address, insert_into(self._engine, devices)
        row = {"device": a.device, "site": a.site, "seen": received, "told": received, "status": message.payload}
        if message.is_will:  # it says nothing of its place among the device's own
            newer, change = None, {"told": received, "status": message.payload}
        else:
            newer = or_(devices.c.spool != a.spool, devices.c.sequence < a.sequence)
            change = row | {"spool": a.spool, "sequence": a.sequence}
        upsert = insert.on_conflict_do_update(index_elements=["device"], set_=change, where=newer)
        connection.execute(upsert, row | {"spool": a.spool, "sequence": a.sequence})


def _query(kind: str, device: str | None, since: float) -> Any:
    c = messages.c
    wanted = select(c.payload).where(c.kind == kind, c.time >= since).order_by(c.time)
    return wanted if device is None else wanted.where(c.device == device)


def _row(checked: Checked, received: float) -> dict[str, object]:
    a = checked.address
    return {
        "device": a.device,
        "spool": a.spool,
        "sequence": a.sequence,
        "kind": checked.kind,
        "site": a.site,
        "time": checked.message.time,
        "received": received,
        "model": getattr(checked.message, "model", ""),
        "payload": checked.payload,
    }


def _poison_row(poison: Quarantined, received: float) -> dict[str, object]:
    return {
        "received": received,
        "topic": _safe(poison.topic.encode("utf-8", "replace")[:1024]),
        "reason": _safe(poison.reason.encode("utf-8", "replace")[:1024]),
        "size": len(poison.payload),
        "payload": _safe(poison.payload[:KEPT_POISON]),
    }


def _safe(data: bytes) -> str:
    """Text that every database takes: what is not UTF-8, and NUL, is escaped."""
    return data.decode("utf-8", "backslashreplace").replace("\x00", "\\x00")
