"""Several processes at work on one store: expiring, collecting, and losing the database server meanwhile."""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from eyas_device.telemetry.messages import encode
from eyas_host.fleet.store import retention
from eyas_host.fleet.store.database import Batch, Store
from eyas_host.fleet.store.retention import Retention, expire
from eyas_host.fleet.store.validate import ValidMessage, validate
from tests.support.brokers import free_port
from tests.support.fleet_parts import Processes, Sender, wait_until, window
from tests.support.postgres import PostgresServer

SPOOL = str(uuid.UUID(int=7))
NOW, DAY = 1_800_000_000.0, 86400.0
OLD = 120
"""Windows of one frame each, all older than a month."""


def old_windows() -> list[ValidMessage]:
    made = []
    for number in range(OLD):
        payload = encode(window("cam-1", SPOOL, number, time=NOW - 90 * DAY + 60 * number, frames=1))
        verdict = validate("eyas/s/cam-1/window", payload)
        assert isinstance(verdict, ValidMessage)
        made.append(verdict)
    return made


class Threads:
    """Actions at the same time, whose errors the test sees."""

    def __init__(self) -> None:
        self._threads: list[threading.Thread] = []
        self._errors: list[BaseException] = []

    def start(self, action: Callable[[], object]) -> None:
        def run() -> None:
            try:
                action()
            except BaseException as error:
                self._errors.append(error)

        self._threads.append(threading.Thread(target=run))
        self._threads[-1].start()

    def join(self) -> None:
        for thread in self._threads:
            thread.join(60)
        assert self._errors == []


@pytest.fixture
def slow_expiry(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Each step of `expire` waits before it commits, and says by the event that it has merged and deleted."""
    inside = threading.Event()
    record = retention._record_expired

    def slow(*arguments: Any) -> None:
        record(*arguments)
        inside.set()
        time.sleep(0.7)

    monkeypatch.setattr(retention, "_record_expired", slow)
    return inside


def test_two_expiries_at_once_merge_each_window_once(url: str, slow_expiry: threading.Event) -> None:
    merged: list[int] = []

    def run() -> None:
        with Store(url) as own:
            merged.append(expire(own, Retention(windows_days=30), now=NOW).merged)

    with Store(url) as store:
        store.add(Batch(NOW - 90 * DAY, old_windows()))
        threads = Threads()
        for _ in range(2):
            threads.start(run)
        threads.join()
        assert sorted(merged) == [0, OLD]
        assert sum(one.frames for one in store.windows()) == OLD


def test_messages_that_come_again_while_they_expire(url: str, slow_expiry: threading.Event) -> None:
    with Store(url) as store, Store(url) as collector:
        store.add(Batch(NOW - 90 * DAY, old_windows()))
        threads = Threads()
        threads.start(lambda: expire(store, Retention(windows_days=30), now=NOW))
        assert slow_expiry.wait(20)
        assert collector.add(Batch(NOW, old_windows())) == 0, "they are neither new nor to be counted twice"
        threads.join()
        assert sum(one.frames for one in store.windows()) == OLD


def test_collectors_that_meet_the_same_rows_in_other_orders(postgres: PostgresServer) -> None:
    """Batches of the same devices and messages, forwards and backwards, neither fail nor deadlock."""
    url = postgres.create_database()
    names = [f"cam-{number:02}" for number in range(30)]

    def messages(order: list[str], number: int) -> list[ValidMessage]:
        made = []
        for name in order:
            for kind in ("window", "status"):
                fields = {"window": {"frames": 1}, "status": {"state": "online"}}[kind]
                header = {"device": name, "spool": SPOOL, "sequence": 2 * number + (kind == "status"), "time": 5.0}
                verdict = validate(f"eyas/s/{name}/{kind}", msgspec.json.encode(header | fields))
                assert isinstance(verdict, ValidMessage), verdict
                made.append(verdict)
        return made

    def collect(order: list[str]) -> None:
        with Store(url) as store:
            for number in range(15):
                store.add(Batch(NOW + 20 * number, messages(order, number)))

    with Store(url) as store:
        threads = Threads()
        for order in (names, names[::-1], names[15:] + names[:15]):
            threads.start(lambda order=order: collect(order))
        threads.join()
        assert store.counts() == {"window": 450, "status": 450, "quarantine": 0}
        assert {device.last_seen for device in store.devices()} == {NOW + 280}


@pytest.fixture
def processes(tmp_path: Path) -> Iterator[Processes]:
    made = Processes(tmp_path)
    yield made
    made.close()


def test_the_database_server_is_killed_and_restarted_while_two_collectors_write(
    processes: Processes, own_postgres: PostgresServer
) -> None:
    """3,000 windows, and 30 messages without identity, which nothing but the batch keeps from being stored twice."""
    port, url = free_port(), own_postgres.create_database()
    processes.broker(port)
    for name in ("a", "b"):
        processes.collector(port, url, name=name)
    for name in ("a", "b"):
        processes.connected(name)
    sender = Sender(port)
    try:
        for part in range(30):
            sender.windows(range(100 * part, 100 * (part + 1)))
            sender.send(b"{", "event")
            if part == 8:
                own_postgres.kill()
            if part == 12:
                own_postgres.start_after_kill()
            if part == 20:
                own_postgres.stop()
                own_postgres.start()
            time.sleep(0.03)
        sender.acked(set(range(3000)), timeout=60)
        with Store(url) as store:
            wait_until(lambda: store.counts()["quarantine"] == 30, 30, "the messages without identity")
            assert store.sequences("cam-1", sender.spool) == list(range(3000))
            assert store.counts() == {"window": 3000, "quarantine": 30}
    finally:
        sender.close()
    assert any(report["store_error"] for name in ("a", "b") for report in processes.reports(name))


def test_a_collector_whose_tables_are_gone_ends_with_one_line(processes: Processes, postgres: PostgresServer) -> None:
    port, url = free_port(), postgres.create_database()
    processes.broker(port)
    process = processes.eyas("collect", "--broker", f"127.0.0.1:{port}", "--store", url, "--json")
    sender = Sender(port)
    try:
        wait_until(lambda: sender.windows([0]) or not sender.acks.empty(), 60, "a connected collector")
        time.sleep(0.3)  # for the last acknowledgements
        sender.acks.queue.clear()
        with Store(url) as store, store.begin(exclusive=True) as connection:
            connection.exec_driver_sql("DROP TABLE messages")
        sender.windows(range(1, 4))
        assert process.wait(30) == 2
        assert sender.acks.empty()
    finally:
        sender.close()
    last = (processes.folder / "eyas.log").read_text().splitlines()[-1]
    assert 'relation "messages" does not exist' in last
    assert "sent again" in last
