"""Drift in the store: how far the windows were looked at, models, devices, alarms. One transaction an update.

An update is written only if nobody else wrote one since it was read: several collectors of a store may watch it at the
same time, and what one of them computed in vain is dropped.
"""

from __future__ import annotations

import io
import uuid
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import msgspec
import numpy as np
from sqlalchemy import delete, select, update

from eyas_host.fleet.drift.alarms import Alarm
from eyas_host.fleet.drift.fleet_state import Hour
from eyas_host.fleet.drift.measures import MEASURES, SCALARS, Floats
from eyas_host.fleet.store.database import Store
from eyas_host.fleet.store.engine import insert_into
from eyas_host.fleet.store.tables import drift_alarms, drift_devices, drift_hours, drift_models, drift_monitor

_NAME = "windows"
_HOUR = np.dtype("<f4")
_DEVICES = 500
"""Devices in one query."""


class Position(msgspec.Struct, frozen=True):
    """How far the windows were looked at."""

    token: str = ""
    """Names the update that wrote it; empty before the first one."""
    position: float = 0.0
    """All windows that arrived before, seconds since 1970, were looked at."""
    updated: float = 0.0
    """When it was written, seconds since 1970."""


class StoredModel(msgspec.Struct, frozen=True):
    """A model as stored."""

    digest: str
    model: str
    labels: tuple[str, ...]
    calibration: bytes
    reference: str = ""
    """A `ModelReference` as JSON; empty without one. An update leaves it as it is."""


class StoredDevice(msgspec.Struct, frozen=True):
    """A device as stored."""

    device: str
    site: str
    digest: str
    state: bytes
    profile: bytes | None = None
    """None leaves the stored one."""


class Update(msgspec.Struct, frozen=True, kw_only=True):
    """What one update writes."""

    before: Position
    position: float
    now: float
    models: Sequence[StoredModel] = ()
    devices: Sequence[StoredDevice] = ()
    alarms: Sequence[Alarm] = ()
    gone: Sequence[str] = ()
    """Devices to forget."""
    hours: Sequence[Hour] = ()
    """Hours that ended."""


class DriftRecords:
    """What a store knows of drift."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def position(self) -> Position:
        """How far the windows were looked at."""
        c = drift_monitor.c
        with self._store.reading() as connection:
            row = connection.execute(select(c.token, c.position, c.updated).where(c.name == _NAME)).one_or_none()
        return Position() if row is None else Position(str(row[0]), float(row[1]), float(row[2]))

    def load(self) -> tuple[Position, list[StoredModel], list[StoredDevice], list[Alarm]]:
        """Everything that an update goes on from: one consistent state."""
        m, d, a, p = drift_models.c, drift_devices.c, drift_alarms.c, drift_monitor.c
        with self._store.reading() as connection, connection.begin():
            if connection.dialect.name == "postgresql":
                connection.exec_driver_sql("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
            row = connection.execute(select(p.token, p.position, p.updated).where(p.name == _NAME)).one_or_none()
            models = connection.execute(select(m.digest, m.model, m.labels, m.calibration, m.reference)).all()
            devices = connection.execute(select(d.device, d.site, d.digest, d.state, d.profile)).all()
            alarms = connection.execute(select(a.payload).where(a.state != "closed")).scalars().all()
        position = Position() if row is None else Position(str(row[0]), float(row[1]), float(row[2]))
        return (
            position,
            [
                StoredModel(x, name, tuple(msgspec.json.decode(labels)), bytes(data), str(reference))
                for x, name, labels, data, reference in models
            ],
            [StoredDevice(name, site, x, bytes(state), bytes(profile)) for name, site, x, state, profile in devices],
            [msgspec.json.decode(payload, type=Alarm) for payload in alarms],
        )

    def save(self, written: Update) -> Position | None:
        """Write an update; None if another one was written since `written.before`."""
        after = Position(str(uuid.uuid4()), written.position, written.now)
        values = {"token": after.token, "position": after.position, "updated": after.updated}
        c = drift_monitor.c
        with self._store.begin() as connection:
            if written.before.token:
                same = (c.name == _NAME, c.token == written.before.token)
                if connection.execute(update(drift_monitor).where(*same).values(**values)).rowcount != 1:
                    return None
            else:
                first = insert_into(connection.engine, drift_monitor).on_conflict_do_nothing().returning(c.token)
                if not connection.execute(first, {"name": _NAME, **values}).all():
                    return None
            models = [
                {
                    "digest": one.digest,
                    "model": one.model,
                    "labels": msgspec.json.encode(one.labels).decode(),
                    "reference": "",
                    "calibration": one.calibration,
                }
                for one in written.models
            ]
            _upsert(connection, drift_models, "digest", models, ("model", "labels", "calibration"))
            fields = ("device", "site", "digest", "state", "profile")
            rows = [{name: getattr(one, name) for name in fields} for one in written.devices]
            whole = [row for row in rows if row["profile"] is not None]
            partly = [row | {"profile": b""} for row in rows if row["profile"] is None]
            _upsert(connection, drift_devices, "device", whole, fields[1:])
            _upsert(connection, drift_devices, "device", partly, fields[1:-1])
            _upsert(connection, drift_alarms, "id", [_alarm_row(one) for one in written.alarms], ("state", "payload"))
            hours = [_hour_row(one) for one in written.hours]
            _upsert(connection, drift_hours, ("device", "hour"), hours, ("digest", "payload"))
            if written.gone:
                connection.execute(delete(drift_devices).where(drift_devices.c.device.in_(sorted(written.gone))))
        return after

    def set_reference(self, digest: str, model: str, labels: Sequence[str], reference: str) -> None:
        """Store what a bundle recorded; monitors that run read it with their next update."""
        row = {
            "digest": digest,
            "model": model,
            "labels": msgspec.json.encode(labels).decode(),
            "reference": reference,
            "calibration": b"",
        }
        with self._store.begin() as connection:
            _upsert(connection, drift_models, "digest", [row], ("reference",))
            connection.execute(update(drift_monitor).values(token=str(uuid.uuid4())))

    def hours(self, devices: Sequence[str], since: int, until: int) -> list[Hour]:
        """What some devices showed from one hour since 1970 to another one, the earliest first."""
        c = drift_hours.c
        query = select(c.device, c.hour, c.digest, c.payload).where(c.hour >= since, c.hour <= until)
        found = []
        with self._store.reading() as connection:
            for first in range(0, len(devices), _DEVICES):
                some = query.where(c.device.in_(devices[first : first + _DEVICES]))
                for device, hour, digest, payload in connection.execute(some):
                    values = np.frombuffer(payload, _HOUR).astype(np.float64)
                    if values.size == MEASURES + SCALARS + 1:
                        found.append(Hour(device, int(hour), digest, values[:MEASURES], values[MEASURES:]))
        return sorted(found, key=lambda one: (one.hour, one.device))

    def alarms(self, *, closed_since: float | None = None) -> list[Alarm]:
        """Open alarms, and with `closed_since` those that closed after it; the newest first."""
        c = drift_alarms.c
        query = select(c.payload).order_by(c.opened.desc())
        if closed_since is None:
            query = query.where(c.state != "closed")
        with self._store.reading() as connection:
            found = [msgspec.json.decode(one, type=Alarm) for one in connection.execute(query).scalars()]
        return [one for one in found if one.open or closed_since is None or one.closed >= closed_since]


def _upsert(
    connection: Any, table: Any, key: str | Sequence[str], rows: list[dict[str, Any]], changing: Iterable[str]
) -> None:
    if not rows:
        return
    insert = insert_into(connection.engine, table)
    values = {name: getattr(insert.excluded, name) for name in changing}
    keys = [key] if isinstance(key, str) else list(key)
    rows.sort(key=lambda row: [str(row[name]) for name in keys])
    connection.execute(insert.on_conflict_do_update(index_elements=keys, set_=values), rows)


def _alarm_row(alarm: Alarm) -> dict[str, Any]:
    payload = msgspec.json.encode(alarm).decode()
    return {"id": alarm.id, "device": alarm.device, "state": alarm.state, "opened": alarm.opened, "payload": payload}


def _hour_row(one: Hour) -> dict[str, Any]:
    payload = np.concatenate([one.values, one.charts]).astype(_HOUR).tobytes()
    return {"device": one.device, "hour": one.hour, "digest": one.digest, "payload": payload}


def packed(arrays: Mapping[str, Floats]) -> bytes:
    """Arrays as one compressed file."""
    stream = io.BytesIO()
    np.savez_compressed(stream, allow_pickle=False, **arrays)
    return stream.getvalue()


def unpacked(data: bytes) -> dict[str, Floats]:
    """Arrays of `packed`; none if the data are damaged."""
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as found:
            return {name: found[name].astype(np.float64) for name in found.files}
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile):
        return {}
