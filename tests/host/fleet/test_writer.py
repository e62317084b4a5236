"""The collector's writer: what a database error does to the messages in hand."""

from __future__ import annotations

import sqlite3
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import psycopg
import pytest
from psycopg import errors
from sqlalchemy import create_engine, text
from sqlalchemy.exc import DBAPIError, InterfaceError

from eyas_device.telemetry.messages import encode
from eyas_host.fleet.collect import writer as writer_module
from eyas_host.fleet.collect.writer import Committed, Received, Writer
from eyas_host.fleet.store.database import Batch, Store
from eyas_host.fleet.store.faults import StoreError
from tests.support.fleet_parts import wait_until, window
from tests.support.postgres import PostgresServer
from tests.support.small_disk import mounted

SPOOL = str(uuid.UUID(int=7))
RETRIED = {
    "deadlock": errors.DeadlockDetected,
    "serialization": errors.SerializationFailure,
    "full disk": errors.DiskFull,
    "time limit": errors.QueryCanceled,
    "lock": errors.LockNotAvailable,
    "shutdown": errors.AdminShutdown,
    "still starting": errors.CannotConnectNow,
    "too many connections": errors.TooManyConnections,
    "standby": errors.ReadOnlySqlTransaction,
    "damaged index": errors.IndexCorrupted,
    "plan of before": errors.FeatureNotSupported,
}


@pytest.fixture(autouse=True)
def _quick_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer_module, "_RETRY_S", (0.02, 0.1))


def received(numbers: range) -> list[Received]:
    now = time.monotonic()
    return [Received(1, n + 1, "eyas/s/d/window", encode(window("d", SPOOL, n)), now) for n in numbers]


def execute(url: str, *statements: str) -> None:
    """Run statements as an administrator does, past the store."""
    engine = create_engine(url)
    with engine.begin() as connection:
        for statement in statements:
            connection.execute(text(statement))
    engine.dispose()


class FailingStore(Store):
    """A store that raises each of `errors` once, before or after it has written the batch."""

    errors: list[DBAPIError]
    after_commit = False

    def add(self, batch: Batch) -> int:
        new = super().add(batch) if self.errors and self.after_commit else 0
        if self.errors:
            raise self.errors.pop()
        return new + super().add(batch)


def lost_link() -> DBAPIError:
    """As pg8000, and a closed cursor of psycopg2, report that the connection is gone."""
    return InterfaceError("INSERT", {}, Exception("network error"), connection_invalidated=True)


def of_psycopg(kind: type[psycopg.Error]) -> DBAPIError:
    """As SQLAlchemy wraps an error of the server."""
    wrapped = DBAPIError.instance("INSERT", {}, kind("the server's words"), psycopg.Error)
    assert isinstance(wrapped, DBAPIError)
    return wrapped


@pytest.mark.parametrize("after_commit", [False, True])
@pytest.mark.parametrize("case", ["lost link", *RETRIED])
def test_a_database_that_cannot_write_now_quarantines_nothing(tmp_path: Path, case: str, after_commit: bool) -> None:
    done: list[Committed] = []
    poison = [Received(1, 9, "eyas/s/d/window", b"{", time.monotonic())]
    with FailingStore(f"sqlite:///{tmp_path / 'fleet.db'}") as store:
        store.after_commit = after_commit
        store.errors = [lost_link() if case == "lost link" else of_psycopg(RETRIED[case]) for _ in range(4)]
        with Writer(store, done.append) as writer:
            writer.put([*received(range(3)), *poison])
            wait_until(lambda: done, 10, "the commit")
            assert writer.error == ""
        assert store.counts() == {"window": 3, "quarantine": 1}
        assert store.quarantined()[0].payload == b"{"
    assert [one.mids for one in done] == [[1, 2, 3, 9]]


def test_only_the_message_that_the_database_rejects_is_quarantined(url: str) -> None:
    done: list[Committed] = []
    with Store(url) as store:
        if url.startswith("sqlite"):
            rule = "WHEN NEW.sequence = 3 BEGIN SELECT RAISE(ABORT, 'not three'); END"
            execute(url, f"CREATE TRIGGER rule BEFORE INSERT ON messages {rule}")
        else:
            execute(url, 'ALTER TABLE messages ADD CONSTRAINT "not three" CHECK (sequence <> 3)')
        with Writer(store, done.append) as writer:
            writer.put(received(range(6)))
            wait_until(lambda: done, 10, "the commit")
        assert store.counts() == {"window": 5, "quarantine": 1}
        (kept,) = store.quarantined()
        assert "not three" in kept.reason
        assert kept.payload == encode(window("d", SPOOL, 3))
    assert done[0].mids == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("damage", ["DROP TABLE messages", "ALTER TABLE messages RENAME COLUMN payload TO text"])
def test_damaged_tables_end_the_writer_and_acknowledge_nothing(url: str, damage: str) -> None:
    done: list[Committed] = []
    with Store(url) as store, Writer(store, done.append) as writer:
        execute(url, damage)
        writer.put(received(range(3)))
        wait_until(lambda: writer.failure, 10, "the end")
        assert isinstance(writer.failure, StoreError)
        assert store.name in str(writer.failure) and "\n" not in str(writer.failure)
        assert not writer._thread.is_alive() or writer._thread.join(5) is None
    assert done == []


def test_a_removed_status_is_acknowledged_and_stored_nowhere(tmp_path: Path) -> None:
    done: list[Committed] = []
    now = time.monotonic()
    empty = [Received(1, 1, "eyas/s/d/status", b"", now), Received(1, 2, "eyas/s/d/window", b"", now)]
    with Store(f"sqlite:///{tmp_path / 'fleet.db'}") as store, Writer(store, done.append) as writer:
        writer.put(empty)
        wait_until(lambda: done, 10, "the commit")
        assert store.counts() == {"quarantine": 1}, "an empty window is an invalid one"
    assert (done[0].mids, done[0].count) == ([1, 2], 2)


def test_an_unexpected_error_ends_the_writer(tmp_path: Path) -> None:
    class Broken(Store):
        def add(self, batch: Batch) -> int:
            raise ZeroDivisionError

    done: list[Committed] = []
    with Broken(f"sqlite:///{tmp_path / 'fleet.db'}") as store, Writer(store, done.append) as writer:
        writer.put(received(range(3)))
        wait_until(lambda: writer.failure, 10, "the end")
        assert isinstance(writer.failure, ZeroDivisionError)
    assert done == []


Change = Callable[[], None]


@pytest.fixture(params=["full disk", "statement timeout", "read only", "session ended"])
def trouble(
    request: pytest.FixtureRequest, postgres: PostgresServer, tmp_path: Path
) -> Iterator[tuple[str, str, Change, Change]]:
    """URL of a database, words of an error, and what brings and ends it."""
    url = postgres.create_database()
    name = url.rpartition("/")[2]
    if request.param == "full disk":
        with mounted(postgres.folder / f"small-{name}", "size=16m,mode=777") as disk:
            postgres.adopt(disk / "space")
            postgres.execute(f"CREATE TABLESPACE {name} LOCATION '{disk / 'space'}'")
            postgres.execute(f"ALTER DATABASE {name} SET default_tablespace = {name}")
            filler = disk / "filler"

            def fill() -> None:
                with filler.open("wb") as stream, pytest.raises(OSError, match="No space"):
                    while True:
                        stream.write(b"x" * 65536)
                        stream.flush()

            yield url, "No space left", fill, filler.unlink
            postgres.execute(f"DROP DATABASE {name} WITH (FORCE)")
            postgres.execute(f"DROP TABLESPACE {name}")
        return
    blocker = psycopg.connect(url)
    if request.param == "statement timeout":
        postgres.execute(f"ALTER DATABASE {name} SET statement_timeout = '500ms'")

        def release() -> None:
            postgres.execute(f"ALTER DATABASE {name} RESET statement_timeout")
            blocker.rollback()

        yield url, "statement timeout", lambda: blocker.execute("LOCK TABLE messages") and None, release
    elif request.param == "read only":

        def switch(value: str) -> None:
            postgres.execute(f"ALTER DATABASE {name} SET default_transaction_read_only = {value}")
            end_sessions()

        def end_sessions() -> None:
            others = f"datname = '{name}' AND pid <> {blocker.info.backend_pid}"
            postgres.execute(f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE {others}")

        yield url, "read-only transaction", lambda: switch("on"), lambda: switch("off")
    else:
        blocker.execute("CREATE TABLE IF NOT EXISTS dummy (x INT)")
        blocker.rollback()

        def end_while_writing() -> None:
            blocker.execute("LOCK TABLE messages")

        def end() -> None:
            others = f"datname = '{name}' AND pid <> {blocker.info.backend_pid}"
            postgres.execute(f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE {others}")
            blocker.rollback()

        yield url, "", end_while_writing, end
    blocker.close()


def test_postgresql_in_trouble_loses_nothing(trouble: tuple[str, str, Change, Change]) -> None:
    url, words, bring, end = trouble
    done: list[Committed] = []
    with Store(url) as store, Writer(store, done.append) as writer:
        writer.put(received(range(3)))
        wait_until(lambda: len(done) == 1, 10, "the first commit")
        bring()
        for start in range(3, 2003, 500):
            writer.put(received(range(start, start + 500)))
        if words:
            wait_until(lambda: words in writer.error, 15, words)
            assert writer.failure is None
        else:
            time.sleep(0.3)
        before = sum(one.count for one in done)
        assert before < 2003
        end()
        wait_until(lambda: sum(one.count for one in done) == 2003, 20, "the commit")
        assert store.counts() == {"window": 2003, "quarantine": 0}


def test_a_full_sqlite_acknowledges_nothing_and_close_ends_it(tmp_path: Path) -> None:
    class Full(Store):
        def add(self, batch: Batch) -> int:
            cause = sqlite3.OperationalError("database or disk is full")
            cause.sqlite_errorcode = sqlite3.SQLITE_FULL
            raise DBAPIError.instance("insert", {}, cause, sqlite3.Error)

    done: list[Committed] = []
    with Full(f"sqlite:///{tmp_path / 'fleet.db'}") as store, Writer(store, done.append) as writer:
        writer.put(received(range(1)))
        wait_until(lambda: "disk is full" in writer.error)
        assert writer.failure is None
    assert done == []
