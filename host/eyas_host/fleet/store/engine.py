"""Open a store's database, SQLite or PostgreSQL, and lock it for writing."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import URL, Connection, Engine, Table, case, create_engine, event, func, select
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError, NoSuchModuleError

from eyas_host.fleet.store.faults import StoreError
from eyas_host.support.extras import install_line

READING = "eyas_reading"
"""Execution option of read-only connections, which take no write lock."""
BUSY_S = 5
"""Max. wait for another writer of the same SQLite file, seconds."""
_LINK = {
    "connect_timeout": 10,
    "keepalives_idle": 10,
    "keepalives_interval": 5,
    "keepalives_count": 3,
    "tcp_user_timeout": 30_000,
}
"""Parameters of libpq, in seconds and milliseconds, by which a server that vanished is noticed within half a minute
instead of hours; a URL may set others."""
_LOCK = 0x65796173
"""Key of the advisory lock of a store's writers: "eyas"."""
_POSTGRESQL = "postgresql+psycopg"


def open_engine(url: str, *, create: bool = True) -> Engine:
    """Create the engine of a URL, without connecting; SQLite files that do not exist are refused without `create`.

    Raises `StoreError` for an invalid URL or a missing driver.
    """
    name = without_password(url)
    try:
        parsed = make_url(url)
        backend = parsed.get_backend_name()
        if backend == "postgresql":
            return _open_postgresql(parsed)
        if backend != "sqlite":
            raise StoreError(f"store {name}: only {', '.join(_INSERTS)} are supported, e.g. sqlite:///fleet.db")
        if not create and not Path(parsed.database or "").is_file():
            raise StoreError(f"store {name}: there is no store; `eyas collect` creates one")
        engine = create_engine(parsed)
    except (ArgumentError, NoSuchModuleError):
        raise StoreError(f"store {name!r}: a URL is needed, e.g. sqlite:///fleet.db") from None
    except ImportError as error:
        raise StoreError(f"store {name}: its driver is not installed ({error.name}): {install_line('fleet')}") from None
    event.listen(engine, "connect", _on_sqlite_connect)
    event.listen(engine, "begin", _on_sqlite_begin)
    return engine


@contextmanager
def writing(engine: Engine, *, exclusive: bool = False) -> Iterator[Connection]:
    """Open a write transaction; leaving it commits durably.

    SQLite has one writer at a time. On PostgreSQL, `exclusive` keeps all other writers of the store out; without it
    they exclude exclusive ones only. What others committed before is visible to each statement in it.
    """
    with engine.begin() as connection:
        if connection.dialect.name == "postgresql":
            lock = func.pg_advisory_xact_lock if exclusive else func.pg_advisory_xact_lock_shared
            current = func.current_setting("synchronous_commit")
            durable = case((current == "off", "on"), else_=current)  # acknowledged messages survive a power cut
            connection.execute(select(lock(_LOCK), func.set_config("synchronous_commit", durable, True)))
        yield connection


def insert_into(engine: Engine, table: Table) -> Any:
    """Create an insert with `on_conflict_do_nothing` and `on_conflict_do_update`, for the engine's dialect."""
    return _INSERTS[engine.dialect.name](table)


def without_password(url: str) -> str:
    """Hide the password of a URL."""
    try:
        return make_url(url).render_as_string(hide_password=True)
    except ArgumentError:
        return url


_INSERTS: dict[str, Any] = {"sqlite": sqlite.insert, "postgresql": postgresql.insert}


def _open_postgresql(url: URL) -> Engine:
    """Engine with psycopg 3; prepared statements are off because poolers in front of a server do not keep them."""
    if url.drivername not in ("postgresql", _POSTGRESQL):
        raise StoreError(f"store {url.render_as_string()}: PostgreSQL is reached by psycopg; write postgresql://…")
    link = {key: value for key, value in _LINK.items() if key not in url.query}
    return create_engine(
        url.set(drivername=_POSTGRESQL),
        pool_pre_ping=True,
        isolation_level="READ COMMITTED",  # whatever the server's default: see `writing`
        connect_args={**link, "client_encoding": "utf8", "prepare_threshold": None},
    )


def _on_sqlite_connect(connection: Any, record: object) -> None:
    # Transactions begin below: the driver's own would take the write lock late, where waiting for it fails.
    connection.isolation_level = None
    cursor = connection.cursor()
    for pragma in (
        f"busy_timeout={BUSY_S * 1000}",
        "synchronous=FULL",  # an acknowledged message survives a power cut
        "wal_autocheckpoint=4000",
        "journal_size_limit=67108864",
    ):
        cursor.execute(f"PRAGMA {pragma}")
    _write_ahead(cursor)
    cursor.close()


def _write_ahead(cursor: Any) -> None:
    """Let readers and a writer of the file work side by side; once set, the file itself keeps it.

    SQLite does not heed `busy_timeout` here while another connection is about to write, so that of several first
    starts at once only one would succeed.
    """
    until = time.monotonic() + BUSY_S
    while True:
        try:
            cursor.execute("PRAGMA journal_mode=WAL")
            return
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > until:
                raise
            time.sleep(0.01)


def _on_sqlite_begin(connection: Any) -> None:
    reading = connection.get_execution_options().get(READING, False)
    connection.exec_driver_sql("BEGIN" if reading else "BEGIN IMMEDIATE")
