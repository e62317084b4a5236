"""The uplink at real brokers: messages that a broker will not take, devices of one name, addresses, versions."""

from __future__ import annotations

import queue
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from paho.mqtt.client import CallbackAPIVersion, Client, MQTTProtocolVersion

from eyas_device.support.names import NAME, parse_broker
from eyas_device.telemetry.messages import Ack, Event, Header, Status, Window, decode, encode, topic
from eyas_device.telemetry.mqtt import Uplink, UplinkSettings
from eyas_device.telemetry.mqtt_client import Connector, LinkState, client_id
from eyas_device.telemetry.spool.spool import Spool
from tests.support.brokers import Broker, forward, free_port


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("eyas_device.telemetry.mqtt._BLAMED_S", 0.05)
    monkeypatch.setattr("eyas_device.telemetry.mqtt._BACKOFF_S", (0.1, 0.5))
    monkeypatch.setattr("eyas_device.telemetry.mqtt._TWIN_PAUSE_S", (0.5, 1.0))
    monkeypatch.setattr("eyas_device.telemetry.outbox._RESEND_S", (0.3, 1.0))
    monkeypatch.setattr("eyas_device.telemetry.outbox._IGNORED_S", 1.0)
    monkeypatch.setattr("eyas_device.telemetry.outbox._MAX_IGNORED", 3)


@pytest.fixture(params=["MQTT 5", "MQTT 3.1.1"])
def version(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The protocol that the uplink speaks, whatever the broker can."""
    if request.param == "MQTT 3.1.1":
        monkeypatch.setattr(Connector, "mqtt5", property(lambda self: False, lambda self, value: None), raising=False)
    return str(request.param)


class Collector:
    """Acknowledges every message that arrives, and remembers them in order."""

    def __init__(self, port: int) -> None:
        self.messages: list[tuple[str, Header]] = []
        self.lost: dict[str, int] = {}
        self.statuses: queue.Queue[Status] = queue.Queue()
        ready = threading.Event()
        self.client = Client(CallbackAPIVersion.VERSION2, protocol=MQTTProtocolVersion.MQTTv5)
        self.client.on_message = self._on_message
        self.client.on_connect = lambda c, *_: c.subscribe("eyas/#", qos=1)
        self.client.on_subscribe = lambda *_: ready.set()
        self.client.connect("127.0.0.1", port)
        self.client.loop_start()
        assert ready.wait(10)

    def _on_message(self, client: Client, userdata: object, message: Any) -> None:
        _, site, device, kind = message.topic.split("/", 3)
        if kind in ("ack", "cmd"):
            return
        header = decode(message.payload, Header)
        again = (kind, header.sequence) in {(k, h.sequence) for k, h in self.messages}  # after a broken connection
        self.messages.append((kind, header))
        if kind == "window" and not again:
            for what, count in decode(message.payload, Window).lost.items():
                self.lost[what] = self.lost.get(what, 0) + count
        if kind == "status":
            self.statuses.put(decode(message.payload, Status))
        if header.sequence >= 0:
            ranges = ((header.sequence, header.sequence),)
            client.publish(topic(site, device, "ack"), encode(Ack(device=device, spool=header.spool, ranges=ranges)), 1)

    def count(self, kind: str) -> int:
        return len({header.sequence for k, header in list(self.messages) if k == kind})

    def close(self) -> None:
        self.client.disconnect()
        self.client.loop_stop()


@contextmanager
def collecting(port: int) -> Iterator[Collector]:
    collector = Collector(port)
    try:
        yield collector
    finally:
        collector.close()


@contextmanager
def uplinked(port: int, spool: Spool, **more: Any) -> Iterator[Uplink]:
    values = UplinkSettings(**{"host": "127.0.0.1", "port": port, "site": "hall-2", "device": "cam", **more})

    def status() -> Status:
        return Status(state="online", machine=values.machine, faults=uplink.faults())

    with Uplink(
        values,
        spool,
        will=Status(device="cam", machine=values.machine),
        make_status=status,
        on_command=lambda payload: None,
    ) as uplink:
        uplink.start()
        yield uplink


def wait_until(true: Callable[[], object], timeout: float = 20) -> None:
    deadline = time.monotonic() + timeout
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def cut(uplink: Uplink) -> None:
    """End the connection below TLS and MQTT, if there is one."""
    client = uplink._client
    if client is not None and (sock := client.socket()) is not None:
        with suppress(OSError):  # it has just ended by itself
            sock.shutdown(socket.SHUT_RDWR)


# --- client ids ------------------------------------------------------------------------------------------------------

_name = st.from_regex(NAME, fullmatch=True)


@settings(max_examples=50)
@given(st.lists(st.tuples(st.sampled_from(["device", "collector"]), _name, _name), min_size=2, max_size=8, unique=True))
def test_different_names_have_different_client_ids_of_any_brokers_length(names: list[tuple[str, str, str]]) -> None:
    ids = [client_id(*one) for one in names]
    assert len(set(ids)) == len(ids)
    assert all(len(one.encode()) <= 23 and one.isascii() and one.isprintable() for one in ids)


def test_names_that_join_to_the_same_text() -> None:
    assert client_id("device", "hall-2", "cam") != client_id("device", "hall", "2-cam")
    assert client_id("collector", "a-b", "c") != client_id("collector", "a", "b-c")
    assert client_id("device", "eyas", "c") != client_id("collector", "eyas", "c")
    assert client_id("device", "hall-2", "cam-17").startswith("eyas-cam-17-")
    assert client_id("collector", "g", "x\ny\0z").isprintable()


# --- messages that the broker will not take --------------------------------------------------------------------------


@pytest.mark.parametrize("limit", ["max_packet_size 20000", "message_size_limit 20000"])
def test_a_message_that_is_too_large_does_not_stop_the_others(
    make_broker: Callable[..., Broker], version: str, limit: str
) -> None:
    broker = make_broker(options=f"allow_anonymous true\n{limit}").start()
    with collecting(broker.port) as collector, Spool(None, device="cam") as spool:
        spool.append(Window(frames=1))
        large = [spool.append(Event(image="A" * 150_000)), spool.append(Event(image="B" * 30_000))]
        small = spool.append(Event(image="C" * 10_000))
        with uplinked(broker.port, spool) as uplink:
            windows = 1
            while spool.pending("event"):
                spool.append(Window())
                windows += 1
                assert windows < 400, "the events still wait"
                time.sleep(0.1)
            wait_until(lambda: collector.count("window") == windows)
            assert [h.sequence for kind, h in collector.messages if kind == "event"] == [small]
            assert not {h.sequence for _, h in collector.messages} & set(large)
            spool.append(Window())
            wait_until(lambda: collector.count("window") == windows + 1)
            wait_until(lambda: uplink.status.state is LinkState.CONNECTED)
    assert collector.lost == {"event": 2}, "counted"


def test_a_lost_network_drops_nothing(broker: Broker, version: str) -> None:
    """Connections end again and again, some of them while a message is in the air."""
    with (
        collecting(broker.port) as collector,
        Spool(None, device="cam") as spool,
        uplinked(broker.port, spool) as uplink,
    ):
        for number in range(8):
            spool.append(Window(frames=number))
            wait_until(lambda: uplink.connected)
            cut(uplink)
        wait_until(lambda: not spool.pending("window"))
        assert collector.count("window") == 8
        assert uplink._outbox.dropped == 0


def test_a_refused_kind_is_kept_tried_again_and_taken_back(
    make_broker: Callable[..., Broker], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("eyas_device.telemetry.outbox._RESEND_S", (0.5, 1.0))
    acl = tmp_path / "acl"
    allowed = "topic readwrite eyas/hall-2/cam/status\ntopic readwrite eyas/hall-2/cam/event\n"
    acl.write_text(allowed)
    broker = make_broker(options=f"user root\nallow_anonymous true\nacl_file {acl}").start()
    with Spool(None, device="cam") as spool, uplinked(broker.port, spool, delivery="broker") as uplink:
        for number in range(30):
            spool.append(Window(frames=number))
        spool.append(Event(label="x"))
        wait_until(lambda: not spool.pending("event"))
        wait_until(lambda: uplink.status.state is LinkState.MESSAGE_REFUSED)
        assert uplink.status.detail == "window: Not authorized"
        assert uplink.faults() == ("the broker refused a message: window: Not authorized",)
        time.sleep(1.5)
        refused = uplink.refused
        assert refused < 120 and len(spool.pending("window", limit=50)) == 30, "kept, and not tried all the time"
        acl.write_text(f"{allowed}topic readwrite eyas/hall-2/cam/window\n")
        broker.reload()
        wait_until(lambda: not spool.pending("window"))
        wait_until(lambda: uplink.status.state is LinkState.CONNECTED)
        assert uplink.faults() == ()


# --- two devices of one name -----------------------------------------------------------------------------------------


def test_twins_name_each_other_and_do_not_hammer(broker: Broker, version: str) -> None:
    seen: dict[str, set[str]] = {"a": set(), "b": set()}
    with (
        collecting(broker.port) as collector,
        Spool(None, device="cam") as one,
        Spool(None, device="cam") as two,
        uplinked(broker.port, one, machine="aaaaaaaaaaaa") as a,
        uplinked(broker.port, two, machine="bbbbbbbbbbbb") as b,
    ):
        wait_until(lambda: a.twin and b.twin, 40)
        assert "another machine (bbbbbbbbbbbb) uses the name hall-2/cam" in a.twin
        assert "another machine (aaaaaaaaaaaa) uses the name hall-2/cam" in b.twin

        def both_were_connected() -> bool:
            for name, uplink in (("a", a), ("b", b)):
                if uplink.connected:
                    seen[name].add(uplink.status.state.name)
            return all("NAME_IN_USE" in states for states in seen.values())

        wait_until(both_were_connected)
        one.append(Window(frames=1))
        two.append(Window(frames=2))
        wait_until(lambda: not one.pending("window") and not two.pending("window"), 40)
        while not collector.statuses.empty():
            status = collector.statuses.get()
            if status.faults:
                break
        assert "uses the name hall-2/cam" in status.faults[0], "the host can see it"


def test_a_replaced_board_is_no_twin(broker: Broker) -> None:
    """The retained status of the old board is no evidence, even where the network loses every connection soon."""
    with collecting(broker.port), Spool(None, device="cam") as old:
        with uplinked(broker.port, old, machine="aaaaaaaaaaaa"):
            wait_until(lambda: not old.pending("status"))
        with Spool(None, device="cam") as new, uplinked(broker.port, new, machine="bbbbbbbbbbbb") as uplink:
            for _ in range(5):
                wait_until(lambda: uplink.connected and not new.pending("status"))
                cut(uplink)
                wait_until(lambda: not uplink.connected)
                assert "Unspecified" not in str(uplink.status)
            wait_until(lambda: uplink.connected)
            assert uplink.twin == ""


def test_two_sites_that_look_alike_share_a_broker(broker: Broker) -> None:
    with (
        Spool(None, device="cam") as one,
        Spool(None, device="2-cam") as two,
        uplinked(broker.port, one, site="hall-2", device="cam") as a,
        uplinked(broker.port, two, site="hall", device="2-cam") as b,
    ):
        wait_until(lambda: a.connected and b.connected)
        time.sleep(1.0)
        assert a.connected and b.connected and a._failures == b._failures == 0


def test_a_short_interruption_is_not_lost(broker: Broker) -> None:
    with collecting(broker.port) as collector, Spool(None, device="cam") as spool:
        with uplinked(broker.port, spool, will_delay_s=2) as uplink:
            assert collector.statuses.get(timeout=10).state == "online"
            cut(uplink)
            assert collector.statuses.get(timeout=10).state == "online", "it came back before the will was due"
            time.sleep(2.5)
            assert collector.statuses.empty()
            uplink._closing.set()  # ends without a DISCONNECT
            uplink._client.socket().close()  # type: ignore[union-attr]
        assert collector.statuses.get(timeout=10).state == "lost"


# --- addresses and versions ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["[::1]:{}", "mqtt://[::1]:{}", "127.0.0.1:{}", "tcp://localhost:{}/"])
def test_an_address_of_any_form_reaches_the_broker(make_broker: Callable[..., Broker], form: str) -> None:
    port = free_port()
    make_broker(options=f"allow_anonymous true\nlistener {port} ::1\nlistener {port} 127.0.0.1").start()
    address = parse_broker(form.format(port))
    with Spool(None, device="cam") as spool, uplinked(address.port, spool, host=address.host) as uplink:
        wait_until(lambda: uplink.connected)


def test_mqtt_3_1_1_is_not_kept_after_a_lost_connack(broker: Broker) -> None:
    """A first CONNACK that a bad network loses: MQTT 5 is spoken again, and reason codes are there."""
    levels: list[int] = []
    lost = threading.Event()

    def serve() -> None:
        while True:
            try:
                client, _ = server.accept()
            except OSError:
                return
            hello = client.recv(4096)
            if b"eyas" not in hello:  # somebody who finds out what listens
                client.close()
                continue
            levels.append(hello[hello.index(b"MQTT") + 4])
            if levels == [5] or lost.is_set():
                lost.clear()
                client.close()
                continue
            behind = socket.create_connection(("127.0.0.1", broker.port))
            behind.sendall(hello)
            connections.append((client, behind))
            for a, b in ((client, behind), (behind, client)):
                threading.Thread(target=forward, args=(a, b), daemon=True).start()

    connections: list[tuple[socket.socket, socket.socket]] = []
    with socket.create_server(("127.0.0.1", 0)) as server:
        threading.Thread(target=serve, daemon=True).start()
        with Spool(None, device="cam") as spool, uplinked(server.getsockname()[1], spool) as uplink:
            wait_until(lambda: uplink.connected)
            connections[-1][0].shutdown(socket.SHUT_RDWR)
            wait_until(lambda: len(levels) >= 3 and uplink.connected)
            lost.set()
            connections[-1][0].shutdown(socket.SHUT_RDWR)
            wait_until(lambda: len(levels) >= 5 and uplink.connected)
        server.shutdown(socket.SHUT_RDWR)
    assert levels[:5] == [5, 4, 5, 5, 5], "3.1.1 once after silence, never again once MQTT 5 was accepted"


def test_settings_have_this_machines_hash() -> None:
    first, second = (UplinkSettings(host="h", site="s", device="d") for _ in range(2))
    assert first.machine == second.machine == msgspec.structs.asdict(first)["machine"]
