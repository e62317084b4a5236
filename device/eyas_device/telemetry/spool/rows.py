"""One SQLite database of messages that wait: the rows of a spool, on disk or, while the disk fails, in memory.

The write-ahead log is never synced by a commit: each commit has reached the kernel when it returns, so a killed process
loses nothing, and `sync` decides when a power cut would lose nothing either.
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
CREATE TABLE IF NOT EXISTS orders (id TEXT PRIMARY KEY, expires REAL NOT NULL, result BLOB NOT NULL);
CREATE TABLE IF NOT EXISTS quota (day TEXT PRIMARY KEY, used INTEGER NOT NULL) WITHOUT ROWID;
"""
_PACKED_ABOVE = 400
"""Bytes: shorter payloads gain nothing by being compressed."""
_MOST_BYTES = 1 << 20
"""Of a payload, unpacked."""


class Held(msgspec.Struct, frozen=True):
    """A message that waits."""

    sequence: int
    kind: str
    level: int
    """Of a window, the bits of how many it stands for; of an event, 1 while it has its image, else 0."""
    payload: bytes
    """JSON."""
    at: float = 0.0
    """When it was appended, seconds of the spool's own clock."""


class Rows(Closing):
    """A database at `path`, or in memory without one. Used by one thread at a time.

    Raises `sqlite3.OperationalError` where the disk fails or is full, or another process holds the file, and any other
    `sqlite3.DatabaseError` for a file that is damaged or none of ours.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.spoilt = 0
        """Messages that could not be read, and were deleted."""
        if path is not None:
            path.touch(mode=0o600)
        self._db = sqlite3.connect(path or ":memory:", timeout=1.0, isolation_level=None, check_same_thread=False)
        try:
            for pragma in ("locking_mode=EXCLUSIVE", "journal_mode=WAL", "synchronous=NORMAL", "wal_autocheckpoint=0"):
                self._db.execute(f"PRAGMA {pragma}").fetchall()
            for pragma in ("cache_size=-512", "journal_size_limit=65536"):  # the log starts small after each folding
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
        """Fold the log into the file and let go of it; synced."""
        self._db.close()

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """All of its block or nothing."""
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._db.execute("COMMIT")
        except BaseException:
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
            raise

    def is_sound(self) -> bool:
        """Whether every page of the file is as it should be; reads all of it."""
        return self._one("PRAGMA quick_check(1)") == "ok"

    def meta(self, key: str, default: int | str) -> int | str:
        """A value that was set, else `default`; also if the one that was set is of another type."""
        value = self._one("SELECT value FROM meta WHERE key = ?", key)
        return value if isinstance(value, (int, str)) and isinstance(value, type(default)) else default

    def set_meta(self, key: str, value: int | str) -> None:
        """Set a value."""
        self._db.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (key, value))

    def put(self, message: Held) -> None:
        """Insert a message, or replace the one with its sequence."""
        payload = message.payload
        if len(payload) > _PACKED_ABOVE:
            payload = zlib.compress(payload, 1)
        row = (message.sequence, message.kind, message.level, message.at, payload)
        self._db.execute("INSERT OR REPLACE INTO messages VALUES (?, ?, ?, ?, ?)", row)

    def of(self, kind: str, *, after: int, limit: int, level: int | None = None) -> list[Held]:
        """The oldest messages of a kind, and of a level if one is given, whose sequence is above `after`."""
        if level is not None:
            where = "WHERE kind = ? AND level = ? AND sequence > ? ORDER BY sequence LIMIT ?"
            return self._held(where, kind, level, after, limit)
        return self._held("WHERE kind = ? AND sequence > ? ORDER BY sequence LIMIT ?", kind, after, limit)

    def get(self, sequence: int) -> Held | None:
        """One message, None if it is not there any more."""
        return next(iter(self._held("WHERE sequence = ?", sequence)), None)

    def every(self, limit: int) -> list[Held]:
        """The oldest messages of any kind."""
        return self._held("ORDER BY sequence LIMIT ?", limit)

    def oldest(self) -> tuple[int, str, float] | None:
        """Sequence, kind and `at` of the oldest message."""
        row = self._db.execute("SELECT sequence, kind, at FROM messages ORDER BY sequence LIMIT 1").fetchone()
        return None if row is None else (row[0], row[1], row[2])

    def nth(self, kind: str, place: int) -> int | None:
        """The sequence at a place (from 0) among the messages of a kind, oldest first; None if there are fewer."""
        query = "SELECT sequence FROM messages WHERE kind = ? ORDER BY sequence LIMIT 1 OFFSET ?"
        found = self._one(query, kind, place)
        return found if isinstance(found, int) else None

    def levels(self, kind: str, *, after: int) -> dict[int, int]:
        """How many messages of a kind there are of each level, with a sequence above `after`."""
        query = "SELECT level, COUNT(*) FROM messages WHERE kind = ? AND sequence > ? GROUP BY level"
        return dict(self._db.execute(query, (kind, after)).fetchall())

    def newest(self) -> tuple[int, float]:
        """The highest sequence and its `at`; -1 and 0 if there is none."""
        row = self._db.execute("SELECT sequence, at FROM messages ORDER BY sequence DESC LIMIT 1").fetchone()
        return (-1, 0.0) if row is None else (row[0], row[1])

    def delete(self, sequences: Iterable[int]) -> None:
        """Forget messages."""
        self._db.executemany("DELETE FROM messages WHERE sequence = ?", ((sequence,) for sequence in sequences))

    def delete_kind(self, kind: str) -> None:
        """Forget all messages of a kind."""
        self._db.execute("DELETE FROM messages WHERE kind = ?", (kind,))

    def order(self, number: str) -> bytes | None:
        """The result of an order that was obeyed before."""
        found = self._one("SELECT result FROM orders WHERE id = ?", number)
        return found if isinstance(found, bytes) else None

    def set_order(self, number: str, expires: float, result: bytes, *, now: float, most: int) -> None:
        """Remember an order's result; those that have expired, and the first to expire above `most`, are forgotten."""
        self._db.execute("DELETE FROM orders WHERE expires < ?", (now,))
        newest = "SELECT id FROM orders ORDER BY expires DESC LIMIT ?"
        self._db.execute(f"DELETE FROM orders WHERE id NOT IN ({newest})", (most - 1,))
        self._db.execute("INSERT OR REPLACE INTO orders VALUES (?, ?, ?)", (number, expires, result))

    def used_quota(self, day: str) -> int:
        """How much of a day's quota was used."""
        found = self._one("SELECT used FROM quota WHERE day = ?", day)
        return found if isinstance(found, int) else 0

    def set_quota(self, day: str, used: int, *, days: int) -> None:
        """Say how much was used; only the last `days` days are kept."""
        self._db.execute("INSERT OR REPLACE INTO quota VALUES (?, ?)", (day, used))
        last = "SELECT day FROM quota ORDER BY day DESC LIMIT ?"
        self._db.execute(f"DELETE FROM quota WHERE day != ? AND day NOT IN ({last})", (day, days))

    def used(self) -> int:
        """Bytes of the pages that hold something."""
        return (self._number("PRAGMA page_count") - self._number("PRAGMA freelist_count")) * self._page

    def log_bytes(self) -> int:
        """Size of the write-ahead log."""
        try:
            return 0 if self.path is None else Path(f"{self.path}-wal").stat().st_size
        except OSError:
            return 0

    def fold(self) -> None:
        """Write the log back into the file, so that it starts again: three syncs."""
        self._db.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchall()

    def sync(self) -> None:
        """Let the disk have what was committed: one sync. Raises `OSError`. May be called beside other calls."""
        if self.path is None:
            return
        try:
            handle = os.open(f"{self.path}-wal", os.O_RDONLY)
        except FileNotFoundError:
            return  # the log was folded back, synced
        try:
            os.fdatasync(handle)
        finally:
            os.close(handle)

    def _held(self, where: str, *values: object) -> list[Held]:
        found: list[Held] = []
        query = f"SELECT sequence, kind, level, payload, at FROM messages {where}"
        for number, kind, level, payload, at in self._db.execute(query, values).fetchall():
            try:
                found.append(Held(number, kind, level, _unpacked(payload), at))
            except (zlib.error, TypeError):
                self.delete([number])
                self.spoilt += 1
        return found

    def _number(self, query: str) -> int:
        found = self._one(query)
        return found if isinstance(found, int) else 0

    def _one(self, query: str, *values: object) -> object:
        row: tuple[object, ...] | None = self._db.execute(query, values).fetchone()
        return None if row is None else row[0]


def _unpacked(payload: bytes) -> bytes:
    """Raises `zlib.error` or `TypeError` for what was never packed."""
    return payload if payload[:1] == b"{" else zlib.decompressobj().decompress(payload, _MOST_BYTES)
