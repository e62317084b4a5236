"""SQLite storage of a spool, on disk or in memory.

A commit does not sync the write-ahead log. It has reached the kernel when it returns, so a killed process loses
nothing; only `sync` makes it survive a power cut.
"""

from __future__ import annotations

import os
import sqlite3
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec

from eyas_device.support.closing import Closing

SCHEMA = 1
_TABLES = """
CREATE TABLE IF NOT EXISTS meta (key TEXT PRIMARY KEY, value) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS messages (
    sequence INTEGER PRIMARY KEY, kind TEXT NOT NULL, level INTEGER NOT NULL, at REAL NOT NULL, payload BLOB NOT NULL);
CREATE INDEX IF NOT EXISTS messages_by_kind ON messages (kind);
CREATE TABLE IF NOT EXISTS results (id TEXT PRIMARY KEY, expires REAL NOT NULL, result BLOB NOT NULL);
CREATE TABLE IF NOT EXISTS quota (day TEXT PRIMARY KEY, used INTEGER NOT NULL) WITHOUT ROWID;
"""
_SQLITE_BUSY = 5
_COMPRESS_ABOVE = 400
"""Bytes; compression gains nothing for shorter payloads."""
_MAX_BYTES = 1 << 20
"""Maximum bytes of a decompressed payload."""


class Held(msgspec.Struct, frozen=True):
    """A stored message."""

    sequence: int
    kind: str
    level: int
    """Window: bit length of the number of merged windows. Event: 1 with its image, else 0."""
    payload: bytes
    """JSON."""
    at: float = 0.0
    """Time of the append, seconds of the spool's clock."""


class Rows(Closing):
    """A database at `path`, or in memory without a path. Used by one thread at a time.

    Methods raise `sqlite3.OperationalError` if the disk fails or is full or another process holds the file, and any
    other `sqlite3.DatabaseError` if the file is damaged or not a spool.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.unreadable = 0
        """Messages that could not be read and were deleted."""
        if path is not None:
            path.touch(mode=0o600)
        self._db = sqlite3.connect(path or ":memory:", timeout=1.0, isolation_level=None, check_same_thread=False)
        try:
            for pragma in ("locking_mode=EXCLUSIVE", "journal_mode=WAL", "synchronous=NORMAL", "wal_autocheckpoint=0"):
                self._db.execute(f"PRAGMA {pragma}").fetchall()
            for pragma in ("cache_size=-512", "journal_size_limit=65536"):  # the log starts small after each checkpoint
                self._db.execute(f"PRAGMA {pragma}").fetchall()
            with self.transaction():
                for statement in _TABLES.split(";"):
                    self._db.execute(statement)
                if self.meta("schema", SCHEMA) != SCHEMA:
                    raise sqlite3.DatabaseError(f"schema {self.meta('schema', SCHEMA)}, not {SCHEMA}")
                self.set_meta("schema", SCHEMA)
            self._page = self._number("PRAGMA page_size")
        except BaseException:
            self._db.close()
            raise

    def close(self) -> None:
        """Checkpoint the log, sync and close the file."""
        self._db.close()

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """Commit the block as a whole, or roll it back."""
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._db.execute("COMMIT")
        except BaseException:
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
            raise

    def is_sound(self) -> bool:
        """Whether every page of the file is intact; reads the whole file."""
        return self._one("PRAGMA quick_check(1)") == "ok"

    def meta(self, key: str, default: int | str) -> int | str:
        """Return a stored value, or `default` if there is none of that type."""
        value = self._one("SELECT value FROM meta WHERE key = ?", key)
        return value if isinstance(value, (int, str)) and isinstance(value, type(default)) else default

    def set_meta(self, key: str, value: int | str) -> None:
        """Store a value."""
        self._db.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (key, value))

    def put(self, message: Held) -> None:
        """Insert a message, or replace the one with its sequence."""
        payload = message.payload
        if len(payload) > _COMPRESS_ABOVE:
            payload = zlib.compress(payload, 1)
        row = (message.sequence, message.kind, message.level, message.at, payload)
        self._db.execute("INSERT OR REPLACE INTO messages VALUES (?, ?, ?, ?, ?)", row)

    def of(self, kind: str, *, after: int, limit: int, level: int | None = None) -> list[Held]:
        """Return the oldest messages of a kind (and level) with a sequence above `after`."""
        if level is not None:
            where = "WHERE kind = ? AND level = ? AND sequence > ? ORDER BY sequence LIMIT ?"
            return self._held(where, kind, level, after, limit)
        return self._held("WHERE kind = ? AND sequence > ? ORDER BY sequence LIMIT ?", kind, after, limit)

    def get(self, sequence: int) -> Held | None:
        """Return one message, None if it is gone."""
        return next(iter(self._held("WHERE sequence = ?", sequence)), None)

    def every(self, limit: int) -> list[Held]:
        """Return the oldest messages of any kind."""
        return self._held("ORDER BY sequence LIMIT ?", limit)

    def count(self) -> int:
        """Return the number of messages."""
        return self._number("SELECT COUNT(*) FROM messages")

    def oldest(self) -> tuple[int, str, float] | None:
        """Return sequence, kind and `at` of the oldest message."""
        row = self._db.execute("SELECT sequence, kind, at FROM messages ORDER BY sequence LIMIT 1").fetchone()
        return None if row is None else (row[0], row[1], _seconds(row[2]))

    def nth(self, kind: str, index: int) -> int | None:
        """Return the sequence of the message at `index` (from 0) of a kind, oldest first; None if there are fewer."""
        query = "SELECT sequence FROM messages WHERE kind = ? ORDER BY sequence LIMIT 1 OFFSET ?"
        found = self._one(query, kind, index)
        return found if isinstance(found, int) else None

    def levels(self, kind: str, *, after: int) -> dict[int, int]:
        """Count the messages of a kind with a sequence above `after`: level -> messages."""
        query = "SELECT level, COUNT(*) FROM messages WHERE kind = ? AND sequence > ? GROUP BY level"
        return dict(self._db.execute(query, (kind, after)).fetchall())

    def newest(self) -> tuple[int, float]:
        """Return the highest sequence and its `at`; -1 and 0 without messages."""
        row = self._db.execute("SELECT sequence, at FROM messages ORDER BY sequence DESC LIMIT 1").fetchone()
        return (-1, 0.0) if row is None else (row[0], _seconds(row[1]))

    def delete(self, sequences: Iterable[int]) -> None:
        """Delete messages."""
        self._db.executemany("DELETE FROM messages WHERE sequence = ?", ((sequence,) for sequence in sequences))

    def delete_kind(self, kind: str) -> None:
        """Delete all messages of a kind."""
        self._db.execute("DELETE FROM messages WHERE kind = ?", (kind,))

    def command_result(self, command_id: str) -> bytes | None:
        """Return the result of a command that was executed before."""
        found = self._one("SELECT result FROM results WHERE id = ?", command_id)
        return found if isinstance(found, bytes) else None

    def remember_result(self, command_id: str, expires: float, result: bytes, *, now: float, limit: int) -> None:
        """Keep a command's result; drop expired ones and, above `limit`, those that expire first."""
        self._db.execute("DELETE FROM results WHERE expires < ?", (now,))
        newest = "SELECT id FROM results ORDER BY expires DESC LIMIT ?"
        self._db.execute(f"DELETE FROM results WHERE id NOT IN ({newest})", (limit - 1,))
        self._db.execute("INSERT OR REPLACE INTO results VALUES (?, ?, ?)", (command_id, expires, result))

    def used_quota(self, day: str) -> int:
        """Return the used quota of a day."""
        found = self._one("SELECT used FROM quota WHERE day = ?", day)
        return found if isinstance(found, int) else 0

    def set_quota(self, day: str, used: int, *, days: int) -> None:
        """Store the used quota of a day; only the last `days` days are kept."""
        self._db.execute("INSERT OR REPLACE INTO quota VALUES (?, ?)", (day, used))
        last = "SELECT day FROM quota ORDER BY day DESC LIMIT ?"
        self._db.execute(f"DELETE FROM quota WHERE day != ? AND day NOT IN ({last})", (day, days))

    def used(self) -> int:
        """Return the size of the used pages in bytes."""
        return (self._number("PRAGMA page_count") - self._number("PRAGMA freelist_count")) * self._page

    def log_bytes(self) -> int:
        """Return the size of the write-ahead log."""
        try:
            return 0 if self.path is None else Path(f"{self.path}-wal").stat().st_size
        except OSError:
            return 0

    def checkpoint(self) -> None:
        """Write the log back into the file, so that it starts again: three syncs."""
        self._db.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchall()

    def sync(self) -> None:
        """Sync the commits to disk; thread-safe beside other calls. Raises `OSError`."""
        if self.path is None:
            return
        try:
            handle = os.open(f"{self.path}-wal", os.O_RDONLY)
        except FileNotFoundError:
            return  # the log was checkpointed, which synced it
        try:
            os.fdatasync(handle)
        finally:
            os.close(handle)

    def _held(self, where: str, *values: object) -> list[Held]:
        found: list[Held] = []
        query = f"SELECT sequence, kind, level, payload, at FROM messages {where}"
        for number, kind, level, payload, at in self._db.execute(query, values).fetchall():
            try:
                found.append(Held(number, kind, level, _decompressed(payload), at))
            except (zlib.error, TypeError):
                self.delete([number])
                self.unreadable += 1
        return found

    def _number(self, query: str) -> int:
        found = self._one(query)
        return found if isinstance(found, int) else 0

    def _one(self, query: str, *values: object) -> object:
        row: tuple[object, ...] | None = self._db.execute(query, values).fetchone()
        return None if row is None else row[0]


def is_locked(error: Exception) -> bool:
    """Whether an error means that another process holds the file."""
    code = getattr(error, "sqlite_errorcode", None)  # since Python 3.11
    if code is None:
        return isinstance(error, sqlite3.OperationalError) and str(error) == "database is locked"
    return bool(code & 0xFF == _SQLITE_BUSY)


def _seconds(value: object) -> float:
    """A stored time, 0 for what a damaged file may hold instead."""
    return value if isinstance(value, float) else 0.0


def _decompressed(payload: bytes) -> bytes:
    """Raises `zlib.error` or `TypeError` for bytes that are neither JSON nor compressed."""
    return payload if payload[:1] == b"{" else zlib.decompressobj().decompress(payload, _MAX_BYTES)
