"""Tables of the store."""

from __future__ import annotations

from sqlalchemy import BigInteger, Column, Double, Index, Integer, LargeBinary, MetaData, String, Table, Text

VERSION = 7
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

rollouts = Table(
    "rollouts",
    metadata,
    Column("id", String(128), primary_key=True),
    Column("created", Double, nullable=False),
    Column("status", String(16), nullable=False),
    Column("revision", BigInteger, nullable=False),
    Column("applied", BigInteger, nullable=False),
    Column("payload", Text, nullable=False),
)
"""Each rollout as JSON; `revision` counts its changes, and `applied` is the one that the repository shows."""
rollout_steps = Table(
    "rollout_steps",
    metadata,
    Column("id", BigInteger().with_variant(Integer, "sqlite"), primary_key=True),
    Column("rollout", String(128), nullable=False),
    Column("at", Double, nullable=False),
    Column("actor", Text, nullable=False),
    Column("what", Text, nullable=False),
    Column("why", Text, nullable=False),
    Index("rollout_steps_by_rollout", "rollout", "id"),
)
"""What happened in each rollout, when, by whom and why; rows are only added."""
rollout_engine = Table(
    "rollout_engine",
    metadata,
    Column("name", String(16), primary_key=True),
    Column("owner", String(128), nullable=False),
    Column("until", Double, nullable=False),
)
"""The process that carries rollouts out, until a time, seconds since 1970; another one waits."""

drift_monitor = Table(
    "drift_monitor",
    metadata,
    Column("name", String(16), primary_key=True),
    Column("token", String(36), nullable=False),
    Column("position", Double, nullable=False),
    Column("updated", Double, nullable=False),
)
"""How far the windows were looked at: all that arrived before `position` count. Each update writes another `token`."""
drift_models = Table(
    "drift_models",
    metadata,
    Column("digest", String(64), primary_key=True),
    Column("model", Text, nullable=False),
    Column("labels", Text, nullable=False),
    Column("reference", Text, nullable=False),
    Column("calibration", LargeBinary, nullable=False),
)
"""Models that devices run: the labels that are followed, what the bundle recorded, and what chance does."""
drift_devices = Table(
    "drift_devices",
    metadata,
    Column("device", String(64), primary_key=True),
    Column("site", String(64), nullable=False),
    Column("digest", String(64), nullable=False),
    Column("state", LargeBinary, nullable=False),
    Column("profile", LargeBinary, nullable=False),
)
"""State and profile of each device."""
drift_alarms = Table(
    "drift_alarms",
    metadata,
    Column("id", String(36), primary_key=True),
    Column("device", String(64), nullable=False),
    Column("state", String(16), nullable=False),
    Column("opened", Double, nullable=False),
    Column("payload", Text, nullable=False),
    Index("drift_alarms_by_state", "state", "opened"),
)
"""Alarms as JSON, open and closed ones."""
drift_hours = Table(
    "drift_hours",
    metadata,
    Column("device", String(64), primary_key=True),
    Column("hour", BigInteger, primary_key=True, autoincrement=False),
    Column("digest", String(64), nullable=False),
    Column("payload", LargeBinary, nullable=False),
    Index("drift_hours_by_time", "hour"),
)
"""What each device showed in each hour since 1970: means of its measures, and its highest charts, for plots."""

sample_labels = Table(
    "sample_labels",
    metadata,
    Column("id", BigInteger().with_variant(Integer, "sqlite"), primary_key=True),
    Column("device", String(64), nullable=False),
    Column("spool", String(36), nullable=False),
    Column("sequence", BigInteger, nullable=False),
    Column("label", Text, nullable=False),
    Column("person", Text, nullable=False),
    Column("at", Double, nullable=False),
    Column("seconds", Double, nullable=False),
    Column("guess_shown", Integer, nullable=False),
    Column("source", Text, nullable=False),
    Column("undone", Double, nullable=False),
    Index("sample_labels_by_sample", "device", "spool", "sequence"),
    Index("sample_labels_by_person", "undone", "id"),
)
"""What people said about samples, by the identity of the sample's message; rows are only added, and `undone` at a time,
seconds since 1970. They stay when the message expires."""

MIGRATIONS: dict[int, tuple[tuple[str, str, str], ...]] = {
    2: (
        ("messages", "boot", "VARCHAR(64) NOT NULL DEFAULT ''"),
        ("messages", "uptime", "DOUBLE PRECISION NOT NULL DEFAULT 0"),
        ("messages", "corrected", "INTEGER NOT NULL DEFAULT 0"),
        ("messages", "problem", "TEXT NOT NULL DEFAULT ''"),
        ("eyas_store", "id", "VARCHAR(36) NOT NULL DEFAULT ''"),
    ),
    3: (),
    4: (),
    5: (),
    6: (),
}
"""Version -> table, column and type that the next version added; tables that it added are created where missing."""
