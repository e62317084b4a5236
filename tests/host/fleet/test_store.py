"""The store: what is in it is there once, and stays."""

from __future__ import annotations

import random
import sqlite3
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import create_engine, text
from sqlalchemy import event as event_api
from sqlalchemy.exc import DBAPIError, OperationalError

from eyas_device.telemetry.messages import Status, Window, encode
from eyas_host.fleet.store.database import Batch, QuarantinedMessage, Store, StoreError
from eyas_host.fleet.store.ranges import as_ranges, union
from eyas_host.fleet.store.retention import Retention, expire
from eyas_host.fleet.store.tables import VERSION
from eyas_host.fleet.store.validate import ValidMessage, validate
from tests.support.fleet_parts import event, window
from tests.support.postgres import PostgresServer

SPOOL = str(uuid.UUID(int=7))
NOW = 1_800_000_000.0
DAY = 86400.0


def validated(message: object, kind: str = "window", device: str = "cam-1") -> ValidMessage:
    verdict = validate(f"eyas/s/{device}/{kind}", encode(message))  # type: ignore[arg-type]
    assert isinstance(verdict, ValidMessage), verdict
    return verdict


def windows(numbers: range, device: str = "cam-1", **more: object) -> list[ValidMessage]:
    return [validated(window(device, SPOOL, n, **more), device=device) for n in numbers]


def rows(url: str, statement: str) -> list[tuple[Any, ...]]:
    """Run a statement on a database, past the store."""
    engine = create_engine(url)
    with engine.begin() as connection:
        result = connection.execute(text(statement))
        found = [tuple(row) for row in result] if result.returns_rows else []
    engine.dispose()
    return found


def test_duplicates_are_stored_once(url: str) -> None:
    with Store(url) as store:
        assert store.add(Batch(NOW, windows(range(10)))) == 10
        assert store.add(Batch(NOW, windows(range(5, 15)))) == 5
        assert store.add(Batch(NOW, windows(range(3)) + windows(range(3)))) == 0
    with Store(url) as again:
        assert [w.sequence for w in again.windows()] == list(range(15))
        assert again.counts() == {"window": 15, "quarantine": 0}
        assert again.sequences("cam-1", SPOOL) == list(range(15))


def test_queries_by_device_kind_and_time(url: str) -> None:
    with Store(url) as store:
        hard = validated(event("cam-1", SPOOL, 50), "event")
        store.add(Batch(NOW, [*windows(range(4)), *windows(range(4), "cam-2"), hard]))
        assert {w.device for w in store.windows()} == {"cam-1", "cam-2"}
        assert [w.sequence for w in store.windows("cam-2", since=1_700_000_002.0)] == [2, 3]
        assert [e.label for e in store.events()] == ["crack"]
        assert list(store.events("cam-2")) == []


def test_unknown_fields_of_a_message_are_stored(url: str) -> None:
    payload = encode(window("cam-1", SPOOL, 1))[:-1] + b',"of_a_newer_agent":[1]}'
    verdict = validate("eyas/s/cam-1/window", payload)
    assert isinstance(verdict, ValidMessage)
    with Store(url) as store:
        store.add(Batch(NOW, [verdict]))
    assert rows(url, "select payload from messages") == [(payload.decode(),)]


def test_status_of_devices(url: str) -> None:
    def status(state: str, sequence: int, spool: str = SPOOL) -> ValidMessage:
        message = Status(device="cam-1", spool=spool, sequence=sequence, state=state, model=f"m {sequence}")  # type: ignore[arg-type]
        return validated(message, "status")

    with Store(url) as store:
        store.add(Batch(NOW, windows(range(1), "cam-0")))
        store.add(Batch(NOW, [status("online", 3)]))
        store.add(Batch(NOW + 1, [status("online", 2)]))
        silent, known = store.devices()
        assert (silent.device, silent.status_received, silent.last_seen) == ("cam-0", 0.0, NOW)
        assert (known.status.state, known.status.model, known.status_received) == ("online", "m 3", NOW), (
            "a late, older status changes nothing"
        )
        store.add(Batch(NOW + 2, [status("lost", -1, "")]))
        assert store.devices()[1].status.state == "lost"
        store.add(Batch(NOW + 3, [status("online", 3)]))
        assert store.devices()[1].status.state == "lost", "a duplicate status changes nothing"
        store.add(Batch(NOW + 4, [status("online", 4)]))
        assert store.devices()[1].status.state == "online"
        store.add(Batch(NOW + 5, [status("offline", 0, str(uuid.UUID(int=8)))]))
        assert store.devices()[1].status.state == "offline", "a new spool counts from 0"
        assert store.counts()["status"] == 4, "last wills are not stored"


def test_quarantine_stores_the_reason_and_the_first_bytes(url: str) -> None:
    with Store(url) as store:
        store.add(Batch(NOW, (), [QuarantinedMessage("eyas/s/d/window", "no window", b"\xff\x00" + b"x" * 100_000)]))
        (kept,) = store.quarantined()
    assert (kept.topic, kept.reason) == ("eyas/s/d/window", "no window")
    assert kept.payload.startswith(b"\\xff\\x00xx")
    assert len(kept.payload) < 20_000


def test_two_stores_share_a_database(url: str) -> None:
    with Store(url) as one, Store(url) as other:
        assert one.add(Batch(NOW, windows(range(5)))) + other.add(Batch(NOW, windows(range(5)))) == 5


def test_a_commit_to_sqlite_is_durable(tmp_path: Path) -> None:
    with Store(f"sqlite:///{tmp_path / 'fleet.db'}") as store, store.begin() as connection:
        facts = [connection.exec_driver_sql(f"PRAGMA {p}").scalar_one() for p in ("journal_mode", "synchronous")]
    assert facts == ["wal", 2], "acknowledged messages must survive a power cut"


@pytest.mark.parametrize(("default", "used"), [("off", "on"), ("remote_apply", "remote_apply")])
def test_a_commit_to_postgresql_is_durable_and_reads_what_is_committed(
    postgres: PostgresServer, default: str, used: str
) -> None:
    url = postgres.create_database()
    database = url.rpartition("/")[2]
    postgres.execute(f"ALTER DATABASE {database} SET synchronous_commit = {default}")
    postgres.execute(f"ALTER DATABASE {database} SET default_transaction_isolation = serializable")
    with Store(url) as store, store.begin() as connection:
        for setting, value in (("synchronous_commit", used), ("transaction_isolation", "read committed")):
            assert connection.exec_driver_sql(f"SHOW {setting}").scalar_one() == value


@pytest.mark.parametrize("encoding", ["LATIN1", "SQL_ASCII"])
def test_a_database_that_cannot_store_every_character_is_refused(postgres: PostgresServer, encoding: str) -> None:
    url = postgres.create_database(f"ENCODING '{encoding}' LOCALE 'C' TEMPLATE template0")
    with pytest.raises(StoreError, match=f"its encoding is {encoding}"):
        Store(url)


def test_a_locked_store_raises_and_stores_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("eyas_host.fleet.store.engine.BUSY_S", 0)
    with Store(f"sqlite:///{tmp_path / 'fleet.db'}") as store:
        blocker = sqlite3.connect(tmp_path / "fleet.db", isolation_level=None)
        blocker.execute("BEGIN IMMEDIATE")
        with pytest.raises(OperationalError, match="locked"):
            store.add(Batch(NOW, windows(range(3))))
        blocker.execute("ROLLBACK")
        assert store.add(Batch(NOW, windows(range(3)))) == 3


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("fleet.db", "URL is needed"),
        ("oracle://x", "only sqlite, postgresql"),
        ("postgresql+pg8000://u@h/d", "reached by psycopg"),
        ("postgresql://eyas@127.0.0.1:1/d", "onnection refused"),
        ("sqlite:////nowhere/at/all/fleet.db", "unable to open"),
    ],
)
def test_a_store_that_cannot_be_opened(url: str, message: str) -> None:
    with pytest.raises(StoreError, match=message):
        Store(url)


def test_other_versions_are_refused(url: str) -> None:
    with Store(url):
        pass
    rows(url, "UPDATE eyas_store SET version = 99")
    with pytest.raises(StoreError, match="version 99"):
        Store(url)


def test_tables_of_another_program_are_refused(url: str) -> None:
    rows(url, "CREATE TABLE messages (x INTEGER)")
    for create in (True, False):
        with pytest.raises(StoreError, match="another program"):
            Store(url, create=create)


def test_a_password_is_not_shown() -> None:
    with pytest.raises(StoreError) as refused:
        Store("postgresql+nodriver://user:secret@host/db")
    assert "secret" not in str(refused.value)


def test_old_windows_are_merged_by_hour_and_not_stored_again(url: str) -> None:
    counts = {"counts": {"crack": 2}, "frames": 2, "latency_bins": {100: 2}}
    old = [validated(window("cam-1", SPOOL, n, time=NOW - 90 * DAY + 60 * n, **counts)) for n in range(120)]
    new = [validated(window("cam-1", SPOOL, 200, time=NOW - 60, **counts))]
    with Store(url) as store:
        store.add(Batch(NOW - 90 * DAY, old))
        store.add(Batch(NOW - 60, new))
        expired = expire(store, Retention(windows_days=30), now=NOW)
        assert (expired.merged, expired.deleted) == (120, 0)
        left = list(store.windows())
        assert [w.merged for w in left if w.sequence != 200] in ([60, 60], [40, 60, 20], [20, 60, 40])
        assert sum(w.frames for w in left) == 242
        assert sum(w.counts["crack"] for w in left) == 242
        assert store.add(Batch(NOW, old)) == 0, "expired messages are not stored again"
        assert expire(store, Retention(windows_days=30), now=NOW).merged == 0
        assert sum(w.frames for w in store.windows()) == 242
        late = [validated(window("cam-1", SPOOL, n, time=NOW - 90 * DAY + 60 * n, **counts)) for n in range(120, 130)]
        store.add(Batch(NOW - 80 * DAY, late))
        expire(store, Retention(windows_days=30), now=NOW)
        assert sum(w.frames for w in store.windows()) == 262, "late windows are merged into the hour"


def test_old_events_and_quarantined_messages_are_deleted(url: str) -> None:
    with Store(url) as store:
        invalid = [QuarantinedMessage("t", "r", b"")]
        hard = [validated(event("cam-1", SPOOL, n), "event") for n in range(3)]
        store.add(Batch(NOW - 400 * DAY, hard, invalid))
        store.add(Batch(NOW, [validated(event("cam-1", SPOOL, 3), "event")], invalid))
        expired = expire(store, Retention(events_days=365, quarantine_days=30), now=NOW)
        assert (expired.deleted, expired.quarantined) == (3, 1)
        assert [e.sequence for e in store.events()] == [3]
        assert store.add(Batch(NOW, hard)) == 0


def test_merged_windows_are_windows(url: str) -> None:
    with Store(url) as store:
        store.add(Batch(1.0, [validated(window("cam-1", SPOOL, n, time=5.0)) for n in range(2)]))
        expire(store, Retention(windows_days=1), now=time.time())
        (merged,) = store.windows()
    assert isinstance(merged, Window)
    assert merged.merged == 2


def test_the_newest_quarantined_messages_are_kept(url: str) -> None:
    with Store(url) as store:
        for number in range(8):
            message = QuarantinedMessage("t", f"reason {number}", b"")
            store.add(Batch(NOW, (), [message]))
            store.add(Batch(NOW, (), [message]))  # again, as after a commit of unknown outcome
        assert store.counts()["quarantine"] == 8
        assert expire(store, Retention(quarantine_max=3), now=NOW).quarantined == 5
        assert [message.reason for message in store.quarantined()] == ["reason 7", "reason 6", "reason 5"]
        assert expire(store, Retention(quarantine_max=3), now=NOW).quarantined == 0


def test_names_as_long_as_messages_may_have_them(url: str) -> None:
    """Unpacked, three names of 256 characters of four bytes are longer than a row of PostgreSQL's indexes may be."""
    rng = random.Random(1)
    name = ["".join(chr(rng.randrange(0x1F300, 0x1F900)) for _ in range(256)) for _ in range(3)]
    long = [
        validated(window("cam-1", SPOOL, n, time=NOW - 90 * DAY, model=name[0], artefact=name[1], arm=name[2]))
        for n in range(3)
    ]
    with Store(url) as store:
        assert store.add(Batch(NOW - 90 * DAY, long)) == 3
        assert expire(store, now=NOW).merged == 3
        (merged,) = store.windows()
        assert (merged.merged, merged.arm) == (3, name[2])


def test_devices_come_in_the_order_of_their_characters(url: str) -> None:
    names = ["B", "a", "a-1", "a.b", "a1", "b", "_"]
    with Store(url) as store:
        store.add(Batch(NOW, [message for name in names for message in windows(range(1), name)]))
        assert [device.device for device in store.devices()] == sorted(names)


def test_a_batch_that_fails_leaves_no_trace(url: str) -> None:
    """Also not in what the store remembers: the device is seen when the batch is added again."""
    with Store(url) as store:
        rows(url, "ALTER TABLE devices RENAME TO away")
        with pytest.raises(DBAPIError):
            store.add(Batch(NOW, windows(range(3))))
        rows(url, "ALTER TABLE away RENAME TO devices")
        assert store.counts() == {"quarantine": 0}
        assert store.add(Batch(NOW + 1, windows(range(3)))) == 3
        assert [device.last_seen for device in store.devices()] == [NOW + 1]


def test_first_starts_at_the_same_time(url: str) -> None:
    """A barrier lets eight stores look for tables, find none, and create them together."""
    barrier = threading.Barrier(8)
    errors: list[BaseException] = []

    def start() -> None:
        try:
            barrier.wait(30)
            with Store(url) as store:
                store.add(Batch(NOW, windows(range(2))))
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=start) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert rows(url, "SELECT version FROM eyas_store") == [(VERSION,)]
    with Store(url) as store:
        assert store.counts() == {"window": 2, "quarantine": 0}


def test_a_first_start_waits_for_one_that_is_writing(tmp_path: Path) -> None:
    """SQLite alone fails at once where the file's mode is to change and another connection is about to write."""
    other = sqlite3.connect(tmp_path / "fleet.db", isolation_level=None, check_same_thread=False)
    other.execute("BEGIN IMMEDIATE")
    ended = threading.Timer(0.5, other.rollback)
    ended.start()
    with Store(f"sqlite:///{tmp_path / 'fleet.db'}") as store:
        assert not other.in_transaction
        assert store.add(Batch(NOW, windows(range(2)))) == 2
    ended.join()
    other.close()


def test_queries_by_time_sort_nothing(url: str) -> None:
    """The indexes give the rows of a query in order, as the database explains it, in a table of two thousand.

    For a few rows PostgreSQL may sort although it need not, as its statistics suggest: the plan is the one without
    sorting, if there is one.
    """

    def latest(store: Store, read: str, device: str | None) -> list[str]:
        return plans(store, lambda: list(getattr(store, read)(device, since=1_700_000_098.0)))

    with Store(url) as store:
        old = [validated(window("cam-1", SPOOL, n, time=1_700_000_098.0 - 3600 * n)) for n in range(1000)]
        store.add(Batch(NOW - 90 * DAY, old))
        expire(store, now=NOW)
        for number in range(20):
            store.add(Batch(NOW, windows(range(100), f"cam-{number}")))
        rows(url, "ANALYZE")
        for read in ("windows", "events"):
            for device in (None, "cam-7"):
                for plan in latest(store, read, device):
                    assert not sorts(plan), plan
        assert "messages_by_device" in latest(store, "windows", "cam-7")[-1], "the windows of all devices are read"
    rows(url, "DROP INDEX messages_by_device")
    rows(url, "DROP INDEX messages_by_time")
    with Store(url) as store:
        assert sorts(latest(store, "windows", "cam-7")[-1]), "a plan that sorts is not recognised"


def sorts(plan: str) -> bool:
    return "SORT" in plan.upper() or "B-TREE" in plan.upper()


def plans(store: Store, action: Callable[[], object]) -> list[str]:
    """How the database executes the statements of an action; PostgreSQL sorts and collects pages only where it must."""
    statements: list[tuple[str, Any]] = []
    engine = store._engine

    def note(c: object, cursor: object, sql: str, values: Any, *_: object) -> None:
        statements.append((sql, values))

    event_api.listen(engine, "before_cursor_execute", note)
    action()
    event_api.remove(engine, "before_cursor_execute", note)
    explain = "EXPLAIN QUERY PLAN " if engine.dialect.name == "sqlite" else "EXPLAIN "
    with engine.connect() as connection:
        if engine.dialect.name == "postgresql":
            connection.exec_driver_sql("SET LOCAL enable_sort = off")
            connection.exec_driver_sql("SET LOCAL enable_bitmapscan = off")
        found = [list(connection.exec_driver_sql(explain + sql, values)) for sql, values in statements]
    return ["\n".join(str(row) for row in plan) for plan in found]


def test_ranges() -> None:
    assert as_ranges([5, 1, 2, 3, 9, 8, 2]) == [(1, 3), (5, 5), (8, 9)]
    assert union([(4, 6), (1, 3), (10, 12), (11, 11)]) == [(1, 6), (10, 12)]
    assert as_ranges([]) == []
