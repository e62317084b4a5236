"""SQLite storage of a spool, on disk or in memory.

A commit does not sync the write-ahead log. It has reached the kernel when it returns, so a killed process loses
nothing; only `sync` makes it survive a power cut.
"""

from __future__ import annotations

import os
import sqlite3
import zlib
from collections.abc import Iterable, Set
from pathlib import Path

import msgspec

from eyas_device.support.closing import Closing

SCHEMA = 2
"""Older files are taken over."""
_TABLES = """
CREATE TABLE IF NOT EXISTS meta (key TEXT PRIMARY KEY, value) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS messages (
    sequence INTEGER PRIMARY KEY, kind TEXT NOT NULL, level INTEGER NOT NULL, at REAL NOT NULL, payload BLOB NOT NULL);
DROP INDEX IF EXISTS messages_by_kind;
CREATE INDEX IF NOT EXISTS messages_but_windows ON messages (kind) WHERE kind <> 'window';
CREATE TABLE IF NOT EXISTS results (id TEXT PRIMARY KEY, expires REAL NOT NULL, result BLOB NOT NULL);
CREATE TABLE IF NOT EXISTS quota (day TEXT PRIMARY KEY, used INTEGER NOT NULL) WITHOUT ROWID;
"""
MAX_RESULT_BYTES = 1 << 20
_MAX_RESULTS = 1000
_SQLITE_BUSY = 5
_COMPRESS_ABOVE = 400
"""Bytes; compression gains nothing for shorter payloads."""
_MOST_PAGES = 16
"""Pages that writing a row can add besides its content: each level of the table and of its index may split."""
_UNKNOWN = 1 << 62
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


class _Transaction:
    """A class, because each message pays for it and a generator costs more."""

    def __init__(self, db: sqlite3.Connection) -> None:
        self._db = db

    def __enter__(self) -> None:
        self._db.execute("BEGIN IMMEDIATE")

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        try:
            if kind is None:
                self._db.execute("COMMIT")
        finally:
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")


class Rows(Closing):
    """A database at `path`, or in memory without a path. Used by one thread at a time.

    Methods raise `sqlite3.OperationalError` if the disk fails or is full or another process holds the file, and any
    other `sqlite3.DatabaseError` if the file is damaged or not a spool.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.unreadable: set[int] = set()
        """Sequences of messages that could not be read; the caller deletes them."""
        if path is not None:
            path.touch(mode=0o600)
        self._log: int | None = None
        """Descriptor of the write-ahead log, which exists from the first commit to the end."""
        self._most_used = _UNKNOWN
        """Upper bound of `used`: each write adds what it can add at most. Deleting adds nothing."""
        self._db = sqlite3.connect(path or ":memory:", timeout=1.0, isolation_level=None, check_same_thread=False)
        self.transaction = _Transaction(self._db)
        """Context manager that commits its block as a whole, or rolls it back."""
        try:
            for pragma in ("locking_mode=EXCLUSIVE", "journal_mode=WAL", "synchronous=NORMAL", "wal_autocheckpoint=0"):
                self._db.execute(f"PRAGMA {pragma}").fetchall()
            for pragma in ("cache_size=-512", "journal_size_limit=65536"):  # the log starts small after each checkpoint
                self._db.execute(f"PRAGMA {pragma}").fetchall()
            self._page = self._number("PRAGMA page_size")
            with self.transaction:
                for statement in _TABLES.split(";"):
                    self._db.execute(statement)
                if not 1 <= int(self.meta("schema", SCHEMA)) <= SCHEMA:
                    raise sqlite3.DatabaseError(f"schema {self.meta('schema', SCHEMA)}, not {SCHEMA}")
                self.set_meta("schema", SCHEMA)
        except BaseException:
            self._db.close()
            raise

    def close(self) -> None:
        """Checkpoint the log, sync and close the file."""
        self._db.close()
        if self._log is not None:
            os.close(self._log)
            self._log = None

    def is_sound(self) -> bool:
        """Whether every page of the file is intact; reads the whole file."""
        return self._one("PRAGMA quick_check(1)") == "ok"

    def meta(self, key: str, default: int | str) -> int | str:
        """Return a stored value, or `default` if there is none of that type."""
        value = self._one("SELECT value FROM meta WHERE key = ?", key)
        return value if isinstance(value, (int, str)) and isinstance(value, type(default)) else default

    def set_meta(self, key: str, value: int | str) -> None:
        """Store a value."""
        self._grow(0)
        self._db.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (key, value))

    def put(self, message: Held) -> None:
        """Insert a message, or replace the one with its sequence; a status replaces all others."""
        if message.kind == "status":
            self._db.execute(f"DELETE FROM messages WHERE {_is_kind('status')}", ("status",))
        payload = message.payload
        if len(payload) > _COMPRESS_ABOVE:
            payload = zlib.compress(payload, 1)
        self._grow(len(payload))
        row = (message.sequence, message.kind, message.level, message.at, payload)
        self._db.execute("INSERT OR REPLACE INTO messages VALUES (?, ?, ?, ?, ?)", row)

    def of(
        self, kind: str, *, after: int, limit: int, level: int | None = None, skip: Set[int] = frozenset()
    ) -> list[Held]:
        """Return the oldest messages of a kind (and level) with a sequence above `after` that is not in `skip`."""
        if level is not None:
            where = f"WHERE {_is_kind(kind)} AND level = ? AND sequence > ? ORDER BY sequence"
            return self._held(where, kind, level, after, limit=limit, skip=skip)
        where = f"WHERE {_is_kind(kind)} AND sequence > ? ORDER BY sequence"
        return self._held(where, kind, after, limit=limit, skip=skip)

    def get(self, sequence: int) -> Held | None:
        """Return one message, None if it is gone."""
        return next(iter(self._held("WHERE sequence = ?", sequence)), None)

    def every(self, *, after: int, limit: int) -> list[Held]:
        """Return the oldest messages of any kind with a sequence above `after`."""
        return self._held("WHERE sequence > ? ORDER BY sequence", after, limit=limit)

    def count(self) -> int:
        """Return the number of messages."""
        return self._number("SELECT COUNT(*) FROM messages")

    def oldest(self) -> tuple[int, str, float] | None:
        """Return sequence, kind and `at` of the oldest message."""
        row = self._db.execute("SELECT sequence, kind, at FROM messages ORDER BY sequence LIMIT 1").fetchone()
        return None if row is None else (row[0], row[1], _seconds(row[2]))

    def nth(self, kind: str, index: int) -> int | None:
        """Return the sequence of the message at `index` (from 0) of a kind, oldest first; None if there are fewer."""
        query = f"SELECT sequence FROM messages WHERE {_is_kind(kind)} ORDER BY sequence LIMIT 1 OFFSET ?"
        found = self._one(query, kind, index)
        return found if isinstance(found, int) else None

    def levels(self, kind: str, *, after: int) -> dict[int, int]:
        """Count the messages of a kind with a sequence above `after`: level -> messages."""
        query = "SELECT level, COUNT(*) FROM messages WHERE kind = ? AND sequence > ? GROUP BY level"
        return dict(self._db.execute(query, (kind, after)).fetchall())

    def newest(self, kind: str) -> int:
        """Return the highest sequence of a kind; -1 if there is none."""
        query = f"SELECT sequence FROM messages WHERE {_is_kind(kind)} ORDER BY sequence DESC LIMIT 1"
        found = self._one(query, kind)
        return found if isinstance(found, int) else -1

    def newest_at(self) -> float:
        """Return the `at` of the newest message; 0 without messages."""
        return _seconds(self._one("SELECT at FROM messages ORDER BY sequence DESC LIMIT 1"))

    def shift(self, seconds: float) -> None:
        """Move the `at` of all messages."""
        self._most_used = _UNKNOWN
        self._db.execute("UPDATE messages SET at = at + ?", (seconds,))

    def delete(self, sequences: Iterable[int]) -> list[int]:
        """Delete messages; return the sequences that were not there."""
        query = "DELETE FROM messages WHERE sequence = ?"
        return [sequence for sequence in sequences if not self._db.execute(query, (sequence,)).rowcount]

    def command_result(self, command_id: str) -> bytes | None:
        """Return the result of a command that was executed before."""
        found = self._one("SELECT result FROM results WHERE id = ?", command_id)
        return found if isinstance(found, bytes) else None

    def remember_result(self, command_id: str, expires: float, result: bytes, *, now: float) -> None:
        """Keep a command's result; drop expired ones and, above the limit, those that expire first.

        Above `MAX_RESULT_BYTES` the ids are kept, and the results that expire first are emptied.
        """
        self._grow(len(result))
        self._db.execute("DELETE FROM results WHERE expires < ?", (now,))
        newest = "SELECT id FROM results ORDER BY expires DESC LIMIT ?"
        self._db.execute(f"DELETE FROM results WHERE id NOT IN ({newest})", (_MAX_RESULTS - 1,))
        self._db.execute("INSERT OR REPLACE INTO results VALUES (?, ?, ?)", (command_id, expires, result))
        while self._number("SELECT TOTAL(LENGTH(result)) > ? FROM results", MAX_RESULT_BYTES):
            first = "SELECT id FROM results WHERE LENGTH(result) ORDER BY expires LIMIT 1"
            self._db.execute(f"UPDATE results SET result = x'' WHERE id IN ({first})")

    def results(self) -> list[tuple[str, float, bytes]]:
        """Return id, expiry and result of every command that is remembered."""
        return self._db.execute("SELECT id, expires, result FROM results").fetchall()

    def used_quota(self, day: str) -> int:
        """Return the used quota of a day."""
        found = self._one("SELECT used FROM quota WHERE day = ?", day)
        return found if isinstance(found, int) else 0

    def set_quota(self, day: str, used: int, *, days: int) -> None:
        """Store the used quota of a day; only the last `days` days are kept."""
        self._grow(0)
        self._db.execute("INSERT OR REPLACE INTO quota VALUES (?, ?)", (day, used))
        last = "SELECT day FROM quota ORDER BY day DESC LIMIT ?"
        self._db.execute(f"DELETE FROM quota WHERE day != ? AND day NOT IN ({last})", (day, days))

    def used(self) -> int:
        """Return the size of the used pages in bytes."""
        return (self._number("PRAGMA page_count") - self._number("PRAGMA freelist_count")) * self._page

    def uses_more_than(self, size: int) -> bool:
        """Whether `used` is above `size` bytes; the file is asked only if what was written since may have done it."""
        if self._most_used > size:
            self._most_used = self.used()
        return self._most_used > size

    def log_bytes(self) -> int:
        """Return the size of the write-ahead log."""
        if self.path is None:
            return 0
        try:
            if self._log is None:
                self._log = os.open(f"{self.path}-wal", os.O_RDONLY)
            return os.fstat(self._log).st_size
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

    def sync_folder(self) -> None:
        """Sync the folder, so that a new file is there after a power cut. Raises `OSError`."""
        if self.path is not None:
            handle = os.open(self.path.parent, os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)

    def _grow(self, content: int) -> None:
        self._most_used += content + _MOST_PAGES * self._page

    def _held(self, where: str, *values: object, limit: int = 1, skip: Set[int] = frozenset()) -> list[Held]:
        found: list[Held] = []
        query = f"SELECT sequence, kind, level, payload, at FROM messages {where}"
        for sequence, kind, level, payload, at in self._db.execute(query, values):
            if sequence in skip or sequence in self.unreadable:
                continue
            try:
                found.append(Held(sequence, kind, level, _decompressed(payload), at))
            except (zlib.error, TypeError):
                self.unreadable.add(sequence)
            if len(found) == limit:
                break
        return found

    def _number(self, query: str, *values: object) -> int:
        found = self._one(query, *values)
        return found if isinstance(found, int) else 0

    def _one(self, query: str, *values: object) -> object:
        row: tuple[object, ...] | None = self._db.execute(query, values).fetchone()
        return None if row is None else row[0]


def _is_kind(kind: str) -> str:
    """A condition with the kind as its value.

    Most messages are windows and are found in the order of their sequences: without an index of them an append writes
    one page, not two. The second term lets SQLite use the index of the others.
    """
    return "kind = ?" if kind == "window" else "kind = ? AND kind <> 'window'"


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
