"""Tables of the store."""

from __future__ import annotations

from sqlalchemy import BigInteger, Column, Double, Index, Integer, MetaData, String, Table, Text

VERSION = 3
"""Version of the tables; an older store is brought to it when it is opened, a newer one is refused."""

metadata = MetaData()
version = Table(
    "eyas_store",
    metadata,
    Column("version", Integer, primary_key=True),
    Column("id", String(36), nullable=False, server_default=""),
)
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
    Column("boot", String(64), nullable=False, server_default=""),
    Column("uptime", Double, nullable=False, server_default="0"),
    Column("corrected", Integer, nullable=False, server_default="0"),
    Column("problem", Text, nullable=False, server_default=""),
    Index("messages_by_arrival", "kind", "received"),
    Index("messages_by_time", "kind", "time"),
    Index("messages_by_device", "device", "kind", "time"),
)
"""All messages, as received. `time` is the device's, or, with `corrected` 1, computed by `clocks`; the payload keeps
the device's. `problem` is what of a message of a newer schema could not be read."""
boots = Table(
    "boots",
    metadata,
    Column("device", String(64), primary_key=True),
    Column("boot", String(64), primary_key=True),
    Column("spool", String(36), nullable=False),
    Column("first", BigInteger, nullable=False),
    Column("uptime", Double, nullable=False),
    Column("start", Double, nullable=False),
    Column("exact", Integer, nullable=False),
    Column("written", Double, nullable=False),
    Column("received", Double, nullable=False),
)
"""When each board started, by its boot id: `start` in seconds since 1970, `exact` 1 by its synchronised clock, else
estimated; the lowest sequence number and longest uptime seen, and the start that its messages were `written` with."""
hourly_windows = Table(
    "hourly_windows",
    metadata,
    Column("key", String(64), primary_key=True),
    Column("device", String(64), nullable=False),
    Column("hour", BigInteger, nullable=False),
    Column("payload", Text, nullable=False),
    Index("hourly_windows_by_time", "hour"),
    Index("hourly_windows_by_device", "device", "hour"),
)
"""Expired windows, merged by hour. `key` is a hash: names may be longer than PostgreSQL allows in an index."""
expired = Table(
    "expired",
    metadata,
    Column("device", String(64), primary_key=True),
    Column("spool", String(36), primary_key=True),
    Column("last", BigInteger, primary_key=True, autoincrement=False),
    Column("first", BigInteger, nullable=False),
)
"""Disjoint ranges of sequence numbers that were merged or deleted, so that they are not stored again. The key ends in
`last`: for a new message, beyond all ranges, the index finds at once that there is none."""
quarantine = Table(
    "quarantine",
    metadata,
    Column("id", BigInteger().with_variant(Integer, "sqlite"), primary_key=True),
    Column("key", String(32), nullable=False, unique=True),
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

MIGRATIONS: dict[int, tuple[tuple[str, str, str], ...]] = {
    2: (
        ("messages", "boot", "VARCHAR(64) NOT NULL DEFAULT ''"),
        ("messages", "uptime", "DOUBLE PRECISION NOT NULL DEFAULT 0"),
        ("messages", "corrected", "INTEGER NOT NULL DEFAULT 0"),
        ("messages", "problem", "TEXT NOT NULL DEFAULT ''"),
        ("eyas_store", "id", "VARCHAR(36) NOT NULL DEFAULT ''"),
    ),
}
"""Version -> table, column and type that the next version added; tables that it added are created where missing."""
