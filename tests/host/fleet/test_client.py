"""The host's connection to a broker: what went wrong is said in words, by every verb in the same ones."""

from __future__ import annotations

import io
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from eyas_device.errors import LinkError
from eyas_device.telemetry.mqtt_client import LinkState
from eyas_host.fleet.broker.client import BrokerAccess
from eyas_host.fleet.broker.kit import Kit, prepare
from eyas_host.fleet.broker.pki import Authority
from eyas_host.fleet.collect.collector import Collector
from eyas_host.fleet.collect.settings import CollectorReport, CollectorSettings
from eyas_host.fleet.store.database import Store
from eyas_host.fleet.watch.live import stream
from eyas_host.fleet.watch.subscriber import Subscriber
from tests.support.brokers import free_port
from tests.support.fleet_parts import Processes, listens, needs_mosquitto, wait_until


@pytest.fixture(scope="module")
def kit(open_folder: Path) -> Iterator[Kit]:
    """A running broker of the kit."""
    made, processes = prepare(open_folder / "fleet", port=free_port()), Processes(open_folder)
    process = processes.start(needs_mosquitto(), "-c", str(made.config))
    wait_until(lambda: listens(made.port) or process.poll() is not None, 15, "a listening broker")
    yield made
    processes.close()


def access(kit: Kit, days: float | None = None) -> BrokerAccess:
    """The host's access, with a certificate that ends after so many days."""
    if days is None:
        host = kit.host
    else:
        host = Authority(kit.folder / "ca").issue(kit.folder / f"host{days}", "eyas-host", days=days)
    return BrokerAccess(broker=f"127.0.0.1:{kit.port}", ca=host.ca, certificate=host.cert, key=host.key)


def watched(one: BrokerAccess) -> str:
    """What the watcher says first."""
    with Subscriber(one) as subscriber:
        deadline = time.monotonic() + 20
        while subscriber.status.state is LinkState.CONNECTING and time.monotonic() < deadline:
            list(subscriber.take(0.1))
        return str(subscriber.status)


def collected(one: BrokerAccess, folder: Path) -> str:
    """What the collector says first."""
    reports: list[CollectorReport] = []

    def on_report(report: CollectorReport) -> None:
        reports.append(report)
        if report.state != "connecting":
            collector.stop()

    settings = CollectorSettings(name="x", report_s=0.1)
    with Store(f"sqlite:///{folder / 'fleet.db'}") as store, Collector(store, one, settings, on_report) as collector:
        collector.run()
    return next(f"{report.state}: {report.detail}" for report in reports if report.state != "connecting")


def test_an_expired_certificate_of_the_host(kit: Kit, tmp_path: Path) -> None:
    expired = access(kit, -0.5)
    for says in (watched(expired), collected(expired, tmp_path)):
        assert "host-0.5/client.crt expired on 20" in says
    assert watched(access(kit)) == "connected"
    assert collected(access(kit), tmp_path).startswith("connected")


def test_a_port_with_tls_and_another_authority(kit: Kit, tmp_path: Path) -> None:
    plain = BrokerAccess(broker=f"127.0.0.1:{kit.port}")
    with Subscriber(plain) as subscriber:
        wait_until(lambda: [*subscriber.take(0.1)] or "speaks TLS on this port" in str(subscriber.status))
    other = Authority(tmp_path / "other").cert
    assert f"not signed by {other}" in watched(BrokerAccess(broker=f"127.0.0.1:{kit.port}", ca=other))


@pytest.mark.parametrize("broker", ["ws://h", "u:pw@h", "BROKER:8883", "h:0", "mqtt://h/path"])
def test_an_address_that_is_none_is_refused_at_once(broker: str) -> None:
    with pytest.raises(LinkError, match="--broker") as caught:
        stream(BrokerAccess(broker=broker), io.StringIO(), seconds=1)
    assert "pw" not in str(caught.value)


def test_the_default_port_follows_from_tls(tmp_path: Path) -> None:
    for address, port in (("::1", 8883), ("h", 8883), ("[::1]:1", 1), ("mqtts://h", 8883)):
        assert BrokerAccess(broker=address, ca=tmp_path / "ca").address.port == port
    for address, port in (("::1", 1883), ("h", 1883), ("mqtts://h", 8883)):
        assert BrokerAccess(broker=address).address.port == port


def test_a_password_file_of_a_windows_editor(tmp_path: Path) -> None:
    import subprocess

    from tests.support.system_parts import require

    (tool,) = require("mosquitto_passwd")
    subprocess.run([tool, "-b", "-c", tmp_path / "users", "ü", "secret"], check=True, capture_output=True)
    port, processes = free_port(), Processes(tmp_path)
    processes.broker(port, f"user root\nallow_anonymous false\npassword_file {tmp_path / 'users'}")
    (path := tmp_path / "password").write_bytes(b"\xef\xbb\xbfsecret\r\n")
    given = BrokerAccess(broker=f"127.0.0.1:{port}", user="ü", password_file=path, insecure=True)
    try:
        assert watched(given) == "connected"
        path.write_text("another\n")
        for says in (watched(given), collected(given, tmp_path)):
            assert "the user ü with this password is not accepted (Not authorized)" in says
    finally:
        processes.close()


def test_collectors_whose_names_join_to_one_do_not_meet(tmp_path: Path) -> None:
    one = BrokerAccess(broker="127.0.0.1:1")
    with (
        Store(f"sqlite:///{tmp_path / 'a.db'}") as store,
        Collector(store, one, CollectorSettings(group="a-b", name="c")) as first,
        Collector(store, one, CollectorSettings(group="a", name="b-c")) as second,
    ):
        ids = {one._connector.make_client()._client_id for one in (first, second)}
        assert len(ids) == 2 and all(len(one) <= 23 for one in ids)
