"""Tables of the store, and opening its database."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sqlalchemy import (
    BigInteger,
    Column,
    Double,
    Engine,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    create_engine,
    event,
)
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError, NoSuchModuleError

from eyas_device.errors import EyasError

VERSION = 1
"""Version of the tables; a store of another version is refused."""
READING = "eyas_reading"
"""Execution option of read-only connections, which take no write lock."""
BUSY_S = 5
"""Max. wait for another writer of the same SQLite file, seconds."""

metadata = MetaData()
version = Table("eyas_store", metadata, Column("version", Integer, primary_key=True))
messages = Table(
    "messages",
    metadata,
    Column("device", String(64), primary_key=True),
    Column("spool", String(36), primary_key=True),
    Column("sequence", BigInteger, primary_key=True, autoincrement=False),
    Column("kind", String(16), nullable=False),
    Column("site", String(64), nullable=False),
    Column("time", Double, nullable=False),
    Column("received", Double, nullable=False),
    Column("model", Text, nullable=False),
    Column("payload", Text, nullable=False),
    Index("messages_by_kind", "kind", "received"),
)
"""All messages, as received."""
hourly_windows = Table(
    "hourly_windows",
    metadata,
    Column("device", String(64), primary_key=True),
    Column("site", String(64), primary_key=True),
    Column("hour", BigInteger, primary_key=True, autoincrement=False),
    Column("model", String(256), primary_key=True),
    Column("artefact", String(256), primary_key=True),
    Column("arm", String(256), primary_key=True),
    Column("payload", Text, nullable=False),
)
"""Expired windows, merged by hour."""
expired = Table(
    "expired",
    metadata,
    Column("device", String(64), primary_key=True),
    Column("spool", String(36), primary_key=True),
    Column("first", BigInteger, primary_key=True, autoincrement=False),
    Column("last", BigInteger, nullable=False),
)
"""Ranges of sequence numbers that were merged or deleted, so that they are not stored again."""
quarantine = Table(
    "quarantine",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("received", Double, nullable=False),
    Column("topic", Text, nullable=False),
    Column("reason", Text, nullable=False),
    Column("size", BigInteger, nullable=False),
    Column("payload", Text, nullable=False),
)
"""Invalid messages: the reason, and the first bytes as text with escapes for what is not UTF-8."""
devices = Table(
    "devices",
    metadata,
    Column("device", String(64), primary_key=True),
    Column("site", String(64), nullable=False),
    Column("last_seen", Double, nullable=False),
    Column("status_received", Double, nullable=False),
    Column("spool", String(36), nullable=False),
    Column("sequence", BigInteger, nullable=False),
    Column("status", Text, nullable=False),
)
"""Last status of each device, and when it last sent anything."""


class StoreError(EyasError, RuntimeError):
    """The store cannot be opened: an invalid URL, a missing driver, foreign tables, another version."""


def open_engine(url: str, *, create: bool = True) -> Engine:
    """Create the engine of a URL, without connecting; SQLite files that do not exist are refused without `create`.

    Raises `StoreError` for an invalid URL or a missing driver.
    """
    try:
        parsed = make_url(url)
        if parsed.get_backend_name() not in _INSERTS:
            raise StoreError(
                f"store {without_password(url)}: only {', '.join(_INSERTS)} are supported, e.g. sqlite:///fleet.db"
            )
        if not create and parsed.get_backend_name() == "sqlite" and not Path(parsed.database or "").is_file():
            raise StoreError(f"store {without_password(url)}: there is no store; `eyas collect` creates one")
        engine = create_engine(parsed, pool_pre_ping=parsed.get_backend_name() != "sqlite")
    except (ArgumentError, NoSuchModuleError):
        raise StoreError(f"store {without_password(url)!r}: a URL is needed, e.g. sqlite:///fleet.db") from None
    except ImportError as error:
        raise StoreError(f"store {without_password(url)}: its driver is not installed ({error.name})") from None
    if engine.dialect.name == "sqlite":
        event.listen(engine, "connect", _on_sqlite_connect)
        event.listen(engine, "begin", _on_sqlite_begin)
    return engine


def insert_into(engine: Engine, table: Table) -> Any:
    """Create an insert with `on_conflict_do_nothing` and `on_conflict_do_update`, for the engine's dialect."""
    return _INSERTS[engine.dialect.name](table)


def without_password(url: str) -> str:
    """Hide the password of a URL."""
    try:
        return make_url(url).render_as_string(hide_password=True)
    except ArgumentError:
        return url


def first_line(error: BaseException) -> str:
    """First line of a database error, without the SQL statement and its values."""
    return (str(getattr(error, "orig", None) or error).splitlines() or [type(error).__name__])[0]


_INSERTS: dict[str, Any] = {"sqlite": sqlite.insert, "postgresql": postgresql.insert}


def _on_sqlite_connect(connection: Any, record: object) -> None:
    # Transactions begin below: the driver's own would take the write lock late, where waiting for it fails.
    connection.isolation_level = None
    cursor = connection.cursor()
    for pragma in (
        f"busy_timeout={BUSY_S * 1000}",
        "journal_mode=WAL",
        "synchronous=FULL",  # an acknowledged message survives a power cut
        "wal_autocheckpoint=4000",
        "journal_size_limit=67108864",
    ):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()


def _on_sqlite_begin(connection: Any) -> None:
    reading = connection.get_execution_options().get(READING, False)
    connection.exec_driver_sql("BEGIN" if reading else "BEGIN IMMEDIATE")
