"""`eyas broker` as an administrator runs it: its user, and devices that are expelled while it serves others."""

from __future__ import annotations

import os
import pwd
import ssl
import stat
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest
from cryptography import x509
from paho.mqtt.client import CallbackAPIVersion, Client, MQTTProtocolVersion

from eyas_device.errors import LinkError
from eyas_device.telemetry.messages import Status, encode
from eyas_host.fleet.broker.account import broker_account, check_access
from eyas_host.fleet.broker.client import BrokerAccess
from eyas_host.fleet.broker.enroll import enroll
from eyas_host.fleet.broker.expel import expel
from eyas_host.fleet.broker.kit import prepare
from eyas_host.fleet.broker.pki import Authority, CredentialError, Credentials
from eyas_host.fleet.broker.revocation import load_list, revoked
from eyas_host.fleet.broker.supervise import _ConnectionLog
from tests.support.brokers import free_port
from tests.support.fleet_parts import Processes, listens, needs_mosquitto, wait_until

SPOOL = str(uuid.UUID(int=7))


class RunningBroker:
    """`eyas broker` in a process of its own; `before` is Python that it runs first."""

    def __init__(self, folder: Path, before: str = "") -> None:
        self.fleet, self.port = folder / "fleet", free_port()
        self.processes = Processes(folder)
        script = f"{before}; from eyas_host.cli.app import main; main()".removeprefix("; ")
        arguments = ("broker", "--kit", str(self.fleet), "--port", str(self.port))
        self.process = self.processes.start(sys.executable, "-c", script, *arguments, log="eyas.log")
        wait_until(lambda: listens(self.port) or self.process.poll() is not None, 60, "a listening broker")
        assert self.process.poll() is None, self.log

    @property
    def log(self) -> str:
        return (self.processes.folder / "eyas.log").read_text()

    @property
    def mosquitto(self) -> int:
        """Its process id."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        return int(children[0])


@pytest.fixture(scope="module")
def broker(open_folder: Path) -> Iterator[RunningBroker]:
    needs_mosquitto()
    running = RunningBroker(open_folder)
    yield running
    running.process.terminate()
    assert running.process.wait(20) == 0
    running.processes.close()


class Device:
    """An enrolled device that reconnects by itself, with a retained status and a last will."""

    def __init__(self, broker: RunningBroker, name: str, credentials: Credentials, client_id: str = "") -> None:
        self.name, self.connects, self.losses = name, 0, 0
        self.client = Client(
            CallbackAPIVersion.VERSION2, client_id=client_id or f"eyas-s-{name}", protocol=MQTTProtocolVersion.MQTTv5
        )
        context = ssl.create_default_context(cafile=str(credentials.ca))
        context.load_cert_chain(credentials.cert, credentials.key)
        self.client.tls_set_context(context)
        self.client.will_set(f"eyas/s/{name}/status", encode(Status(device=name, state="lost")), 1, True)
        self.client.reconnect_delay_set(0.05, 0.2)
        self.client.on_connect = self._on_connect
        self.client.on_disconnect = self._on_disconnect
        self.client.connect_async("127.0.0.1", broker.port, keepalive=5)
        self.client.loop_start()

    def _on_connect(self, client: Client, userdata: object, flags: object, reason: object, *_: object) -> None:
        if str(reason) == "Success":
            self.connects += 1
            status = Status(device=self.name, spool=SPOOL, sequence=self.connects, state="online")
            client.publish(f"eyas/s/{self.name}/status", encode(status), 1, True)
            client.publish(f"eyas/s/{self.name}/answer", b'{"state":"off"}', 1, True)

    def _on_disconnect(self, *_: object) -> None:
        self.losses += 1

    @property
    def is_connected(self) -> bool:
        return self.connects > 0 and self.client.is_connected()


@pytest.fixture
def connect(broker: RunningBroker) -> Iterator[Callable[..., Device]]:
    made: list[Device] = []

    def make(name: str, credentials: Credentials, client_id: str = "") -> Device:
        made.append(Device(broker, name, credentials, client_id))
        wait_until(lambda: made[-1].is_connected, 15, "the connection")
        return made[-1]

    yield make
    for device in made:
        device.client.disconnect()
        device.client.loop_stop()


def retained(broker: RunningBroker, kind: str = "status") -> dict[str, bytes]:
    """Messages of a kind that a new subscriber gets at once."""
    host = broker.fleet / "host"
    access = BrokerAccess(
        broker=f"127.0.0.1:{broker.port}", ca=host / "ca.crt", certificate=host / "client.crt", key=host / "client.key"
    )
    found: dict[str, bytes] = {}
    client = Client(CallbackAPIVersion.VERSION2, protocol=MQTTProtocolVersion.MQTTv5)
    access.apply(client)
    client.on_connect = lambda c, *_: c.subscribe(f"eyas/+/+/{kind}", 1)
    client.on_message = lambda c, u, message: found.update({message.topic: message.payload})
    client.connect(*access.address)
    client.loop_start()
    time.sleep(0.7)
    client.disconnect()
    client.loop_stop()
    return found


def test_mosquitto_runs_as_a_user_that_alone_reads_its_key(broker: RunningBroker) -> None:
    user = Path(f"/proc/{broker.mosquitto}").stat().st_uid
    key = (broker.fleet / "broker" / "server.key").stat()
    assert stat.S_IMODE(key.st_mode) & 0o007 == 0
    if os.geteuid() != 0:
        assert user == os.geteuid()
        return
    assert user != 0
    group = pwd.getpwuid(user).pw_gid
    assert (key.st_uid, key.st_gid, stat.S_IMODE(key.st_mode)) == (0, group, 0o640)
    for name in ("ca/ca.key", "host/client.key"):
        assert stat.S_IMODE((broker.fleet / name).stat().st_mode) == 0o600
    capabilities = Path(f"/proc/{broker.mosquitto}/status").read_text()
    assert "CapEff:\t0000000000000000" in capabilities
    stranger = subprocess.run(
        ["cat", broker.fleet / "broker" / "server.key"], user=65534, group=65534, extra_groups=[], capture_output=True
    )
    assert stranger.returncode != 0 and stranger.stdout == b""


def test_an_expelled_device_is_out_and_others_stay(broker: RunningBroker, connect: Callable[..., Device]) -> None:
    """Also with earlier certificates, other client ids and a resumed TLS session; enrolled again, it is back."""
    first = enroll(broker.fleet, "cam-1").credentials
    kept = Credentials(
        *(path.rename(path.with_suffix(f".old{path.suffix}")) for path in (first.ca, first.cert, first.key))
    )
    second = enroll(broker.fleet, "cam-1").credentials
    old, new = connect("cam-1", kept, "of before"), connect("cam-1", second, "x u'cam-2')")
    other = connect("cam-2", enroll(broker.fleet, "cam-2").credentials)
    session = tls_session(broker, second)
    assert set(retained(broker)) == {"eyas/s/cam-1/status", "eyas/s/cam-2/status"}
    silent = _tls(broker, second, None)  # passed TLS, and logs in after the list was reloaded

    assert expel(broker.fleet, "cam-1").certificates == 2
    wait_until(lambda: old.losses and new.losses, 20, "the end of its connections")
    wait_until(lambda: set(retained(broker)) == {"eyas/s/cam-2/status"}, 20, "the end of its status")
    wait_until(lambda: set(retained(broker, "answer")) == {"eyas/s/cam-2/answer"}, 20, "the end of its answer")
    connects = old.connects, new.connects
    losses = old.losses, new.losses
    wait_until(lambda: old.losses > losses[0] + 3 and new.losses > losses[1] + 3, 20, "tries to come back")
    assert (old.connects, new.connects) == connects
    assert not old.is_connected and not new.is_connected
    assert not resumes(broker, second, session)
    assert (other.connects, other.losses) == (1, 0)
    silent.sendall(bytes.fromhex("101300044d5154540402003c0007") + b"silent-")  # MQTT 3.1.1 CONNECT
    silent.settimeout(10)
    assert silent.recv(4) == bytes.fromhex("20020000"), "accepted, as its certificate was when it was shown"
    assert silent.recv(4) == b"", "and ended"
    silent.close()
    time.sleep(3)  # the broker looks for the expelled device's status once more, and would find that of the next one

    assert expel(broker.fleet, "cam-1").certificates == 0, "it is out already"
    back = connect("cam-1", enroll(broker.fleet, "cam-1").credentials, "third")
    assert expel(broker.fleet, "cam-2").certificates == 1
    wait_until(lambda: other.losses, 20, "the end of the other one")
    assert back.is_connected and back.losses == 0
    assert not old.is_connected and not new.is_connected, "an earlier list still holds"
    wait_until(lambda: set(retained(broker)) == {"eyas/s/cam-1/status"}, 20, "the end of its status")


def tls_session(broker: RunningBroker, credentials: Credentials) -> ssl.SSLSession:
    """A TLS 1.2 session that could be resumed without showing the certificate again."""
    with _tls(broker, credentials, None) as stream:
        assert stream.session is not None
        return stream.session


def resumes(broker: RunningBroker, credentials: Credentials, session: ssl.SSLSession) -> bool:
    try:
        with _tls(broker, credentials, session) as stream:
            return stream.session_reused
    except (ssl.SSLError, OSError):
        return False


def _tls(broker: RunningBroker, credentials: Credentials, session: ssl.SSLSession | None) -> ssl.SSLSocket:
    import socket

    context = _CONTEXTS.setdefault(credentials.cert, ssl.create_default_context(cafile=str(credentials.ca)))
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    context.load_cert_chain(credentials.cert, credentials.key)
    plain = socket.create_connection(("127.0.0.1", broker.port), timeout=5)
    return context.wrap_socket(plain, server_hostname="127.0.0.1", session=session)


_CONTEXTS: dict[Path, ssl.SSLContext] = {}


def test_a_broker_whose_log_is_strange_restarts_to_end_connections(open_folder: Path) -> None:
    needs_mosquitto()
    (open_folder / "strange").mkdir()
    strange = "import re, eyas_host.fleet.broker.supervise as module; module._CONNECTED = re.compile('never')"
    broker = RunningBroker(open_folder / "strange", strange)
    devices = [Device(broker, name, enroll(broker.fleet, name).credentials) for name in ("cam-1", "cam-2")]
    try:
        wait_until(lambda: all(device.is_connected for device in devices), 15, "the connections")
        expel(broker.fleet, "cam-1")
        wait_until(lambda: devices[1].connects == 2, 20, "the other's return")
        wait_until(lambda: set(retained(broker)) == {"eyas/s/cam-2/status"}, 20, "the end of its status")
        assert devices[0].connects == 1 and not devices[0].is_connected
    finally:
        for device in devices:
            device.client.disconnect()
            device.client.loop_stop()
        broker.process.terminate()
        assert broker.process.wait(20) == 0
        broker.processes.close()


def test_a_damaged_list_leaves_the_one_of_before(broker: RunningBroker, connect: Callable[..., Device]) -> None:
    """As a copy from another machine that is not complete yet."""
    path = broker.fleet / "broker" / "ca.crl"
    before = path.read_bytes()
    device = connect("cam-5", enroll(broker.fleet, "cam-5").credentials)
    try:
        path.write_bytes(before[: len(before) // 2])
        wait_until(lambda: "the list of before stays in use" in broker.log, 10, "the line")
        assert device.is_connected and device.losses == 0
        fresh = connect("cam-6", enroll(broker.fleet, "cam-6").credentials)
        assert fresh.is_connected
    finally:
        path.write_bytes(before)


def test_the_list_is_valid_as_long_as_the_authority(tmp_path: Path) -> None:
    """The library of the broker accepts a device today and in nine years, and rejects it once it is expelled."""
    fleet = tmp_path / "fleet"
    prepare(fleet)
    authority = Authority(fleet / "ca")
    good = authority.issue(fleet / "devices" / "good", "good", days=3600)
    bad = authority.issue(fleet / "devices" / "bad", "bad", days=3600)
    for number in range(3):
        enroll(fleet, f"cam-{number}")
        expel(fleet, f"cam-{number}")
    expel(fleet, "bad")
    now = datetime.now(UTC).timestamp()
    for years in (0.0, 9.0):
        for credentials, words in ((good, "OK"), (bad, "certificate revoked")):
            command = [
                "openssl",
                "verify",
                "-crl_check",
                "-CAfile",
                fleet / "ca/ca.crt",
                "-CRLfile",
                fleet / "ca/ca.crl",
            ]
            done = subprocess.run(
                [*command, "-attime", str(int(now + years * 365 * 86400)), credentials.cert],
                capture_output=True,
                text=True,
            )
            assert words in done.stdout + done.stderr, (years, done)
    assert sorted(revoked(load_list(fleet / "ca" / "ca.crl", authority.certificate)).values()) == [
        "bad",
        "cam-0",
        "cam-1",
        "cam-2",
    ]


def test_each_list_is_later_than_the_one_before(tmp_path: Path) -> None:
    """OpenSSL prefers the later of two lists; a broker that reloads may know both."""
    fleet = tmp_path / "fleet"
    prepare(fleet)
    dates = []
    for number in range(4):
        enroll(fleet, f"cam-{number}")
        expel(fleet, f"cam-{number}")
        dates.append(x509.load_pem_x509_crl((fleet / "ca" / "ca.crl").read_bytes()).last_update_utc)
    assert dates == sorted(set(dates))
    assert dates[-1] < datetime.now(UTC)


def test_who_cannot_be_expelled(tmp_path: Path) -> None:
    fleet = tmp_path / "fleet"
    with pytest.raises(CredentialError, match="no certificate authority"):
        expel(fleet, "cam-1")
    prepare(fleet)
    enroll(fleet, "cam-1")
    before = (fleet / "ca" / "ca.crl").read_bytes()
    for name, words in (("cam-2", "enrolled devices: cam-1"), ("eyas-host", "reserved"), ("../host", "never enrolled")):
        with pytest.raises(LinkError, match=words):
            expel(fleet, name)
    (fleet / "ca" / "ca.key").unlink()
    with pytest.raises(CredentialError, match="put it back"):
        expel(fleet, "cam-1")
    assert (fleet / "ca" / "ca.crl").read_bytes() == before


def test_a_broker_without_the_key_takes_the_list_that_is_copied_to_it(tmp_path: Path) -> None:
    office, site = tmp_path / "office", tmp_path / "site"
    prepare(office)
    enroll(office, "cam-1")
    subprocess.run(["cp", "-r", office, site], check=True)
    (site / "ca" / "ca.key").unlink()
    expel(office, "cam-1")
    newer = (office / "ca" / "ca.crl").read_bytes()
    (site / "broker" / "ca.crl").write_bytes(newer)
    kit = prepare(site)
    assert (site / "broker" / "ca.crl").read_bytes() == newer, "an older list of its own does not come back"
    assert f"crlfile {kit.folder / 'broker' / 'ca.crl'}" in kit.config.read_text()
    prepare(tmp_path / "another")
    (site / "broker" / "ca.crl").write_bytes((tmp_path / "another" / "ca" / "ca.crl").read_bytes())
    with pytest.raises(CredentialError, match="not signed by this fleet's authority"):
        prepare(site)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root's broker changes its user")
def test_a_link_in_the_brokers_data_gives_nothing_away(tmp_path: Path) -> None:
    """Whoever took mosquitto over may put links there; root's next start must not hand it the files behind them."""
    kit = prepare(tmp_path / "fleet")
    secret = tmp_path / "secret"
    secret.write_text("of root")
    secret.chmod(0o600)
    (kit.config.parent / "data" / "mosquitto.db").symlink_to(secret)
    prepare(tmp_path / "fleet")
    assert (secret.stat().st_uid, secret.stat().st_gid, stat.S_IMODE(secret.stat().st_mode)) == (0, 0, 0o600)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root's broker changes its user")
def test_a_folder_that_is_closed_to_the_brokers_user(tmp_path: Path) -> None:
    closed = tmp_path / "root-only"
    closed.mkdir(mode=0o700)
    kit = prepare(closed / "fleet")
    account = broker_account()
    assert account is not None and account.pw_uid != 0
    with pytest.raises(CredentialError, match=r"closed to the user .*chmod o\+x"):
        check_access(kit.config.parent, account)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root's broker changes its user")
def test_whose_user_the_broker_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    accounts = {account.pw_name: account for account in pwd.getpwall()}
    chosen = []
    for there, sudo in ((True, ""), (False, str(accounts["daemon"].pw_uid)), (False, ""), (False, "0"), (False, "x")):
        left = [account for account in accounts.values() if there or account.pw_name != "mosquitto"]
        monkeypatch.setattr("pwd.getpwall", lambda left=left: left)
        monkeypatch.setenv("SUDO_UID", sudo)
        account = broker_account()
        assert account is not None
        chosen.append(account.pw_name)
    assert chosen == ["mosquitto", "daemon", "nobody", "nobody", "nobody"]


def test_a_log_that_cannot_be_read_is_noticed() -> None:
    """Then the broker restarts, which ends the connections of an expelled device in any case."""
    line = "1795898720: New client connected from 127.0.0.1:5 as {} (p5, c1, k60, u'{}')."
    log = _ConnectionLog()
    for client_id, user in (("a", "cam-1"), ("b (p5, c1, k60, u'cam-2').", "cam-1"), ("c", "cam-2")):
        log.read(line.format(client_id, user))
    assert log.take("cam-1") == {"a", "b (p5, c1, k60, u'cam-2')."}
    assert log.take("cam-1") == set() and log.take("cam-2") == {"c"}
    assert log.complete
    log.read("1795898720: New client connected from 127.0.0.1:5, in words of another version.")
    assert not log.complete
    many = _ConnectionLog()
    for number in range(1000):
        many.read(line.format(number, "cam-1"))
    assert not many.complete and len(many.take("cam-1")) <= 100
