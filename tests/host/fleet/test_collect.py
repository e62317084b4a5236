"""The collector, through a real broker: it acknowledges exactly what it stored."""

from __future__ import annotations

import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eyas_device.errors import LinkError
from eyas_device.telemetry.messages import KINDS, Header, Status, decode, encode, topic
from eyas_host.fleet.broker.client import BrokerAccess
from eyas_host.fleet.broker.forget import forget
from eyas_host.fleet.collect.collector import Collector, collect
from eyas_host.fleet.collect.settings import CollectorSettings
from eyas_host.fleet.store.database import Batch, Store
from eyas_host.fleet.store.validate import InvalidMessage, ValidMessage, validate
from eyas_host.support.errors import BrokerUnreachable
from tests.support.brokers import free_port
from tests.support.fleet_parts import Processes, Sender, event, wait_until, window

SPOOL = str(uuid.UUID(int=7))
HOSTILE_CASES = int(os.environ.get("EYAS_HOSTILE_CASES", "4000"))


@pytest.fixture
def processes(tmp_path: Path) -> Iterator[Processes]:
    made = Processes(tmp_path)
    yield made
    made.close()


@pytest.fixture
def port(processes: Processes) -> int:
    port = free_port()
    processes.broker(port)
    return port


@pytest.fixture
def sender(port: int) -> Iterator[Callable[..., Sender]]:
    made: list[Sender] = []

    def make(device: str = "cam-1", **more: Any) -> Sender:
        made.append(Sender(port, device, **more))
        return made[-1]

    yield make
    for one in made:
        one.close()


@pytest.fixture
def sqlite(tmp_path: Path) -> str:
    """For what does not depend on the database."""
    return f"sqlite:///{tmp_path / 'fleet.db'}"


def test_stored_then_acknowledged(processes: Processes, port: int, sender: Callable[..., Sender], sqlite: str) -> None:
    process = processes.collector(port, sqlite)
    processes.connected()
    one, two = sender("cam-1"), sender("cam-2", site="hall-2")
    one.windows(range(300))
    two.windows(range(10))
    two.send(event("cam-2", two.spool, 10), "event")
    assert one.acked(set(range(300))) == set(range(300))
    assert two.acked(set(range(11))) == set(range(11))
    one.windows([0, 7, 299])
    assert one.acked({0, 7, 299}) == {0, 7, 299}, "duplicates are acknowledged again"
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 0
    with Store(sqlite) as store:
        assert store.counts() == {"event": 1, "window": 310, "quarantine": 0}
    last = processes.reports()[-1]
    assert (last["messages"], last["duplicates"], last["waiting"]) == (311, 3, 0)


def test_invalid_messages_are_quarantined_and_block_nothing(
    processes: Processes, port: int, sender: Callable[..., Sender], url: str
) -> None:
    processes.collector(port, url)
    processes.connected()
    one = sender()
    one.send(b"not json")
    one.send(b"\xff\xfe")
    one.send(window("another", one.spool, 1))
    one.send(window("cam-1", "no-uuid", 1))
    one.send(window("cam-1", one.spool, 2, frames=-1))
    one.send(window("cam-1", one.spool, 3, schema=0))
    one.send(encode(window("cam-1", one.spool, 4))[:-1] + b',"more":"' + b"x" * 300_000 + b'"}')
    one.send(window("cam-1", one.spool, 5))
    assert one.acked({2, 3, 4, 5}) == {2, 3, 4, 5}, "invalid messages with an identity are acknowledged too"
    with Store(url) as store:
        assert store.counts() == {"window": 1, "quarantine": 7}
        reasons = [message.reason for message in store.quarantined()]
    for words in ("malformed", "UTF-8", "'another'", "no identity", "frames", "schema 0", "300"):
        assert any(words in reason for reason in reasons), (words, reasons)


def test_messages_of_a_newer_device_are_stored_whole(
    processes: Processes, port: int, sender: Callable[..., Sender], url: str
) -> None:
    """Acknowledged, so that the device forgets them: words of tomorrow, and an event with its image in a new schema."""
    processes.collector(port, url)
    processes.connected()
    one = sender()
    image = "x" * 200_000
    one.send(event("cam-1", one.spool, 1, why="disagreement", image=image), "event")
    newer = msgspec.to_builtins(event("cam-1", one.spool, 2, schema=2, image=image)) | {"label": ["crack", "dirt"]}
    one.send(msgspec.json.encode(newer), "event")
    one.send(Status(device="cam-1", spool=one.spool, sequence=3, state="updating"), "status")
    assert one.acked({1, 2, 3}) == {1, 2, 3}
    with Store(url) as store:
        assert store.counts() == {"event": 2, "status": 1, "quarantine": 0}
        assert store.unread() == ["schema 2; this version reads 1, and not its label"]
        (read,) = store.events()
        assert (read.why, read.image) == ("disagreement", image)
        with store.begin() as connection:
            statement = "SELECT payload FROM messages WHERE sequence = 2"
            assert msgspec.json.decode(connection.exec_driver_sql(statement).scalar_one()) == newer
        assert store.devices()[0].status.state == "updating"


def test_a_last_will_changes_the_device_and_is_not_stored(
    processes: Processes, port: int, sender: Callable[..., Sender], sqlite: str
) -> None:
    processes.collector(port, sqlite)
    processes.connected()
    one = sender()
    one.send(Status(device="cam-1", spool=one.spool, sequence=0, state="online"), "status")
    one.acked({0})
    one.send(Status(device="cam-1", state="lost"), "status")
    with Store(sqlite) as store:
        wait_until(lambda: store.devices()[0].status.state == "lost", what="the loss")
        assert store.counts() == {"status": 1, "quarantine": 0}


def test_nothing_is_acknowledged_while_the_store_cannot_write(
    processes: Processes, port: int, sender: Callable[..., Sender], sqlite: str, tmp_path: Path
) -> None:
    with Store(sqlite):
        pass
    blocker = sqlite3.connect(tmp_path / "fleet.db", isolation_level=None)
    processes.collector(port, sqlite)
    processes.connected()
    one = sender()
    blocker.execute("BEGIN IMMEDIATE")
    one.windows(range(5))
    wait_until(lambda: "database is locked" in processes.reports()[-1]["store_error"], 40, "the error")
    assert one.acks.empty()
    blocker.execute("ROLLBACK")
    assert one.acked(set(range(5))) == set(range(5))
    wait_until(lambda: not processes.reports()[-1]["store_error"])


def test_the_broker_queues_for_an_absent_collector(
    processes: Processes, port: int, sender: Callable[..., Sender], sqlite: str
) -> None:
    first = processes.collector(port, sqlite)
    processes.connected()
    first.kill()
    first.wait(20)
    one = sender()
    one.windows(range(20))
    processes.collector(port, sqlite)
    assert one.acked(set(range(20))) == set(range(20)), "the broker queued them for the collector's session"


def test_a_device_without_a_certificate_is_forgotten(
    processes: Processes, port: int, sender: Callable[..., Sender], sqlite: str
) -> None:
    """Status and answer of all its sites, on the broker and in the store's list; other devices and its windows stay."""
    processes.collector(port, sqlite)
    processes.connected()
    one, other, moved = sender(), sender("cam-10"), sender("cam-1", site="s2")
    for device in (one, other, moved):
        status = encode(Status(device=device.device, spool=device.spool, sequence=0, state="offline"))
        device.client.publish(topic(device.site, device.device, "status"), status, qos=1, retain=True)
        device.client.publish(topic(device.site, device.device, "answer"), b"{}", qos=1, retain=True)
    one.windows([1, 2])
    one.acked({0, 1, 2})
    other.acked({0})
    moved.acked({0})
    access = BrokerAccess(broker=f"127.0.0.1:{port}")
    assert forget(access, "cam-1") == [
        f"eyas/{site}/cam-1/{kind}" for site in ("s", "s2") for kind in ("answer", "status")
    ]
    assert forget(access, "cam-1") == []
    with Store(sqlite) as store:
        wait_until(lambda: [device.device for device in store.devices()] == ["cam-10"], 20, "forgetting")
        assert store.counts() == {"status": 3, "window": 2, "quarantine": 0}
        one.windows([3])
        one.acked({3})
        assert [device.device for device in store.devices()] == ["cam-1", "cam-10"], "it is back"
    with pytest.raises(LinkError, match="1 to 64 letters"):
        forget(access, "+")
    with pytest.raises(BrokerUnreachable, match="nothing listens"):
        forget(BrokerAccess(broker=f"127.0.0.1:{free_port()}"), "cam-1")


def test_a_stopped_collector_keeps_no_share(
    processes: Processes, port: int, sender: Callable[..., Sender], sqlite: str
) -> None:
    """The devices send nothing twice: what went to the session of the stopped one would be missing."""
    first = processes.collector(port, sqlite, name="a")
    processes.collector(port, sqlite, name="b")
    processes.connected("a")
    processes.connected("b")
    devices = [sender(f"cam-{number}") for number in range(3)]
    for device in devices:
        device.windows(range(100))
    first.send_signal(signal.SIGTERM)  # while messages arrive
    for device in devices:
        device.windows(range(100, 200))
    assert first.wait(20) == 0
    stopped = time.monotonic()
    for device in devices:
        device.windows(range(200, 300))
    for device in devices:
        assert device.acked(set(range(300))) == set(range(300))
    assert time.monotonic() - stopped < 10, "within seconds, not when devices repeat what was not acknowledged"
    with Store(sqlite) as store:
        assert store.counts() == {"window": 900, "quarantine": 0}
    wait_until(
        lambda: sum(processes.reports(name)[-1]["messages"] for name in ("a", "b")) == 900, what="the last report"
    )
    assert [processes.reports(name)[-1]["duplicates"] for name in ("a", "b")] == [0, 0], "none came twice"


@pytest.mark.parametrize("ends", ["damaged tables", "closed pipe", "SIGINT"])
def test_a_collector_that_an_error_ends_keeps_no_share(
    processes: Processes, port: int, sender: Callable[..., Sender], sqlite: str, tmp_path: Path, ends: str
) -> None:
    """Whatever ends it, the other one gets all of what is sent then; a process that is killed is the exception."""
    processes.collector(port, sqlite, name="b")
    processes.connected("b")
    other = tmp_path / "other.db"
    words = ["collect", "--broker", f"127.0.0.1:{port}", "--store", f"sqlite:///{other}", "--name", "a"]
    command = [sys.executable, "-m", "eyas_host", *words, *(["--json"] if ends == "closed pipe" else [])]
    with (tmp_path / "a.err").open("wb") as err:
        first = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=err)
    try:
        wait_until(lambda: "eyas-collect-eyas-a" in processes.reports("b")[-1]["warning"], 30, "two collectors")
        one = sender()
        if ends == "damaged tables":
            with sqlite3.connect(other) as database:
                database.execute("DROP TABLE messages")
            one.windows(range(1000, 1010))
        elif ends == "closed pipe":
            assert first.stdout is not None
            first.stdout.close()
        else:
            first.send_signal(signal.SIGINT)
        assert first.wait(40) == (2 if ends == "damaged tables" else 0), (tmp_path / "a.err").read_text()
        one.windows(range(100))
        assert one.acked(set(range(100)), timeout=10) >= set(range(100))
    finally:
        first.kill()
        first.wait(10)


def test_collectors_of_a_group_with_different_stores_notice_each_other(
    processes: Processes, port: int, sender: Callable[..., Sender], url: str, tmp_path: Path
) -> None:
    """A store is the same whatever its URL says."""
    warnings = {name: lambda name=name: processes.reports(name)[-1]["warning"] for name in ("a", "b", "c")}
    processes.collector(port, url, name="a")
    processes.connected("a")
    (tmp_path / "link").symlink_to(tmp_path)
    linked = f"sqlite:///{tmp_path / 'link' / 'fleet.db'}"
    same = linked if url.startswith("sqlite") else f"{url}?connect_timeout=9"
    processes.collector(port, same, name="b")
    processes.connected("b")
    processes.collector(port, f"sqlite:///{tmp_path / 'other.db'}", name="c")
    processes.connected("c")
    for name in ("a", "b"):
        wait_until(lambda name=name: "eyas-collect-eyas-c of the same group stores elsewhere" in warnings[name](), 20)
    both = "eyas-collect-eyas-a, eyas-collect-eyas-b of the same group store elsewhere"
    wait_until(lambda: both in warnings["c"](), 20)
    one = sender()
    one.windows(range(10))
    assert one.acked(set(range(10))) == set(range(10)), "a warning stops nothing"


@pytest.mark.parametrize("option", ["group", "name"])
@pytest.mark.parametrize("value", ["", "a/2", "+", "#", "a b", "x\ny", "x\0", "\u00e4", "x" * 65, "x" * 70_000])
def test_names_that_no_broker_takes_are_refused_before_anything_is_made(
    tmp_path: Path, option: str, value: str
) -> None:
    chosen = CollectorSettings(**{"name": "a", "group": "g", option: value})
    with pytest.raises(
        LinkError, match=rf"^--{option} .*: 1 to 64 letters, digits, '.', '_' and '-' are allowed$"
    ) as e:
        collect(f"sqlite:///{tmp_path / 'fleet.db'}", BrokerAccess(), chosen)
    assert len(str(e.value)) < 150 and str(e.value).isprintable()
    assert list(tmp_path.iterdir()) == []


def test_the_command_line_refuses_a_group_in_one_line(processes: Processes, tmp_path: Path) -> None:
    command = processes.eyas("collect", "--group", "hall/2", "--store", f"sqlite:///{tmp_path / 'f.db'}")
    assert command.wait(60) == 2
    (line,) = (tmp_path / "eyas.log").read_text().splitlines()
    assert line.endswith("--group 'hall/2': 1 to 64 letters, digits, '.', '_' and '-' are allowed")


def test_collectors_of_a_group_share_the_messages(
    processes: Processes, port: int, sender: Callable[..., Sender], url: str
) -> None:
    for name in ("a", "b"):
        processes.collector(port, url, name=name)
        processes.connected(name)
    one = sender()
    one.windows(range(400))
    one.acked(set(range(400)))
    with Store(url) as store:
        assert store.counts()["window"] == 400
    parts = [lambda name=name: processes.reports(name)[-1]["messages"] for name in ("a", "b")]
    wait_until(lambda: sum(part() for part in parts) == 400)
    assert min(part() for part in parts) > 50


def test_the_broker_restarts(processes: Processes, port: int, sender: Callable[..., Sender], sqlite: str) -> None:
    broker_port = free_port()
    broker = processes.broker(broker_port, name="second")
    processes.collector(broker_port, sqlite)
    processes.connected()
    broker.kill()
    broker.wait()
    wait_until(lambda: processes.reports()[-1]["state"] == "disconnected", what="the loss")
    processes.broker(broker_port, name="second")
    wait_until(lambda: processes.reports()[-1]["state"] == "connected", what="the return")
    one = Sender(broker_port)
    one.windows(range(5))
    assert one.acked(set(range(5))) == set(range(5))
    one.close()


def test_two_collectors_of_one_name_are_reported_and_lose_nothing(
    processes: Processes, port: int, sender: Callable[..., Sender], sqlite: str
) -> None:
    processes.collector(port, sqlite)
    processes.connected()
    second = processes.collector(port, sqlite)
    wait_until(lambda: any("does another collector have the name" in r["detail"] for r in processes.reports()), 60)
    second.terminate()
    assert second.wait(20) == 0
    # The second ended the session when it stopped; a device would send again what arrives before the first is back.
    wait_until(lambda: processes.reports()[-1]["state"] == "connected", 60)
    one = sender()
    one.windows(range(20))
    assert one.acked(set(range(20)), timeout=60) == set(range(20))


def test_invalid_credentials(tmp_path: Path, sqlite: str) -> None:
    with Store(sqlite) as store:
        for wrong in (
            {"broker": "host:99999"},
            {"ca": tmp_path / "nothing.crt"},
            {"certificate": tmp_path / "x.crt"},
            {"user": "u", "password_file": tmp_path / "nothing"},
        ):
            with pytest.raises(LinkError):
                Collector(store, BrokerAccess(**wrong), CollectorSettings(name="x"))  # type: ignore[arg-type]


# Hostile messages: mutations of valid ones, and arbitrary JSON.

VALID: dict[str, Header] = {
    "status": Status(device="d", spool=SPOOL, sequence=1, state="online"),
    "window": window(
        "d", SPOOL, 2, counts={"a": 3}, confidence={"a": (1,) * 10}, latency_bins={100: 3}, latency_ms={"p50": 1.0}
    ),
    "event": event("d", SPOOL, 3, top={"a": 0.5}),
    "profile": KINDS["profile"](device="d", spool=SPOOL, sequence=4),
    "cmd/result": KINDS["cmd/result"](device="d", spool=SPOOL, sequence=5),
}
ATOMS: list[Any] = [None, True, -1, 0, 2**53 + 1, 2**63, 10**30, -0.0, 1e308, "", "d", "\x00", "\ud800", "é" * 300]
ATOMS += ["x" * 5000, [], {}, [[]], {"a": {}}, [1] * 11, {"d": -1}, {"\n": 1}, "NaN", SPOOL, SPOOL.upper() + "\n"]


def hostile(rng: random.Random, kind: str) -> bytes:
    tree = json.loads(encode(VALID[kind]))
    for _ in range(rng.randint(0, 3)):
        key = rng.choice([*tree, "unknown"])
        tree[key] = rng.choice(ATOMS)
        if rng.random() < 0.2:
            tree.pop(key)
    data = bytearray(json.dumps(tree, ensure_ascii=rng.random() < 0.5).encode("utf-8", "surrogatepass"))
    if rng.random() < 0.3:
        for _ in range(rng.randint(1, 4)):
            data[rng.randrange(len(data))] = rng.randrange(256)
    if rng.random() < 0.1:
        del data[rng.randrange(len(data)) :]
    if rng.random() < 0.02:
        data = bytearray(b'{"device":"d","x":' + b"[" * 5000 + b"]" * 5000 + b"}")
    return bytes(data)


def check_invariants(verdict: ValidMessage) -> None:
    """Check, on the stored payload, what the rest of Eyas relies on."""
    message: Any = msgspec.convert(msgspec.to_builtins(verdict.message), KINDS[verdict.kind], str_keys=False)
    assert verdict.problem or message == decode(verdict.payload.encode(), KINDS[verdict.kind])
    assert message.device == verdict.id.device == "d"
    assert (message.schema > 1) == bool(verdict.problem) and message.schema >= 1
    assert 0 <= message.time < 1e11
    if verdict.is_will:
        assert (verdict.kind, message.state, message.spool) == ("status", "lost", "")
        return
    assert str(uuid.UUID(message.spool)) == message.spool
    assert 0 <= message.sequence < 2**63
    if verdict.kind == "window":
        assert min([message.frames, message.dropped, message.uncertain, *message.counts.values()]) >= 0
        assert all(len(tenths) == 10 and min(tenths) >= 0 for tenths in message.confidence.values())
        assert all(0 <= value < 1e16 for value in message.latency_ms.values())
    if verdict.kind == "event":
        assert 0 <= message.confidence <= 1


def test_hostile_messages_are_rejected_or_stored_correctly(url: str) -> None:
    rng = random.Random(5)
    accepted: list[ValidMessage] = []
    with Store(url) as store:
        for number in range(HOSTILE_CASES):
            kind = rng.choice(list(VALID))
            payload = hostile(rng, kind)
            verdict = validate(f"eyas/s/d/{rng.choice(list(VALID)) if number % 50 == 0 else kind}", payload)
            if isinstance(verdict, InvalidMessage):
                assert verdict.reason
                continue
            check_invariants(verdict)
            accepted.append(verdict)
        assert 0.1 < len(accepted) / HOSTILE_CASES < 0.9, "the test needs valid and invalid messages"
        for start in range(0, len(accepted), 500):
            store.add(Batch(1.0, accepted[start : start + 500]))
        stored = sum(number for kind, number in store.counts().items() if kind != "quarantine")
        assert stored == len({v.id for v in accepted if not v.is_will})
        store.devices()
        assert all(w.device == "d" for w in store.windows())
        assert all(e.device == "d" for e in store.events())


@settings(max_examples=200, deadline=None)
@given(topic=st.text(max_size=40) | st.just("eyas/s/d/window"), payload=st.binary(max_size=200))
def test_any_bytes_on_any_topic(topic: str, payload: bytes) -> None:
    assert isinstance(validate(topic, payload), InvalidMessage)


def test_ten_megabytes_are_refused_quickly() -> None:
    started = time.process_time()
    verdict = validate("eyas/s/d/window", b'{"device":"d","x":"' + b"x" * 10_000_000 + b'"}')
    assert isinstance(verdict, InvalidMessage)
    assert time.process_time() - started < 1
