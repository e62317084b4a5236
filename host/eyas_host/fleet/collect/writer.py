"""The collector's second thread: checks what arrived and commits it, a batch at a time, for as long as it takes."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence

import msgspec
from sqlalchemy.exc import DataError, IntegrityError, InterfaceError, ProgrammingError, SQLAlchemyError

from eyas_device.support.closing import Closing
from eyas_host.fleet.store.checked import Address, Checked, Poison, check
from eyas_host.fleet.store.store import Batch, Quarantined, Store
from eyas_host.fleet.store.tables import first_line

_RETRY_S = (0.2, 30.0)
_CONTENT = (DataError, IntegrityError, InterfaceError, ProgrammingError, ValueError, OverflowError)
"""Errors that say that a row cannot be stored, not that the database cannot write now."""


class Arrived(msgspec.Struct, frozen=True):
    """One message as it came from the broker."""

    epoch: int
    """Of the connection that it came on."""
    mid: int
    """The broker's number for it; 0 if it waits for no acknowledgement."""
    topic: str
    payload: bytes
    at: float
    """`time.monotonic()`."""


class Committed(msgspec.Struct, frozen=True):
    """What is in the store now (or in quarantine)."""

    epoch: int
    count: int
    mids: Sequence[int]
    addresses: Sequence[Address]


class Writer(Closing):
    """Commits what is put, in order, and tells `committed` (in its own thread) what may be acknowledged.

    While the store cannot write, it tries again and again, `state` says why, and nothing is acknowledged.
    """

    def __init__(self, store: Store, committed: Callable[[Committed], None], *, batch: int = 500) -> None:
        """At most `batch` messages are committed together."""
        self.state = "writing"
        self.stored = 0
        self.duplicates = 0
        self.quarantined = 0
        self._lag = 0.0
        self._store, self._committed, self._batch = store, committed, batch
        self._queue: queue.SimpleQueue[list[Arrived] | None] = queue.SimpleQueue()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._work, name="store-writer", daemon=True)
        self._thread.start()

    def put(self, arrived: list[Arrived]) -> None:
        """Hand messages over; waits for nothing. The caller bounds how many are in hand."""
        self._queue.put(arrived)

    def finish(self) -> None:
        """Nothing more will be put; `close` waits no longer than a commit takes."""
        self._queue.put(None)

    def close(self) -> None:
        """Give up what is not committed and end the thread, after at most one commit."""
        self._closed.set()
        self._queue.put(None)
        self._thread.join()

    def take_lag(self) -> float:
        """The longest time from arrival to commit since it was last asked, seconds."""
        lag, self._lag = self._lag, 0.0
        return lag

    def _work(self) -> None:
        for arrived in self._batches():
            if self._closed.is_set():
                return
            for epoch in dict.fromkeys(one.epoch for one in arrived):
                same = [one for one in arrived if one.epoch == epoch]
                for start in range(0, len(same), self._batch):
                    self._take(same[start : start + self._batch])

    def _batches(self) -> Iterator[list[Arrived]]:
        """What waits, in lists as long as the load makes them."""
        while (arrived := self._queue.get()) is not None:
            ended = False
            while len(arrived) < self._batch and not ended:
                try:
                    more = self._queue.get_nowait()
                except queue.Empty:
                    break
                ended = more is None
                arrived += more or []
            yield arrived
            if ended:
                return

    def _take(self, arrived: Sequence[Arrived]) -> None:
        messages: list[Checked] = []
        poison: list[Quarantined] = []
        addresses: list[Address] = []
        for one in arrived:
            verdict = check(one.topic, one.payload)
            if isinstance(verdict, Poison):
                poison.append(Quarantined(one.topic, verdict.reason, one.payload))
                if verdict.address is not None:
                    addresses.append(verdict.address)
            else:
                messages.append(verdict)
                if not verdict.is_will:
                    addresses.append(verdict.address)
        if not self._commit(Batch(time.time(), messages, poison)):
            return
        self._lag = max(self._lag, time.monotonic() - arrived[0].at)
        mids = [one.mid for one in arrived if one.mid]
        self._committed(Committed(arrived[0].epoch, len(arrived), mids, addresses))

    def _commit(self, batch: Batch) -> bool:
        """Whether it is in the store; False only after `close`."""
        delay = _RETRY_S[0]
        while True:
            try:
                self._count(batch, self._store.add(batch))
                self.state = "writing"
                return True
            except _CONTENT as error:
                if batch.messages:
                    return self._one_by_one(batch, error)
                reason: Exception = error
            except SQLAlchemyError as error:
                reason = error
            self.state = f"cannot write: {first_line(reason)}; nothing is acknowledged until it can"
            if self._closed.wait(delay):
                return False
            delay = min(2 * delay, _RETRY_S[1])

    def _one_by_one(self, batch: Batch, error: Exception) -> bool:
        """A message that passed the check, but that the database does not take, must not hold up the others."""
        if len(batch.messages) == 1:
            (checked,) = batch.messages
            name = f"eyas/{checked.address.site}/{checked.address.device}/{checked.kind}"
            refused = Quarantined(name, f"the store does not take it: {first_line(error)}", checked.payload.encode())
            return self._commit(Batch(batch.received, (), (*batch.poison, refused)))
        singles = [Batch(batch.received, (message,)) for message in batch.messages]
        return all(self._commit(single) for single in (*singles, Batch(batch.received, (), batch.poison)))

    def _count(self, batch: Batch, new: int) -> None:
        self.stored += new
        self.duplicates += sum(not m.is_will for m in batch.messages) - new
        self.quarantined += len(batch.poison)
