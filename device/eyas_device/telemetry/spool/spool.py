"""The spool: messages wait here until the collector says that it has them. One SQLite file, bounded by bytes and age.

What survives: everything that `append` returned for outlives a killed process; a power cut may cost what was appended
within the last `sync_s` seconds, because that is how often the disk is synced (an SD card wears out by syncs).

What is given up when the spool is full, each of it counted in the next window: the oldest windows are merged pairwise,
then the oldest events lose their images, then the oldest events go, then whatever is oldest. Of each kind, the
oldest `IN_FLIGHT` messages are not changed: they may have been sent, and merging them would count them twice.
"""

from __future__ import annotations

import os
import sqlite3
import threading
import time
import uuid
from collections.abc import Callable, Iterable
from pathlib import Path

import msgspec

from eyas_device.errors import EyasError
from eyas_device.support.closing import Closing
from eyas_device.telemetry.messages import KINDS, Event, Header, Window, decode, encode
from eyas_device.telemetry.spool.eviction import IN_FLIGHT, Room
from eyas_device.telemetry.spool.rows import Held, Rows

__all__ = ["IN_FLIGHT", "Held", "Spool", "SpoolError"]

FILE = "telemetry.db"
_RESERVE = 4096
_MEMORY_BYTES = 4 << 20
_AGAIN_S = 5.0
_DAY_S = 86400.0
_ORDERS, _QUOTA_DAYS = 1000, 8
_STATES = {kind: name for name, kind in KINDS.items()}
_BOOT = Path("/proc/sys/kernel/random/boot_id")


class SpoolError(EyasError, OSError):
    """The spool belongs to another process."""


def _uptime() -> float:
    """Seconds of a clock that never jumps and goes on while the machine sleeps."""
    return time.clock_gettime(time.CLOCK_BOOTTIME) if hasattr(time, "CLOCK_BOOTTIME") else time.monotonic()


class Spool(Closing):
    """The messages of one device, oldest first, in `folder`/telemetry.db; without a folder only in memory.

    Any thread may call any method; none raises because of the disk: what it does not take waits in memory, up to 4 MB.
    Raises `SpoolError` if another process has the file open.
    """

    _id: str
    _next: int
    _reserved: int
    """Sequences below it may be used; written ahead, so that no power cut makes one be used twice."""
    _written: int
    _durable: int
    """Sequences below it are reserved also after a power cut."""
    _closed: bool

    def __init__(
        self,
        folder: Path | None,
        *,
        device: str,
        most_bytes: int = 64 << 20,
        most_days: float = 30.0,
        sync_s: float = 10.0,
        clock: Callable[[], float] = _uptime,
        boot: str | None = None,
    ) -> None:
        self.fault = ""
        """Why messages are only in memory, for people; empty: they are on disk."""
        self.appended = 0
        """Messages since the start; changes when there is a new one."""
        self._folder, self._device = folder, device
        self._fold_bytes = max(min(4 << 20, most_bytes // 16), 64 << 10)
        self._most_bytes = max(most_bytes - 2 * self._fold_bytes, 64 << 10)
        self._most_s, self._sync_s, self._clock = most_days * _DAY_S, sync_s, clock
        self._boot = _boot_id() if boot is None else boot
        self._lock = threading.RLock()
        self._spare: Rows | None = None
        self._gone: set[int] = set()
        self._again = self._looked = 0.0
        self._dirty: float | None = None
        self._lost: dict[str, int] = {}
        self._started()
        self._rows = self._open()

    @property
    def id(self) -> str:
        """UUID born with the file."""
        return self._id

    def append(self, message: Header) -> int:
        """Stamp a message with device, spool, sequence and time, and keep it; returns its sequence.

        A window also carries what the spool gave up since the last one. A status replaces the one before. A closed
        spool keeps nothing: -1.
        """
        kind = _STATES[type(message)]
        with self._lock:
            if self._closed:
                return -1
            born, sequence = self._id, self._next
            stamped = msgspec.structs.replace(
                message, device=self._device, spool=born, sequence=sequence, time=time.time()
            )
            self._next += 1
            if told := isinstance(stamped, Window):
                stamped = msgspec.structs.replace(stamped, lost=self._lost)
                self._lost = {}
            held = Held(sequence, kind, _level(stamped), encode(stamped), self._now())
            if not self._tried(lambda: self._put(held, told=told)):
                if self._id != born:  # the file was damaged: a new spool, a new identity
                    return self.append(message)
                self._spared(held)
            self.appended += 1
            return sequence

    def pending(self, kind: str, *, after: int = -1, limit: int = IN_FLIGHT) -> list[Held]:
        """The oldest messages of a kind that wait, those with a sequence above `after`."""
        with self._lock:
            found: list[Held] = []

            def read() -> None:
                found.extend(self._rows.of(kind, after=after, limit=limit + len(self._gone)))

            self._tried(read, always=True)
            if self._spare is not None and not self._closed:
                found += self._spare.of(kind, after=after, limit=limit)
            return sorted((h for h in found if h.sequence not in self._gone), key=lambda h: h.sequence)[:limit]

    def get(self, sequence: int) -> Held | None:
        """One message that waits, None if it is not there any more."""
        with self._lock:
            if self._closed or sequence in self._gone:
                return None
            found: list[Held | None] = []
            self._tried(lambda: found.append(self._rows.get(sequence)), always=True)
            if found and found[0] is not None:
                return found[0]
            return None if self._spare is None else self._spare.get(sequence)

    def forget(self, sequences: Iterable[int]) -> None:
        """Drop messages that have arrived."""
        with self._lock:
            if self._closed:
                return
            self._gone |= set(sequences)
            if self._spare is not None:
                self._spare.delete(self._gone)
            self._tried(self._forget_gone)

    def refuse(self, held: Held) -> None:
        """Drop a message that can never arrive, and count it."""
        with self._lock:
            self.forget([held.sequence])
            self._tried(lambda: self._count(held.kind))

    def maintain(self) -> None:
        """What is due: sync what was appended, fold the log, give up what is too old, return to a disk that failed.

        To be called about once a second; may wait for the disk.
        """
        now = self._clock()
        with self._lock:
            due = self._dirty is not None and now - self._dirty >= self._sync_s
            if now - self._looked >= 60.0:
                self._looked = now
                self._tried(lambda: self._room.expire(self._rows, self._now() - self._most_s))
            if (self.fault or self._spare is not None or self._gone) and now >= self._again:
                self._tried(self._take_back)
        if due:
            self.sync()

    def sync(self) -> None:
        """Make what was appended survive a power cut, now."""
        with self._lock:
            rows, written, self._dirty = self._rows, self._written, None
        try:
            rows.sync()
        except OSError as error:
            self._troubled(str(error.strerror))
            return
        self._durable = max(self._durable, written)

    def close(self) -> None:
        """Sync and close the file; what waits only in memory is lost."""
        with self._lock:
            if self._closed:
                return

            def leave() -> None:
                with self._rows.transaction():
                    self._rows.set_meta("next", self._next)
                    self._rows.set_meta("clean", 1)

            self._tried(self._take_back)
            self._tried(leave)
            self._closed = True
            self._rows.close()
            if self._spare is not None:
                self._spare.close()

    def used(self) -> int:
        """Bytes that the messages take, without the write-ahead log."""
        with self._lock:
            return self._rows.used()

    def order(self, number: str) -> bytes | None:
        """The result of an order that was obeyed before."""
        with self._lock:
            found: list[bytes | None] = []
            self._tried(lambda: found.append(self._rows.order(number)), always=True)
            if found and found[0] is not None:
                return found[0]
            return None if self._spare is None or self._closed else self._spare.order(number)

    def set_order(self, number: str, expires: float, result: bytes, *, now: float) -> None:
        """Remember the result of an order until it has expired (times in seconds since 1970)."""
        with self._lock:
            if not self._closed and not self._tried(lambda: self._set_order(self._rows, number, expires, result, now)):
                self._set_order(self._spare_rows(), number, expires, result, now)

    def take_quota(self, day: str, most: int) -> bool:
        """Use up one of the `most` images of a UTC day (`2026-01-31`); False if all were used.

        False also if the disk does not take it: a quota that is forgotten is none.
        """
        with self._lock:
            taken: list[bool] = []

            def take() -> None:
                used = self._rows.used_quota(day)
                if used < most:
                    with self._rows.transaction():
                        self._rows.set_quota(day, used + 1, days=_QUOTA_DAYS)
                taken.append(used < most)

            return self._tried(take) and taken[-1]

    # Opening

    def _started(self) -> None:
        """What is true of a spool that was just born."""
        self._id = str(uuid.uuid4())
        self._next = 0
        self._age = 0.0
        self._reserved = self._written = self._durable = _RESERVE
        self._room = Room(self._count)
        self._opened = self._clock()
        self._closed = False

    def _open(self) -> Rows:
        if self._folder is None:
            self.fault = "messages are kept in memory only"
            return self._settled(Rows(None))
        path = self._folder / FILE
        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            rows = Rows(path)
        except (OSError, sqlite3.OperationalError) as error:
            if "locked" in str(error):
                raise SpoolError(f"{path}: another process holds it; is the agent running already?") from None
            reason = error.strerror if isinstance(error, OSError) else str(error)
            self.fault = f"{self._folder} cannot be used ({reason}): messages are kept in memory only"
            self._most_bytes = min(self._most_bytes, _MEMORY_BYTES)
            return self._settled(Rows(None))
        except sqlite3.DatabaseError:
            return self._reborn()
        try:
            return self._resumed(rows)
        except sqlite3.DatabaseError:
            rows.close()
            return self._reborn()

    def _resumed(self, rows: Rows) -> Rows:
        """Go on where the file ends, or begin if it is new. Raises `sqlite3.DatabaseError` if it is damaged."""
        found = rows.meta("spool", "")
        if not found:
            return self._settled(rows)
        top, self._age = rows.newest()
        self._id = str(uuid.UUID(str(found))) if _is_uuid(found) else str(uuid.uuid4())
        self._next = max(int(rows.meta("next", 0)), top + 1)
        self._reserved = self._written = self._durable = int(rows.meta("reserved", _RESERVE))
        if not rows.meta("clean", 0) and rows.meta("boot", "") != self._boot:
            # The power may have failed: sequences that were used may not have reached the disk, but never more than
            # were reserved. Using one twice would make the collector drop the second message as a duplicate.
            self._next = max(self._next, self._reserved)
            if not rows.is_sound():
                raise sqlite3.DatabaseError("damaged")
        try:
            self._lost = decode(str(rows.meta("lost", "{}")).encode(), _Lost).counts
        except msgspec.DecodeError:
            self._lost = {}
        self._reserved = max(self._reserved, self._next + _RESERVE)
        return self._settled(rows)

    def _settled(self, rows: Rows) -> Rows:
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
            self._troubled(str(error.strerror))
        return rows

    def _reborn(self) -> Rows:
        """Move the damaged file aside (only the last one is kept) and begin a new one."""
        assert self._folder is not None
        self._started()
        self._gone, self._lost = set(), {**self._lost, "corrupt": self._lost.get("corrupt", 0) + 1}
        if self._spare is not None:
            self._spare.close()
            self._spare = None
        try:
            for old in self._folder.glob(f"{FILE}.corrupt-*"):
                old.unlink()
            stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
            (self._folder / FILE).rename(self._folder / f"{FILE}.corrupt-{stamp}")
            for ending in ("-wal", "-shm", "-journal"):
                (self._folder / f"{FILE}{ending}").unlink(missing_ok=True)
            return self._settled(Rows(self._folder / FILE))
        except (OSError, sqlite3.DatabaseError) as error:
            self.fault = (
                f"{self._folder}: the spool is damaged and cannot be begun again ({error}); kept in memory only"
            )
            self._most_bytes = min(self._most_bytes, _MEMORY_BYTES)
            return self._settled(Rows(None))

    # Failing disks

    def _tried(self, work: Callable[[], None], *, always: bool = False) -> bool:
        """Do something with the rows; False if that failed. A damaged file is replaced by a new one."""
        if self._closed or (self.fault and self._rows.path is not None and not always and self._clock() < self._again):
            return False
        try:
            work()
            if self._rows.spoilt:
                spoilt, self._rows.spoilt = self._rows.spoilt, 0
                self._count("corrupt", spoilt)
        except (sqlite3.OperationalError, OSError) as error:
            self._troubled(str(error))
            return False
        except sqlite3.DatabaseError:
            if self._rows.path is not None:
                self._rows.close()
                self._rows = self._reborn()
            return False
        return True

    def _troubled(self, why: str) -> None:
        self.fault = f"{self._folder}: {why}; messages wait in memory, and the disk is tried again"
        self._again = self._clock() + _AGAIN_S

    def _spare_rows(self) -> Rows:
        if self._spare is None:
            self._spare = Rows(None)
        return self._spare

    def _spared(self, held: Held) -> None:
        """Keep a message in memory; above the bound the oldest ones go."""
        spare = self._spare_rows()
        with spare.transaction():
            if held.kind == "status":
                spare.delete_kind("status")
            spare.put(held)
        while spare.used() > min(_MEMORY_BYTES, self._most_bytes) and (oldest := spare.oldest()) is not None:
            spare.delete([oldest[0]])
            self._count(oldest[1])

    def _take_back(self) -> None:
        """Write what waits in memory to the disk that failed."""
        if self._rows.path is None:
            return
        self._forget_gone()
        while self._spare is not None and (waiting := self._spare.every(100)):
            with self._rows.transaction():
                for held in waiting:
                    if held.kind == "status":
                        self._rows.delete_kind("status")
                    self._rows.put(held)
                self._rows.set_meta("lost", self._lost_text())
            self._spare.delete(held.sequence for held in waiting)
            self._room.make(self._rows, self._most_bytes)
        self.fault = ""
        self._dirty = self._clock() if self._dirty is None else self._dirty

    # Writing

    def _put(self, held: Held, *, told: bool) -> None:
        if self._gone:
            self._forget_gone()
        if held.sequence + _RESERVE // 2 > self._reserved:
            self._reserved = held.sequence + _RESERVE
        with self._rows.transaction():
            if held.kind == "status":
                self._rows.delete_kind("status")
            self._rows.put(held)
            if self._reserved > self._durable:
                self._rows.set_meta("reserved", self._reserved)
            if told and self._lost:
                self._rows.set_meta("lost", "{}")
        self._written = self._reserved
        self._dirty = self._clock() if self._dirty is None else self._dirty
        if held.sequence >= self._durable:
            self.sync()
        self._room.make(self._rows, self._most_bytes)
        if self._rows.log_bytes() > self._fold_bytes:
            self._rows.fold()

    def _forget_gone(self) -> None:
        if not self._gone:
            return
        with self._rows.transaction():
            self._rows.delete(self._gone)
            self._rows.set_meta("next", self._next)
        self._gone = set()

    def _set_order(self, rows: Rows, number: str, expires: float, result: bytes, now: float) -> None:
        with rows.transaction():
            rows.set_order(number, expires, result, now=now, most=_ORDERS)

    def _count(self, what: str, number: int = 1) -> None:
        if number:
            self._lost = {**self._lost, what: self._lost.get(what, 0) + number}
            if self._rows.path is None or not self.fault:
                self._rows.set_meta("lost", self._lost_text())

    def _lost_text(self) -> str:
        return encode(_Lost(counts=self._lost)).decode()

    def _now(self) -> float:
        """Seconds that the spool was open, in all processes: neither a wrong clock nor time without power ages it."""
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


def _boot_id() -> str:
    """Names this run of the kernel; another text each time if the system does not tell."""
    try:
        return _BOOT.read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError):
        return str(uuid.uuid4())
