"""The spool: one SQLite file of messages, bounded by bytes and age, that keeps each until the collector stored it.

Durability: a message survives a killed process as soon as `append` returns; a power cut may lose what was appended
within the last `sync_s` seconds, because that is how often the disk is synced (syncs wear out an SD card).

Eviction from a full spool, each step counted in the next window: merge the oldest windows pairwise, then strip the
images of the oldest events, then drop the oldest events, then drop whatever is oldest. The oldest `IN_FLIGHT` messages
of each kind stay as they are: they may have been sent, and merging them would count them twice.
"""

from __future__ import annotations

import enum
import os
import sqlite3
import threading
import time
import uuid
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TypeVar

import msgspec

from eyas_device.errors import EyasError
from eyas_device.support.clock import boot_id, uptime_s
from eyas_device.support.closing import Closing
from eyas_device.telemetry.messages import KINDS, Event, Header, Window, decode, encode
from eyas_device.telemetry.spool.eviction import IN_FLIGHT, Eviction
from eyas_device.telemetry.spool.rows import Held, Rows, is_locked

__all__ = ["IN_FLIGHT", "Held", "Spool", "SpoolError", "SpoolLimits", "SpoolState", "Waiting"]

FILE = "telemetry.db"
_RESERVE = 4096
_MEMORY_BYTES = 4 << 20
_RETRY_S = 5.0
_DAY_S = 86400.0
_MAX_RESULTS, _QUOTA_DAYS = 1000, 8
_KIND_OF = {message: kind for kind, message in KINDS.items()}
_T = TypeVar("_T")


class SpoolError(EyasError, OSError):
    """Another process holds the spool."""


class SpoolState(enum.Enum):
    """Where the spool keeps its messages."""

    ON_DISK = "on disk"
    IN_MEMORY = "in memory: no folder is configured"
    UNUSABLE = "in memory: the folder cannot be used"
    DISK_FAILED = "in memory until the disk works again"

    @property
    def is_fault(self) -> bool:
        """Whether somebody has to look at the disk."""
        return self in (SpoolState.UNUSABLE, SpoolState.DISK_FAILED)


class SpoolLimits(msgspec.Struct, frozen=True, kw_only=True):
    """Bounds of a spool in bytes, age and data that a power cut may cost."""

    max_bytes: int = 64 << 20
    max_days: float = 30.0
    """Days of running time after which a message is dropped."""
    sync_s: float = 10.0
    """Longest time between an append and the sync of the disk."""


_DEFAULT_LIMITS = SpoolLimits()


class Waiting(msgspec.Struct, frozen=True):
    """Messages that wait for their acknowledgement."""

    on_disk: int = 0
    in_memory: int = 0
    """They are lost when the process ends."""


class Spool(Closing):
    """The messages of one device, oldest first, in `folder`/telemetry.db, or in memory without a folder.

    Any thread may call any method. None raises for a failing disk: messages then wait in memory, up to 4 MiB. Raises
    `SpoolError` if another process has the file open.
    """

    _id: str
    _next: int
    _reserved: int
    """Sequences below it may be used; written ahead, so that no sequence is used twice after a power cut."""
    _written: int
    _durable: int
    """Sequences below it stay reserved after a power cut."""
    _closed: bool

    def __init__(
        self,
        folder: Path | None,
        *,
        device: str,
        limits: SpoolLimits = _DEFAULT_LIMITS,
        clock: Callable[[], float] = uptime_s,
        boot: str | None = None,
    ) -> None:
        self.state = SpoolState.ON_DISK
        self.detail = ""
        """Why messages are not on disk, for people."""
        self.appended = 0
        """Messages appended since the start."""
        self.evicted: dict[str, int] = {}
        """What was given up since the start, as in `Window.lost`."""
        self._left = Waiting()
        self._folder, self._device = folder, device
        self._checkpoint_bytes = max(min(4 << 20, limits.max_bytes // 16), 64 << 10)
        self._max_bytes = max(limits.max_bytes - 2 * self._checkpoint_bytes, 64 << 10)
        self._max_age_s, self._sync_s, self._clock = limits.max_days * _DAY_S, limits.sync_s, clock
        self._boot = boot_id() if boot is None else boot
        self._lock = threading.RLock()
        self._memory: Rows | None = None
        """Messages that wait until the disk works again."""
        self._forgotten: set[int] = set()
        """Sequences that are still to be deleted."""
        self._retry_at = self._expired_at = 0.0
        self._unsynced_since: float | None = None
        self._lost: dict[str, int] = {}
        self._reset()
        self._rows = self._open()

    @property
    def id(self) -> str:
        """UUID created with the file."""
        return self._id

    def append(self, message: Header) -> int:
        """Stamp a message with device, spool, sequence and time, keep it, and return its sequence.

        A window also carries the counts of what was evicted since the last one. A status replaces the previous one. A
        closed spool keeps nothing and returns -1.
        """
        kind = _KIND_OF[type(message)]
        with self._lock:
            if self._closed:
                return -1
            spool_id, sequence = self._id, self._next
            stamped = msgspec.structs.replace(
                message, device=self._device, spool=spool_id, sequence=sequence, time=time.time()
            )
            self._next += 1
            if carries_losses := isinstance(stamped, Window):
                stamped = msgspec.structs.replace(stamped, lost=self._lost)
                self._lost = {}
            held = Held(sequence, kind, _level(stamped), encode(stamped), self._now())
            if not self._try(lambda: self._put(held, carries_losses=carries_losses), failed=False):
                if self._id != spool_id:  # the file was damaged: a new spool, a new identity
                    return self.append(message)
                self._put_in_memory(held)
            self.appended += 1
            return sequence

    def pending(self, kind: str, *, after: int = -1, limit: int = IN_FLIGHT) -> list[Held]:
        """Return the oldest waiting messages of a kind with a sequence above `after`."""
        with self._lock:
            limit_with_forgotten = limit + len(self._forgotten)
            found: list[Held] = self._try(
                lambda: self._rows.of(kind, after=after, limit=limit_with_forgotten), failed=[], always=True
            )
            if self._memory is not None and not self._closed:
                found += self._memory.of(kind, after=after, limit=limit)
            return sorted((h for h in found if h.sequence not in self._forgotten), key=lambda h: h.sequence)[:limit]

    def get(self, sequence: int) -> Held | None:
        """Return one waiting message, None if it is gone."""
        with self._lock:
            if self._closed or sequence in self._forgotten:
                return None
            held: Held | None = self._try(lambda: self._rows.get(sequence), failed=None, always=True)
            return self._memory.get(sequence) if held is None and self._memory is not None else held

    def forget(self, sequences: Iterable[int]) -> None:
        """Delete messages that were acknowledged."""
        with self._lock:
            if self._closed:
                return
            self._forgotten |= set(sequences)
            if self._memory is not None:
                self._memory.delete(self._forgotten)
            self._try(self._delete_forgotten, failed=None)

    def refuse(self, held: Held) -> None:
        """Drop a message that no broker would take, and count it."""
        with self._lock:
            self.forget([held.sequence])
            self._try(lambda: self._count(held.kind), failed=None)

    def waiting(self) -> Waiting:
        """Count the messages that wait; after `close`, those that it left behind."""
        with self._lock:
            if self._closed:
                return self._left
            rows = self._try(self._rows.count, failed=0, always=True) - len(self._forgotten)
            memory = self._memory.count() if self._memory is not None else 0
            on_disk = self._rows.path is not None
            return Waiting(on_disk=max(rows, 0) * on_disk, in_memory=memory + max(rows, 0) * (not on_disk))

    def maintain(self) -> None:
        """Do what is due: sync, drop what is too old, retry a disk that failed.

        Call it about once a second; it may wait for the disk.
        """
        now = self._clock()
        with self._lock:
            due = self._unsynced_since is not None and now - self._unsynced_since >= self._sync_s
            if now - self._expired_at >= 60.0:
                self._expired_at = now
                self._try(lambda: self._eviction.expire(self._rows, self._now() - self._max_age_s), failed=None)
            waiting = self.state is not SpoolState.ON_DISK or self._memory is not None or self._forgotten
            if waiting and now >= self._retry_at:
                self._try(self._write_back, failed=None)
        if due:
            self.sync()

    def sync(self) -> None:
        """Sync the disk now: what was appended survives a power cut."""
        with self._lock:
            rows, written, self._unsynced_since = self._rows, self._written, None
        try:
            rows.sync()
        except OSError as error:
            self._disk_failed(str(error.strerror))
            return
        self._durable = max(self._durable, written)

    def close(self) -> None:
        """Sync and close the file; messages that are only in memory are lost."""
        with self._lock:
            if self._closed:
                return

            def mark_clean() -> None:
                with self._rows.transaction():
                    self._rows.set_meta("next", self._next)
                    self._rows.set_meta("clean", 1)

            self._try(self._write_back, failed=None)
            self._try(mark_clean, failed=None)
            self._left = self.waiting()
            self._closed = True
            self._rows.close()
            if self._memory is not None:
                self._memory.close()

    def used(self) -> int:
        """Return the size of the messages in bytes, without the write-ahead log."""
        with self._lock:
            return self._rows.used()

    def command_result(self, command_id: str) -> bytes | None:
        """Return the result of a command that was executed before."""
        with self._lock:
            result: bytes | None = self._try(lambda: self._rows.command_result(command_id), failed=None, always=True)
            if result is None and self._memory is not None and not self._closed:
                return self._memory.command_result(command_id)
            return result

    def remember_result(self, command_id: str, expires: float, result: bytes, *, now: float) -> None:
        """Keep the result of a command until the command expires (times in seconds since 1970)."""

        def write(rows: Rows) -> bool:
            with rows.transaction():
                rows.remember_result(command_id, expires, result, now=now, limit=_MAX_RESULTS)
            return True

        with self._lock:
            if not self._closed and not self._try(lambda: write(self._rows), failed=False):
                write(self._memory_rows())

    def take_quota(self, day: str, limit: int) -> bool:
        """Use up one of the `limit` images of a UTC day (`2026-01-31`); False if none is left.

        False also if the disk fails: a quota that is not written down would not bind.
        """

        def take() -> bool:
            used = self._rows.used_quota(day)
            if used < limit:
                with self._rows.transaction():
                    self._rows.set_quota(day, used + 1, days=_QUOTA_DAYS)
            return used < limit

        with self._lock:
            return self._try(take, failed=False)

    # Opening

    def _reset(self) -> None:
        """Set the fields of a new spool: identity, counters and eviction."""
        self._id = str(uuid.uuid4())
        self._next = 0
        self._age = 0.0
        self._reserved = self._written = self._durable = _RESERVE
        self._eviction = Eviction(self._count)
        self._opened = self._clock()
        self._closed = False

    def _open(self) -> Rows:
        if self._folder is None:
            self.state, self.detail = SpoolState.IN_MEMORY, "messages are kept in memory only"
            return self._write_meta(Rows(None))
        path = self._folder / FILE
        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            rows = Rows(path)
        except (OSError, sqlite3.OperationalError) as error:
            if is_locked(error):
                raise SpoolError(f"{path}: another process holds it; is the agent running already?") from None
            reason = error.strerror if isinstance(error, OSError) else str(error)
            return self._unusable(f"{self._folder} cannot be used ({reason}): messages are kept in memory only")
        except sqlite3.DatabaseError:
            return self._replace_damaged()
        try:
            return self._resume(rows)
        except sqlite3.DatabaseError:
            rows.close()
            return self._replace_damaged()

    def _resume(self, rows: Rows) -> Rows:
        """Continue an existing file or initialise a new one. Raises `sqlite3.DatabaseError` if it is damaged."""
        found = rows.meta("spool", "")
        if not found:
            return self._write_meta(rows)
        newest, self._age = rows.newest()
        self._id = str(uuid.UUID(str(found))) if _is_uuid(found) else str(uuid.uuid4())
        self._next = max(int(rows.meta("next", 0)), newest + 1)
        self._reserved = self._written = self._durable = int(rows.meta("reserved", _RESERVE))
        if not rows.meta("clean", 0) and rows.meta("boot", "") != self._boot:
            # After a power cut, used sequences may be missing on disk, but never more than were reserved. Using one
            # twice would make the collector drop the second message as a duplicate.
            self._next = max(self._next, self._reserved)
            if not rows.is_sound():
                raise sqlite3.DatabaseError("damaged")
        try:
            self._lost = decode(str(rows.meta("lost", "{}")).encode(), _Lost).counts
        except msgspec.DecodeError:
            self._lost = {}
        self._reserved = max(self._reserved, self._next + _RESERVE)
        return self._write_meta(rows)

    def _write_meta(self, rows: Rows) -> Rows:
        with rows.transaction():
            for key, value in (("spool", self._id), ("boot", self._boot), ("clean", 0), ("reserved", self._reserved)):
                rows.set_meta(key, value)
            rows.set_meta("next", self._next)
        try:
            rows.sync()
            self._written = self._durable = self._reserved
            if self._folder is not None and rows.path is not None:
                handle = os.open(self._folder, os.O_RDONLY)
                os.fsync(handle)
                os.close(handle)
        except OSError as error:
            self._disk_failed(str(error.strerror))
        return rows

    def _replace_damaged(self) -> Rows:
        """Move the damaged file aside (only the last one is kept) and create a new one."""
        assert self._folder is not None
        self._reset()
        self._forgotten, self._lost = set(), {**self._lost, "corrupt": self._lost.get("corrupt", 0) + 1}
        if self._memory is not None:
            self._memory.close()
            self._memory = None
        try:
            for old in self._folder.glob(f"{FILE}.corrupt-*"):
                old.unlink()
            stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
            (self._folder / FILE).rename(self._folder / f"{FILE}.corrupt-{stamp}")
            for ending in ("-wal", "-shm", "-journal"):
                (self._folder / f"{FILE}{ending}").unlink(missing_ok=True)
            return self._write_meta(Rows(self._folder / FILE))
        except (OSError, sqlite3.DatabaseError) as error:
            return self._unusable(
                f"{self._folder}: the spool is damaged and cannot be replaced ({error}); kept in memory only"
            )

    def _unusable(self, detail: str) -> Rows:
        self.state, self.detail = SpoolState.UNUSABLE, detail
        self._max_bytes = min(self._max_bytes, _MEMORY_BYTES)
        return self._write_meta(Rows(None))

    # Failing disks

    def _try(self, work: Callable[[], _T], *, failed: _T, always: bool = False) -> _T:
        """Return `work()`, or `failed` if the disk fails. A damaged file is replaced by a new one.

        While the disk is known to fail, nothing is tried until the next retry, unless `always`.
        """
        if self._closed or (self._disk_is_failing() and not always and self._clock() < self._retry_at):
            return failed
        try:
            result = work()
            if self._rows.unreadable:
                unreadable, self._rows.unreadable = self._rows.unreadable, 0
                self._count("corrupt", unreadable)
        except (sqlite3.OperationalError, OSError) as error:
            self._disk_failed(str(error))
            return failed
        except sqlite3.DatabaseError:
            if self._rows.path is not None:
                self._rows.close()
                self._rows = self._replace_damaged()
            return failed
        return result

    def _disk_is_failing(self) -> bool:
        return self.state is SpoolState.DISK_FAILED and self._rows.path is not None

    def _disk_failed(self, why: str) -> None:
        self.state = SpoolState.DISK_FAILED
        self.detail = f"{self._folder}: {why}; messages wait in memory, and the disk is tried again"
        self._retry_at = self._clock() + _RETRY_S

    def _memory_rows(self) -> Rows:
        if self._memory is None:
            self._memory = Rows(None)
        return self._memory

    def _put_in_memory(self, held: Held) -> None:
        """Keep a message in memory; above the limit the oldest ones are dropped."""
        memory = self._memory_rows()
        with memory.transaction():
            if held.kind == "status":
                memory.delete_kind("status")
            memory.put(held)
        while memory.used() > min(_MEMORY_BYTES, self._max_bytes) and (oldest := memory.oldest()) is not None:
            memory.delete([oldest[0]])
            self._count(oldest[1])

    def _write_back(self) -> None:
        """Move the messages in memory to the disk that failed."""
        if self._rows.path is None:
            return
        self._delete_forgotten()
        while self._memory is not None and (waiting := self._memory.every(100)):
            with self._rows.transaction():
                for held in waiting:
                    if held.kind == "status":
                        self._rows.delete_kind("status")
                    self._rows.put(held)
                self._rows.set_meta("lost", self._lost_text())
            self._memory.delete(held.sequence for held in waiting)
            self._eviction.make_room(self._rows, self._max_bytes)
        self.state, self.detail = SpoolState.ON_DISK, ""
        self._mark_unsynced()

    # Writing

    def _put(self, held: Held, *, carries_losses: bool) -> bool:
        self._delete_forgotten()
        if held.sequence + _RESERVE // 2 > self._reserved:
            self._reserved = held.sequence + _RESERVE
        with self._rows.transaction():
            if held.kind == "status":
                self._rows.delete_kind("status")
            self._rows.put(held)
            if self._reserved > self._durable:
                self._rows.set_meta("reserved", self._reserved)
            if carries_losses and self._lost:
                self._rows.set_meta("lost", "{}")
        self._written = self._reserved
        self._mark_unsynced()
        if held.sequence >= self._durable:
            self.sync()
        self._eviction.make_room(self._rows, self._max_bytes)
        if self._rows.log_bytes() > self._checkpoint_bytes:
            self._rows.checkpoint()
        return True

    def _mark_unsynced(self) -> None:
        self._unsynced_since = self._clock() if self._unsynced_since is None else self._unsynced_since

    def _delete_forgotten(self) -> None:
        if not self._forgotten:
            return
        with self._rows.transaction():
            self._rows.delete(self._forgotten)
            self._rows.set_meta("next", self._next)
        self._forgotten = set()

    def _count(self, what: str, number: int = 1) -> None:
        if number:
            self.evicted = {**self.evicted, what: self.evicted.get(what, 0) + number}
            self._lost = {**self._lost, what: self._lost.get(what, 0) + number}
            if not self._disk_is_failing():
                self._rows.set_meta("lost", self._lost_text())

    def _lost_text(self) -> str:
        return encode(_Lost(counts=self._lost)).decode()

    def _now(self) -> float:
        """Seconds that the spool has been open, over all processes, whatever the wall clock says."""
        return self._age + self._clock() - self._opened


class _Lost(msgspec.Struct):
    counts: dict[str, int] = {}


def _level(message: Header) -> int:
    if isinstance(message, Event):
        return int(bool(message.image))
    return message.merged.bit_length() if isinstance(message, Window) else 1


def _is_uuid(value: object) -> bool:
    try:
        return bool(uuid.UUID(str(value)))
    except ValueError:
        return False
