"""The spool: one SQLite file of messages, bounded by bytes and age, that keeps each until the collector stored it.

Durability: a message survives a killed process as soon as `append` returns; a power cut may lose what was appended
within the last `sync_s` seconds, because that is how often the disk is synced (syncs wear out an SD card), if
`maintain` is called when `due_in` asks for it.

Identity: each start takes a block of 2**32 sequences, and the file names the block, synced, before the first one is
used. Whatever happens to the disk after that, no later process uses one of them again. Without a file that can be
written, the spool has a UUID of its own.

Eviction from a full spool, each step counted in the next window: merge the oldest windows pairwise, then strip the
images of the oldest events, then drop the oldest events, then drop whatever is oldest. The oldest messages of each kind
stay as they are: they may have been sent, and merging them would count them twice.
"""

from __future__ import annotations

import sqlite3
import threading
import time
import uuid
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TypeVar

import msgspec

from eyas_device.support.clock import boot_id, is_synchronised, uptime_s
from eyas_device.support.closing import Closing
from eyas_device.telemetry.messages import KINDS, Event, Header, Window, encode
from eyas_device.telemetry.spool.eviction import IN_FLIGHT, MAX_UNDELETED, Eviction, Losses
from eyas_device.telemetry.spool.rows import Held, Rows, is_locked
from eyas_device.telemetry.spool.state import SpoolError, SpoolLimits, SpoolState, Waiting
from eyas_device.telemetry.spool.sync_timer import SyncTimer

__all__ = ["IN_FLIGHT", "Held", "Spool", "SpoolError", "SpoolLimits", "SpoolState", "Waiting"]

FILE = "telemetry.db"
BLOCK = 1 << 32
"""Sequences of one start."""
_MEMORY_BYTES = 4 << 20
_MAX_FORGOTTEN = 100_000
"""Acknowledged messages that a failing disk keeps and that are remembered; others are sent again after a restart."""
_RETRY_S = 5.0
_DAY_S = 86400.0
_QUOTA_DAYS = 8
_KIND_OF = {message: kind for kind, message in KINDS.items()}
_T = TypeVar("_T")


_DEFAULT_LIMITS = SpoolLimits()


class Spool(Closing):
    """The messages of one device, oldest first, in `folder`/telemetry.db, or in memory without a folder.

    Any thread may call any method. None raises for a failing disk: messages then wait in memory, up to 4 MiB. Raises
    `SpoolError` if another process has the file open.
    """

    def __init__(
        self,
        folder: Path | None,
        *,
        device: str,
        limits: SpoolLimits = _DEFAULT_LIMITS,
        clock: Callable[[], float] = uptime_s,
        boot: str | None = None,
    ) -> None:
        self.state = SpoolState.IN_MEMORY
        self.detail = "messages are kept in memory only"
        """Why messages are not on disk, for people."""
        self.appended = 0
        """Messages appended since the start."""
        self.on_append: Callable[[], None] = lambda: None
        """Called after each append, in its thread; must not block."""
        self._left = Waiting()
        self._folder, self._device = folder, device
        self._checkpoint_bytes = max(min(4 << 20, limits.max_bytes // 16), 64 << 10)
        self._max_bytes = max(limits.max_bytes - 2 * self._checkpoint_bytes, 64 << 10)
        self._max_age_s, self._clock = limits.max_days * _DAY_S, clock
        self._syncs = SyncTimer(limits.sync_s, clock)
        self._boot = boot_id() if boot is None else boot
        self._lock = threading.RLock()
        self._losses = Losses()
        self._disk: Rows | None = None
        self._disk_eviction = Eviction(self._losses)
        self._memory: Rows | None = None
        """Messages that wait until there is a disk that works."""
        self._memory_eviction = Eviction(self._losses)
        self._forgotten: set[int] = set()
        """Acknowledged messages on disk that the next commit deletes."""
        self._newest: dict[str, int] = {}
        """Kind -> sequence of the newest message, of this process or of one before."""
        self._id = str(uuid.uuid4())
        self._first = self._next = 0
        self.ids = {self._id}
        """UUIDs that messages of this process may carry."""
        self._age, self._opened = 0.0, clock()
        self._retry_at = self._expired_at = 0.0
        self._closed = False
        if folder is not None:
            self._open(folder, first=True)

    @property
    def id(self) -> str:
        """UUID that new messages carry: created with the file, or with this object while there is none."""
        return self._id

    @property
    def evicted(self) -> dict[str, int]:
        """What was evicted since the start, as in `Window.lost`."""
        return self._losses.since_start

    def append(self, message: Header) -> int:
        """Stamp a message with device, spool, sequence and clocks, keep it, and return its sequence.

        A window also carries the counts of what was evicted since the last one. A status replaces the previous one. A
        closed spool keeps nothing and returns -1.
        """
        kind = _KIND_OF[type(message)]
        with self._lock:
            if self._closed:
                return -1
            spool_id, sequence = self._id, self._next
            losses = {"lost": self._losses.counts} if kind == "window" else {}
            stamped = msgspec.structs.replace(
                message,
                device=self._device,
                spool=spool_id,
                sequence=sequence,
                time=time.time(),
                uptime_s=round(self._clock(), 3),
                boot=self._boot[:8],
                synchronised=is_synchronised(),
                **losses,
            )
            held = Held(sequence, kind, _level(stamped), encode(stamped), self._now())
            if not self._try(lambda disk: self._put_on_disk(disk, held), failed=False):
                if self._id != spool_id:  # the file was damaged: a new spool, a new identity
                    return self.append(message)
                self._put_in_memory(held)
            self._next, self._newest[kind] = sequence + 1, sequence
            self.appended += 1
        self.on_append()
        return sequence

    def has(self, kind: str, *, after: int) -> bool:
        """Whether a message of a kind with a sequence above `after` was ever appended; asks no disk."""
        return after < self._newest.get(kind, -1)

    def pending(self, kind: str, *, after: int = -1, limit: int = IN_FLIGHT) -> list[Held]:
        """Return the oldest waiting messages of a kind with a sequence above `after`."""
        with self._lock:
            if self._closed or not self.has(kind, after=after):
                return []
            found: list[Held] = self._try(
                lambda disk: disk.of(kind, after=after, limit=limit, skip=self._forgotten), failed=[], always=True
            )
            if self._memory is not None:
                found = sorted(found + self._memory.of(kind, after=after, limit=limit), key=lambda h: h.sequence)
            return found[:limit]

    def get(self, sequence: int) -> Held | None:
        """Return one waiting message, None if it is gone."""
        with self._lock:
            if self._closed or sequence in self._forgotten:
                return None
            held: Held | None = self._try(lambda disk: disk.get(sequence), failed=None, always=True)
            return self._memory.get(sequence) if held is None and self._memory is not None else held

    def forget(self, sequences: Iterable[int]) -> None:
        """Delete messages that were acknowledged: on disk with the next commit, within `sync_s`."""
        with self._lock:
            if self._closed:
                return
            on_disk = list(sequences) if self._memory is None else self._memory.delete(sequences)
            self._close_empty_memory()
            if self._disk is None or not on_disk:
                return
            if len(self._forgotten) < _MAX_FORGOTTEN:
                self._forgotten.update(on_disk)
            self._syncs.wrote()
            if len(self._forgotten) >= MAX_UNDELETED:
                self._try(self._delete_forgotten, failed=None)

    def refuse(self, held: Held) -> None:
        """Drop a message that no broker would take, and count it."""
        with self._lock:
            if self._closed:
                return
            self.forget([held.sequence])
            self._count(held.kind, 1)

    def waiting(self) -> Waiting:
        """Count the messages that wait; after `close`, those that it left behind."""
        with self._lock:
            if self._closed:
                return self._left
            on_disk = self._try(lambda disk: disk.count(), failed=0, always=True) - len(self._forgotten)
            return Waiting(max(on_disk, 0), 0 if self._memory is None else self._memory.count())

    def due_in(self) -> float:
        """Seconds until `maintain` is to be called, at most a second."""
        with self._lock:
            return self._syncs.due_in()

    def maintain(self) -> None:
        """Do what is due: sync, drop what is too old, retry a disk that failed. It may wait for the disk."""
        now = self._clock()
        with self._lock:
            if self._closed:
                return
            if now - self._expired_at >= 60.0:
                self._expired_at = now
                self._expire()
            if now >= self._retry_at and self.state.is_fault:
                self._retry()
            due = self._syncs.waiting and not self._syncs.due_in()
            if due:
                self._try(self._delete_forgotten, failed=None)
        if due:
            self.sync()

    def sync(self) -> None:
        """Sync the disk now: what was appended survives a power cut."""
        with self._lock:
            disk = self._disk
            self._syncs.begin()
        try:
            if disk is not None:
                disk.sync()
        except OSError as error:
            self._disk_failed(str(error.strerror))
        with self._lock:
            self._syncs.ended()

    def close(self) -> None:
        """Sync and close the file; messages that are only in memory are lost."""
        with self._lock:
            if self._closed:
                return
            self._try(self._write_back, failed=None, always=True)
            self._try(lambda disk: disk.set_meta("clean", 1), failed=None)
            self._left = self.waiting()
            self._closed = True
            for rows in (self._disk, self._memory):
                if rows is not None:
                    rows.close()

    def used(self) -> int:
        """Return the size of the messages in bytes, without the write-ahead log."""
        with self._lock:
            return sum(rows.used() for rows in (self._disk, self._memory) if rows is not None)

    def command_result(self, command_id: str) -> bytes | None:
        """Return the result of a command that was executed before; empty if it is not kept any more."""
        with self._lock:
            result: bytes | None = self._try(lambda disk: disk.command_result(command_id), failed=None, always=True)
            if result is None and self._memory is not None and not self._closed:
                return self._memory.command_result(command_id)
            return result

    def remember_result(self, command_id: str, expires: float, result: bytes, *, now: float) -> None:
        """Keep the result of a command until the command expires (times in seconds since 1970)."""

        def write(rows: Rows) -> bool:
            with rows.transaction:
                rows.remember_result(command_id, expires, result, now=now)
            return True

        with self._lock:
            if not self._closed and not self._try(write, failed=False):
                write(self._memory_rows())

    def take_quota(self, day: str, limit: int) -> bool:
        """Use up one of the `limit` images of a UTC day (`2026-01-31`); False if none is left.

        False also if the disk fails: a quota that is not written down would not bind.
        """

        def take(rows: Rows) -> bool:
            used = rows.used_quota(day)
            if used < limit:
                with rows.transaction:
                    rows.set_quota(day, used + 1, days=_QUOTA_DAYS)
            return used < limit

        with self._lock:
            if self._folder is None and not self._closed:
                return take(self._memory_rows())
            return self._try(take, failed=False)

    # Opening

    def _open(self, folder: Path, *, first: bool = False) -> None:
        """Open the file, or replace one that is damaged, and use it; without success it is tried again."""
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            try:
                self._use(Rows(folder / FILE))
            except sqlite3.OperationalError:
                raise
            except sqlite3.DatabaseError:
                self._replace_damaged(folder)
        except (OSError, sqlite3.DatabaseError) as error:
            if isinstance(error, sqlite3.Error) and is_locked(error):
                reason = f"{folder / FILE}: another process holds it; is the agent running already?"
                if first:
                    raise SpoolError(reason) from None
            else:
                reason = f"{folder} cannot be used ({getattr(error, 'strerror', None) or error})"
            self._fault(SpoolState.UNUSABLE, f"{reason}: messages are kept in memory only, and it is tried again")

    def _use(self, disk: Rows) -> None:
        """Take a block of sequences in an open file, and keep messages there from now on.

        Raises `OSError` or `sqlite3.DatabaseError`, and closes the file.
        """
        try:
            spool_id = str(disk.meta("spool", "")) or str(uuid.uuid4())
            if not _is_uuid(spool_id):
                raise sqlite3.DatabaseError("damaged")
            block = max(int(disk.meta("block", 0)), self._next // BLOCK) + 1
            was_cut = not disk.meta("clean", 1) and disk.meta("boot", "") != self._boot
            newest = {kind: max(self._newest.get(kind, -1), disk.newest(kind)) for kind in KINDS}
            newest_at = disk.newest_at()
            with disk.transaction:
                for key, value in (("spool", spool_id), ("block", block), ("boot", self._boot), ("clean", 0)):
                    disk.set_meta(key, value)
            disk.sync()
            disk.sync_folder()
            if was_cut and not disk.is_sound():
                raise sqlite3.DatabaseError("damaged")
        except BaseException:
            disk.close()
            raise
        if self._memory is not None:
            self._memory.shift(newest_at - self._now())
        self._age, self._opened, self._newest = newest_at, self._clock(), newest
        self._id, self._first, self._next = spool_id, block * BLOCK, block * BLOCK
        self.ids.add(spool_id)
        self._losses.take_over(disk)
        self._disk, self._disk_eviction = disk, Eviction(self._losses)
        self.state, self.detail = SpoolState.ON_DISK, ""
        self._try(self._write_back, failed=None)

    def _replace_damaged(self, folder: Path) -> None:
        """Move the damaged file aside (only the last one is kept) and use a new one."""
        for old in folder.glob(f"{FILE}.corrupt-*"):
            old.unlink()
        stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
        (folder / FILE).rename(folder / f"{FILE}.corrupt-{stamp}")
        for ending in ("-wal", "-shm", "-journal"):
            (folder / f"{FILE}{ending}").unlink(missing_ok=True)
        self._count("corrupt", 1)
        self._use(Rows(folder / FILE))

    # Failing disks

    def _try(self, work: Callable[[Rows], _T], *, failed: _T, always: bool = False) -> _T:
        """Return `work(disk)`, or `failed` if there is no disk or it fails. A damaged file is replaced by a new one.

        While the disk is known to fail, nothing is tried until the next retry, unless `always`.
        """
        disk = self._disk
        if self._closed or disk is None:
            return failed
        if self.state is SpoolState.DISK_FAILED and not always and self._clock() < self._retry_at:
            return failed
        try:
            result = work(disk)
        except (sqlite3.OperationalError, OSError) as error:
            self._disk_failed(str(error))
            return failed
        except sqlite3.DatabaseError:
            self._abandon(disk)
            return failed
        if disk.unreadable:
            unreadable, disk.unreadable = disk.unreadable - self._forgotten, set()
            self._forgotten |= unreadable
            self._count("corrupt", len(unreadable))
        return result

    def _abandon(self, damaged: Rows) -> None:
        """Close a damaged file and go on with a new one, under a new identity."""
        damaged.close()
        self._disk, self._forgotten = None, set()
        self._id, self._first = str(uuid.uuid4()), self._next
        self.ids.add(self._id)
        assert self._folder is not None
        try:
            self._replace_damaged(self._folder)
        except (OSError, sqlite3.DatabaseError) as error:
            self._fault(SpoolState.UNUSABLE, f"{self._folder}: the spool is damaged and cannot be replaced ({error})")

    def _disk_failed(self, why: str) -> None:
        detail = f"{self._folder}: {why}; messages wait in memory, and the disk is tried again"
        self._fault(SpoolState.DISK_FAILED, detail)

    def _fault(self, state: SpoolState, detail: str) -> None:
        self.state, self.detail = state, detail
        if (now := self._clock()) >= self._retry_at:
            self._retry_at = now + _RETRY_S

    def _retry(self) -> None:
        if self._disk is not None:
            self._try(self._write_back, failed=None)
        elif self._folder is not None:
            self._open(self._folder)

    def _memory_rows(self) -> Rows:
        if self._memory is None:
            self._memory, self._memory_eviction = Rows(None), Eviction(self._losses)
        return self._memory

    def _write_back(self, disk: Rows) -> None:
        """Move the messages that waited in memory to the disk, and what else could not be written.

        Messages of an identity that no file has stay in memory until they are acknowledged.
        """
        self._delete_forgotten(disk)
        with disk.transaction:
            Losses.write(disk, self._losses.counts)
            for command_id, expires, result in self._memory.results() if self._memory is not None else ():
                disk.remember_result(command_id, expires, result, now=0.0)
        while self._memory is not None and (waiting := self._memory.every(after=self._first - 1, limit=100)):
            with disk.transaction:
                for held in waiting:
                    disk.put(held)
            self._memory.delete(held.sequence for held in waiting)
            self._disk_eviction.make_room(disk, self._max_bytes)
        self.state, self.detail = SpoolState.ON_DISK, ""
        self._syncs.wrote()
        self._close_empty_memory()

    def _close_empty_memory(self) -> None:
        if self._memory is not None and self.state is SpoolState.ON_DISK and self._memory.oldest() is None:
            self._memory.close()
            self._memory = None

    # Writing

    def _put_on_disk(self, disk: Rows, held: Held) -> bool:
        if self.state is SpoolState.DISK_FAILED:
            self._write_back(disk)
        with disk.transaction:
            disk.delete(self._forgotten)
            disk.put(held)
            if held.kind == "window" and self._losses.counts:
                Losses.write(disk, {})
        self._forgotten.clear()
        if held.kind == "window":
            self._losses.counts = {}
        self._syncs.wrote()
        self._disk_eviction.make_room(disk, self._max_bytes)
        if disk.log_bytes() > self._checkpoint_bytes:
            disk.checkpoint()
        return True

    def _put_in_memory(self, held: Held) -> None:
        memory = self._memory_rows()
        with memory.transaction:
            memory.put(held)
        if held.kind == "window":
            self._losses.counts = {}
        self._memory_eviction.make_room(memory, min(_MEMORY_BYTES, self._max_bytes))

    def _delete_forgotten(self, disk: Rows) -> None:
        if self._forgotten:
            with disk.transaction:
                disk.delete(self._forgotten)
            self._forgotten.clear()

    def _expire(self) -> None:
        before = self._now() - self._max_age_s
        self._try(lambda disk: self._disk_eviction.expire(disk, before), failed=None)
        if self._memory is not None:
            self._memory_eviction.expire(self._memory, before)

    def _count(self, what: str, number: int) -> None:
        self._losses.add({what: number})
        self._try(lambda disk: Losses.write(disk, self._losses.counts), failed=None)

    def _now(self) -> float:
        """Seconds that the spool has been open, over all processes, whatever the wall clock says."""
        return self._age + self._clock() - self._opened


def _level(message: Header) -> int:
    if isinstance(message, Event):
        return int(bool(message.image))
    return message.merged.bit_length() if isinstance(message, Window) else 1


def _is_uuid(value: object) -> bool:
    try:
        return str(uuid.UUID(str(value))) == value
    except ValueError:
        return False
