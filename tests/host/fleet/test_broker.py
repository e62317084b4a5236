"""The broker kit, with a real mosquitto: authentication and access control."""

from __future__ import annotations

import os
import queue
import socket
import ssl
import stat
import struct
import sys
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from paho.mqtt.client import CallbackAPIVersion, Client, MQTTProtocolVersion
from paho.mqtt.subscribeoptions import SubscribeOptions

from eyas_device.errors import LinkError
from eyas_device.telemetry.messages import encode
from eyas_device.telemetry.mqtt_client import LinkState
from eyas_host.fleet.broker.client import BrokerAccess
from eyas_host.fleet.broker.enroll import enroll
from eyas_host.fleet.broker.kit import Kit, prepare
from eyas_host.fleet.broker.pki import Authority, Credentials
from eyas_host.fleet.collect.collector import Collector
from eyas_host.fleet.collect.settings import CollectorSettings
from eyas_host.fleet.store.database import Store
from eyas_host.fleet.watch.subscriber import Subscriber
from tests.support.brokers import free_port
from tests.support.fleet_parts import Processes, listens, needs_mosquitto, wait_until, window
from tests.support.inside import eyas


@pytest.fixture(scope="module")
def kit(open_folder: Path) -> Iterator[Kit]:
    """A running broker of the kit."""
    program, folder = needs_mosquitto(), open_folder
    made = prepare(folder / "fleet", port=free_port())
    processes = Processes(folder)
    process = processes.start(program, "-c", str(made.config))
    wait_until(lambda: listens(made.port) or process.poll() is not None, 15, "a listening broker")
    assert process.poll() is None, (folder / "log").read_text()
    yield made
    processes.close()


class TlsClient:
    """An MQTT client with credentials, which collects reason codes and messages."""

    def __init__(self, port: int, credentials: Credentials | None, ca: Path) -> None:
        self.reasons: queue.Queue[Any] = queue.Queue()
        self.received: queue.Queue[tuple[str, bytes]] = queue.Queue()
        self.client = Client(CallbackAPIVersion.VERSION2, protocol=MQTTProtocolVersion.MQTTv5)
        context = ssl.create_default_context(cafile=str(ca))
        if credentials is not None:
            context.load_cert_chain(credentials.cert, credentials.key)
        self.client.tls_set_context(context)
        self.client.on_connect = lambda c, u, f, reason, p: self.reasons.put(str(reason))
        self.client.on_disconnect = lambda c, u, f, reason, p: self.reasons.put(f"gone: {reason}")
        self.client.on_publish = lambda c, u, mid, reason, p: self.reasons.put(str(reason))
        self.client.on_subscribe = lambda c, u, mid, reasons, p: self.reasons.put(str(reasons[0]))
        self.client.on_message = lambda c, u, m: self.received.put((m.topic, m.payload))
        self.client.connect("127.0.0.1", port)
        self.client.loop_start()

    def reason(self) -> str:
        return str(self.reasons.get(timeout=15))

    def publish(self, topic: str, payload: bytes = b"{}") -> str:
        self.client.publish(topic, payload, qos=1)
        return self.reason()

    def subscribe(self, topic: str) -> str:
        self.client.subscribe(topic, options=SubscribeOptions(qos=1))
        return self.reason()

    def close(self) -> None:
        self.client.disconnect()
        self.client.loop_stop()


@pytest.fixture
def connect(kit: Kit) -> Iterator[Any]:
    clients: list[TlsClient] = []

    def make(credentials: Credentials | None) -> TlsClient:
        clients.append(TlsClient(kit.port, credentials, kit.folder / "ca" / "ca.crt"))
        return clients[-1]

    yield make
    for client in clients:
        client.close()


def test_a_device_publishes_below_its_own_name_only(kit: Kit, connect: Any) -> None:
    device = connect(enroll(kit.folder, "cam-1").credentials)
    assert device.reason() == "Success"
    for kind in ("status", "window", "event", "profile", "cmd/result"):
        assert device.publish(f"eyas/hall/cam-1/{kind}") in ("Success", "No matching subscribers")
    refused = [
        "eyas/hall/cam-2/window",
        "eyas/hall/cam-1/ack",
        "eyas/hall/cam-1/cmd",
        "eyas/hall/cam-2/cmd",
        "eyas/hall/other/cam-1/window",
        "other/hall/cam-1/window",
    ]
    for topic in refused:
        assert device.publish(topic) == "Not authorized", topic


def test_a_device_reads_only_its_own_commands(kit: Kit, connect: Any) -> None:
    one, host = connect(enroll(kit.folder, "cam-1").credentials), connect(kit.host)
    assert (one.reason(), host.reason()) == ("Success", "Success")
    one.subscribe("eyas/#")
    assert one.subscribe("eyas/hall/cam-1/cmd") == "Granted QoS 1"
    two = connect(enroll(kit.folder, "cam-2").credentials)
    assert two.reason() == "Success"
    two.publish("eyas/hall/cam-2/window", b"private")
    host.publish("eyas/hall/cam-2/cmd", b"for another")
    host.publish("eyas/hall/cam-1/cmd", b"for me")
    assert one.received.get(timeout=15) == ("eyas/hall/cam-1/cmd", b"for me")


def test_the_host_reads_everything_and_publishes_no_telemetry(kit: Kit, connect: Any) -> None:
    host, device = connect(kit.host), connect(enroll(kit.folder, "cam-3").credentials)
    assert (host.reason(), device.reason()) == ("Success", "Success")
    assert host.subscribe("eyas/+/+/window") == "Granted QoS 1"
    device.publish("eyas/hall/cam-3/window", b"{}")
    assert host.received.get(timeout=15) == ("eyas/hall/cam-3/window", b"{}")
    assert host.publish("eyas/hall/cam-3/window") == "Not authorized"


def test_the_broker_rejects_oversized_packets(kit: Kit, connect: Any) -> None:
    device = connect(enroll(kit.folder, "cam-1").credentials)
    assert device.reason() == "Success"
    large = device.publish("eyas/hall/cam-1/event", b"x" * 300_000)
    assert large in ("Success", "No matching subscribers"), "the collector quarantines and acknowledges it"
    assert device.publish("eyas/hall/cam-1/event", b"x" * 2_000_000).startswith("gone: ")


def refused(kit: Kit, credentials: Credentials | None) -> bool:
    """Whether the broker rejects a connection with these credentials."""
    try:
        client = TlsClient(kit.port, credentials, kit.folder / "ca" / "ca.crt")
    except (ssl.SSLError, OSError):
        return True
    try:
        return client.reason() != "Success"
    finally:
        client.close()


def test_rejected_certificates(kit: Kit, tmp_path: Path) -> None:
    authority = Authority(kit.folder / "ca")
    assert not refused(kit, authority.issue(tmp_path / "good", "cam-9"))
    assert refused(kit, authority.issue(tmp_path / "expired", "cam-9", days=-1)), "expired"
    assert refused(kit, Authority(tmp_path / "theirs").issue(tmp_path / "forged", "cam-9")), "another authority"
    assert refused(kit, None), "without a certificate"


def test_the_collector_works_with_the_kit(kit: Kit, connect: Any, tmp_path: Path) -> None:
    access = BrokerAccess(broker=f"127.0.0.1:{kit.port}", ca=kit.host.ca, certificate=kit.host.cert, key=kit.host.key)
    device = connect(enroll(kit.folder, "cam-4").credentials)
    assert device.reason() == "Success"
    assert device.subscribe("eyas/s/cam-4/ack") == "Granted QoS 1"
    with (
        Store(f"sqlite:///{tmp_path / 'fleet.db'}") as store,
        Collector(store, access, CollectorSettings(name="t")) as collector,
    ):
        thread = threading.Thread(target=collector.run)
        thread.start()
        try:
            wait_until(lambda: collector.status.state is LinkState.CONNECTED, what="the connection")
            spool = str(uuid.uuid4())
            device.publish("eyas/s/cam-4/window", encode(window("cam-4", spool, 0)))
            topic, ack = device.received.get(timeout=15)
        finally:
            collector.stop()
            thread.join(20)
        assert store.counts() == {"window": 1, "quarantine": 0}
    assert topic == "eyas/s/cam-4/ack"
    assert spool.encode() in ack


def test_keys_are_private_and_existing_files_stay(tmp_path: Path) -> None:
    first = prepare(tmp_path)
    keys = {str(key.relative_to(tmp_path)): stat.S_IMODE(key.stat().st_mode) for key in tmp_path.rglob("*.key")}
    shared = 0o640 if os.geteuid() == 0 else 0o600  # root hands it to the group of the user that mosquitto runs as
    assert keys == {"ca/ca.key": 0o600, "host/client.key": 0o600, "broker/server.key": shared}
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.[ck][re][ty]")}
    assert len(before) >= 6
    assert prepare(tmp_path) == first
    assert {path: path.read_bytes() for path in before} == before
    other = prepare(tmp_path, names=["broker.lan"])
    assert other.hosts[0] == "broker.lan"
    renewed = x509.load_pem_x509_certificate((tmp_path / "broker" / "server.crt").read_bytes())
    names = renewed.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert "broker.lan" in names.get_values_for_type(x509.DNSName)
    assert "127.0.0.1" in [str(a) for a in names.get_values_for_type(x509.IPAddress)]
    assert (tmp_path / "ca" / "ca.key").read_bytes() == before[tmp_path / "ca" / "ca.key"]


def test_bind_has_to_be_an_address(tmp_path: Path) -> None:
    with pytest.raises(LinkError, match="an address is needed"):
        prepare(tmp_path, bind="eth0")


def test_the_embedded_broker_serves_collector_and_watcher(tmp_path: Path) -> None:
    port, processes = free_port(), Processes(tmp_path)
    script = "import sys; from eyas_host.fleet.broker.embedded import serve_embedded; serve_embedded(int(sys.argv[1]))"
    answers: queue.Queue[bytes] = queue.Queue()
    client = Client(CallbackAPIVersion.VERSION2, client_id="cam-1", protocol=MQTTProtocolVersion.MQTTv311)
    client.on_connect = lambda c, *_: c.subscribe("eyas/s/cam-1/ack", 1)
    client.on_message = lambda c, u, m: answers.put(m.payload)
    url = f"sqlite:///{tmp_path / 'fleet.db'}"
    try:
        broker = processes.start(sys.executable, "-u", "-c", script, str(port))
        wait_until(lambda: listens(port) or broker.poll() is not None, what="a listening broker")
        processes.collector(port, url)
        processes.connected()
        hang_up_at_once(port)
        with Subscriber(BrokerAccess(broker=f"127.0.0.1:{port}")) as subscriber:
            wait_until(
                lambda: list(subscriber.take(0.1)) or subscriber.status.state is LinkState.CONNECTED,
                what="the watcher's connection",
            )
            client.connect("127.0.0.1", port)
            client.loop_start()
            spool = str(uuid.uuid4())
            client.publish("eyas/s/cam-1/window", encode(window("cam-1", spool, 0)), qos=1)
            assert spool.encode() in answers.get(timeout=20)
            seen: list[Any] = []
            wait_until(lambda: seen.extend(subscriber.take(0.1)) or seen, what="the message")
    finally:
        client.disconnect()
        client.loop_stop()
        processes.close()
    with Store(url) as store:
        assert store.counts() == {"window": 1, "quarantine": 0}
    printed = (tmp_path / "log").read_text()
    assert printed == f"broker: mqtt on 127.0.0.1:{port}, for a first try: no TLS, no access control, no persistence\n"


def hang_up_at_once(port: int) -> None:
    """Send a CONNECT of MQTT 5, as every first connection does, and reset the connection."""
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        connection.sendall(b"\x10\x0d\x00\x04MQTT\x05\x02\x00\x0a\x00\x00\x00")


def test_a_port_in_use_is_one_line(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = eyas(tmp_path, "broker", "--embedded", "--port", port)
    assert done.code == 2 and done.out == ""
    assert done.err == f"eyas: 127.0.0.1:{port}: the embedded broker cannot listen there ({os.strerror(98)})\n"
