"""The collector's writer thread: validates received messages and commits them in batches, with retries."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence

import msgspec

from eyas_device.support.closing import Closing
from eyas_host.fleet.store.database import Batch, QuarantinedMessage, Store
from eyas_host.fleet.store.faults import Fault, StoreError, classify, first_line
from eyas_host.fleet.store.validate import InvalidMessage, MessageId, ValidMessage, cleared_status, validate

_RETRY_S = (0.2, 30.0)


class Received(msgspec.Struct, frozen=True):
    """A message as received from the broker."""

    epoch: int
    """Number of the connection that it arrived on."""
    mid: int
    """MQTT packet identifier; 0 for QoS 0, which needs no acknowledgement."""
    topic: str
    payload: bytes
    at: float
    """`time.monotonic()`."""


class Committed(msgspec.Struct, frozen=True):
    """Messages that are now stored or quarantined."""

    epoch: int
    count: int
    mids: Sequence[int]
    ids: Sequence[MessageId]


class Writer(Closing):
    """Commits received messages in order and calls `on_commit`, in its own thread, with what may be acknowledged.

    While the store cannot write, it retries, `error` is the reason, and nothing is acknowledged. A message is
    quarantined only if the database rejects it alone. Where trying again cannot help, the thread ends: `failure` is the
    reason, and nothing more is acknowledged.
    """

    def __init__(self, store: Store, on_commit: Callable[[Committed], None], *, batch: int = 500) -> None:
        """Start the thread; at most `batch` messages are committed together."""
        self.error = ""
        self.failure: Exception | None = None
        self.stored = 0
        self.duplicates = 0
        self.quarantined = 0
        self._lag = 0.0
        self._store, self._on_commit, self._batch = store, on_commit, batch
        self._queue: queue.SimpleQueue[list[Received] | None] = queue.SimpleQueue()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._work, name="store-writer", daemon=True)
        self._thread.start()

    def put(self, arrived: list[Received]) -> None:
        """Queue messages without blocking; the caller bounds how many are uncommitted."""
        self._queue.put(arrived)

    def finish(self) -> None:
        """Announce that no more messages follow."""
        self._queue.put(None)

    def close(self) -> None:
        """Drop what is not committed and end the thread, after at most one more commit."""
        self._closed.set()
        self._queue.put(None)
        self._thread.join()

    def take_lag(self) -> float:
        """Longest time from arrival to commit since the last call, seconds."""
        lag, self._lag = self._lag, 0.0
        return lag

    def _work(self) -> None:
        try:
            self._store_all()
        except Exception as error:  # the thread that owns the connection raises it
            self.error, self.failure = first_line(error), error

    def _store_all(self) -> None:
        for arrived in self._batches():
            if self._closed.is_set():
                return
            for epoch in dict.fromkeys(one.epoch for one in arrived):
                same = [one for one in arrived if one.epoch == epoch]
                for start in range(0, len(same), self._batch):
                    self._store_batch(same[start : start + self._batch])

    def _batches(self) -> Iterator[list[Received]]:
        """Yield the queued messages, merged up to the batch size."""
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

    def _store_batch(self, arrived: Sequence[Received]) -> None:
        messages: list[ValidMessage] = []
        quarantined: list[QuarantinedMessage] = []
        ids: list[MessageId] = []
        cleared: dict[str, None] = {}
        for one in arrived:
            if (gone := cleared_status(one.topic, one.payload)) is not None:
                cleared[gone[1]] = None
                continue
            message = validate(one.topic, one.payload)
            if isinstance(message, InvalidMessage):
                quarantined.append(QuarantinedMessage(one.topic, message.reason, one.payload, message.id is not None))
                if message.id is not None:
                    ids.append(message.id)
            else:
                messages.append(message)
                cleared.pop(message.id.device, None)
                if not message.is_will:
                    ids.append(message.id)
        if not self._commit(Batch(time.time(), messages, quarantined, tuple(cleared))):
            return
        self._lag = max(self._lag, time.monotonic() - arrived[0].at)
        mids = [one.mid for one in arrived if one.mid]
        self._on_commit(Committed(arrived[0].epoch, len(arrived), mids, ids))

    def _commit(self, batch: Batch) -> bool:
        """Commit a batch, retrying until it succeeds; False only after `close`."""
        delay = _RETRY_S[0]
        while True:
            try:
                self._count(batch, self._store.add(batch))
                self.error = ""
                return True
            except Exception as error:
                fault = classify(error)
                if fault is None:
                    raise
                if fault is Fault.SCHEMA:
                    raise StoreError(
                        f"store {self._store.name}: {first_line(error)}; repair its tables or permissions and start "
                        "again: unstored messages were not acknowledged and will be sent again"
                    ) from None
                if fault is Fault.ROW and batch.messages:
                    return self._commit_singly(batch, error)
                self.error = first_line(error)
            if self._closed.wait(delay):
                return False
            delay = min(2 * delay, _RETRY_S[1])

    def _commit_singly(self, batch: Batch, error: Exception) -> bool:
        """Commit messages one by one: one that the database rejects is quarantined and does not block the others."""
        if len(batch.messages) == 1:
            (message,) = batch.messages
            topic = f"eyas/{message.id.site}/{message.id.device}/{message.kind}"
            reason = f"the database rejects it: {first_line(error)}"
            rejected = QuarantinedMessage(topic, reason, message.payload.encode(), acknowledged=True)
            return self._commit(Batch(batch.received, (), (*batch.quarantined, rejected), batch.cleared))
        singles = [Batch(batch.received, (message,)) for message in batch.messages]
        rest = Batch(batch.received, (), batch.quarantined, batch.cleared)
        return all(self._commit(single) for single in (*singles, rest))

    def _count(self, batch: Batch, new: int) -> None:
        self.stored += new
        self.duplicates += sum(not m.is_will for m in batch.messages) - new
        self.quarantined += len(batch.quarantined)
