"""Which messages are sent when nobody acknowledges them."""

from __future__ import annotations

import random
from collections import Counter
from types import SimpleNamespace

import pytest

from eyas_device.telemetry.messages import Ack, Event, Result, Window
from eyas_device.telemetry.outbox import Outbox
from eyas_device.telemetry.spool.spool import IN_FLIGHT, Held, Spool


class Network:
    """Counts what is sent, and acknowledges it as a broker at once."""

    def __init__(self, outbox: Outbox) -> None:
        self.sent: Counter[str] = Counter()
        self._outbox, self._mids = outbox, iter(range(1, 100_000))
        self._pending: list[int] = []

    def publish(self, held: Held) -> int:
        self.sent[held.kind] += 1
        self._pending.append(next(self._mids))
        return self._pending[-1]

    def turns(self, count: int, now: float) -> Counter[str]:
        self.sent.clear()
        for _ in range(count):
            assert self._outbox.send(now, self.publish) == ""
            for mid in self._pending:
                self._outbox.on_puback(mid, SimpleNamespace(is_failure=False), now)
            self._pending.clear()
        return Counter(self.sent)


def test_results_and_events_go_once_without_a_collector(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who sent a command waits for them at the broker. What is sent again stays bounded, and a collector gets all."""
    monkeypatch.setattr(random, "uniform", lambda low, high: high)
    with Spool(None, device="cam") as spool:
        for _ in range(30):
            for message in (Window(), Event(), Result()):
                spool.append(message)
        outbox = Outbox(spool, delivery="collector")
        network = Network(outbox)
        outbox.connected(receive_maximum=IN_FLIGHT, now=0.0)
        assert network.turns(50, 0.0) == {"cmd/result": 30, "event": 30, "window": IN_FLIGHT}
        assert network.turns(50, 1000.0) == {"cmd/result": IN_FLIGHT, "event": 4, "window": IN_FLIGHT}
        outbox.connected(receive_maximum=IN_FLIGHT, now=1001.0)
        assert network.turns(50, 1001.0) == {"cmd/result": IN_FLIGHT, "event": 4, "window": IN_FLIGHT}
        everything = tuple(held.sequence for kind in ("window", "event", "cmd/result") for held in _all(spool, kind))
        for now in range(2000, 5000, 100):
            ranges = ((min(everything), max(everything)),)
            outbox.on_ack(Ack(device="cam", spool=spool.id, ranges=ranges), float(now))
            network.turns(5, float(now))
        left = {kind: len(_all(spool, kind)) for kind in ("window", "event", "cmd/result")}
        assert left == {"window": 0, "event": 0, "cmd/result": 0}


def _all(spool: Spool, kind: str) -> list[Held]:
    return spool.pending(kind, after=-1, limit=1000)
