"""Certificates that are wrong, late or of somebody else, at real brokers: what the state and the doctor say."""

from __future__ import annotations

import codecs
import contextlib
import ipaddress
import os
import ssl
import time
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from eyas_device.config import Config
from eyas_device.doctor import mqtt as doctor_mqtt
from eyas_device.doctor.finding import Finding
from eyas_device.errors import LinkError
from eyas_device.telemetry.certificates import parse_certificate, read_certificates
from eyas_device.telemetry.messages import Status
from eyas_device.telemetry.mqtt import Uplink, UplinkSettings
from eyas_device.telemetry.mqtt_client import LinkState
from eyas_device.telemetry.spool.spool import Spool
from eyas_device.telemetry.tls import Security, read_password
from tests.support.brokers import Broker

NOW = datetime.now(timezone.utc).replace(microsecond=0)
DAY = timedelta(days=1)


class Authority:
    """Signs certificates of any lifetime."""

    def __init__(self, folder: Path, name: str, *, days: tuple[float, float] = (-1000, 1000)) -> None:
        self.folder, self.name = folder, name
        self._key = ec.generate_private_key(ec.SECP256R1())
        self.ca = self._write(name, self._build(name, name, self._key, days, ca=True), self._key)[0]

    def issue(self, name: str, days: tuple[float, float], *, host: str = "") -> tuple[str, str]:
        """Files of a certificate and its key, valid from and until so many days from now."""
        key = ec.generate_private_key(ec.SECP256R1())
        return self._write(name, self._build(name, self.name, key, days, host=host), key)

    def _build(self, name: str, issuer: str, key: Any, days: tuple[float, float], *, ca: bool = False, host: str = ""):  # type: ignore[no-untyped-def]
        builder = (
            x509.CertificateBuilder()
            .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]))
            .issuer_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, issuer)]))
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(NOW + days[0] * DAY)
            .not_valid_after(NOW + days[1] * DAY)
            .add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
        )
        if host:
            names = [x509.IPAddress(ipaddress.ip_address(host)) if host[0].isdigit() else x509.DNSName(host)]
            builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
        return builder.sign(self._key, hashes.SHA256())

    def _write(self, name: str, certificate: x509.Certificate, key: Any) -> tuple[str, str]:
        cert, private = self.folder / f"{name}.crt", self.folder / f"{name}.key"
        cert.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
        private.write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            )
        )
        return str(cert), str(private)


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("pki")
    authority, other = Authority(folder, "fleet"), Authority(folder, "other")
    old = Authority(folder, "old", days=(-500, -2))
    return {
        "ca": authority.ca,
        "other ca": other.ca,
        "old ca": old.ca,
        "server": authority.issue("server", (-1, 300), host="127.0.0.1"),
        "server expired": authority.issue("server-expired", (-30, -3), host="127.0.0.1"),
        "server tomorrow": authority.issue("server-tomorrow", (3, 300), host="127.0.0.1"),
        "server soon": authority.issue("server-soon", (-30, 11), host="127.0.0.1"),
        "server elsewhere": authority.issue("server-elsewhere", (-1, 300), host="broker.example"),
        "good": authority.issue("good", (-1, 300)),
        "expired": authority.issue("expired", (-30, -3)),
        "tomorrow": authority.issue("tomorrow", (3, 300)),
        "soon": authority.issue("soon", (-30, 10)),
        "stranger": other.issue("stranger", (-1, 300)),
        "none": ("", ""),
    }


@pytest.fixture
def tls_broker(make_broker: Callable[..., Broker], pki: dict[str, Any]) -> Callable[[str], Broker]:
    """Makes a running broker with one of the certificates that asks for the device's."""

    def make(server: str = "server", more: str = "") -> Broker:
        cert, key = pki[server]
        options = f"user root\nallow_anonymous true\ncafile {pki['ca']}\ncertfile {cert}\nkeyfile {key}\n"
        return make_broker(options=f"{options}require_certificate true\n{more}").start()

    return make


@contextlib.contextmanager
def uplinked(port: int, security: Security) -> Iterator[Uplink]:
    with (
        Spool(None, device="cam") as spool,
        Uplink(
            UplinkSettings(host="127.0.0.1", port=port, site="s", device="cam", security=security),
            spool,
            will=Status(device="cam"),
            make_status=lambda: Status(state="online"),
            on_command=lambda payload: None,
        ) as uplink,
    ):
        uplink.start()
        yield uplink


def wait_until(true: Callable[[], object], timeout: float = 20) -> None:
    deadline = time.monotonic() + timeout
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def state_of(port: int, security: Security) -> str:
    """The first state that says something."""
    with uplinked(port, security) as uplink:
        wait_until(lambda: uplink.status.state is not LinkState.CONNECTING)
        return str(uplink.status)


def examined(port: int, security: Security) -> Finding:
    """What the doctor says."""
    config = Config()
    telemetry = replace(
        config.telemetry,
        broker=f"127.0.0.1:{port}",
        ca=security.ca,
        certificate=security.certificate,
        key=security.key,
    )
    return doctor_mqtt.examine(replace(config, telemetry=telemetry), telemetry.address)


def day(offset: float) -> str:
    return f"{NOW + offset * DAY:%Y-%m-%d}"


@pytest.mark.parametrize("tls_version", ["tlsv1.2", "tlsv1.3"])
@pytest.mark.parametrize(
    ("client", "server", "ca", "says"),
    [
        ("expired", "server", "ca", ["expired.crt", "expired on", day(-3)]),
        ("tomorrow", "server", "ca", ["tomorrow.crt", "valid from", day(3), "the clock is probably wrong"]),
        ("stranger", "server", "ca", ["the broker refuses the certificate", "stranger.crt", "does not know"]),
        ("none", "server", "ca", ["asks for a client certificate"]),
        ("good", "server expired", "ca", ["the broker's certificate expired on", day(-3)]),
        ("good", "server tomorrow", "ca", ["the broker's certificate is valid from", day(3), "clock is probably"]),
        ("good", "server elsewhere", "ca", ["the broker's certificate is not for 127.0.0.1 but for broker.example"]),
        ("good", "server", "other ca", ["not signed by", "other.crt"]),
        ("good", "server", "old ca", ["old.crt", "expired on", day(-2)]),
    ],
)
def test_a_certificate_that_is_refused_is_named(
    pki: dict[str, Any], tls_broker: Any, client: str, server: str, ca: str, says: list[str], tls_version: str
) -> None:
    port = tls_broker(server, f"tls_version {tls_version}").port
    certificate, key = pki[client]
    security = Security(ca=pki[ca], certificate=certificate, key=key)
    state, finding = state_of(port, security), examined(port, security)
    for words in says:
        assert words in state, state
        assert words in finding.text, finding
    assert finding.status == "red" and finding.fix and "\n" not in state


@pytest.mark.parametrize(("client", "server"), [("soon", "server"), ("good", "server soon")])
def test_a_certificate_that_expires_soon_is_a_fault_that_nobody_can_miss(
    pki: dict[str, Any], tls_broker: Any, client: str, server: str
) -> None:
    port = tls_broker(server).port
    certificate, key = pki[client]
    security = Security(ca=pki["ca"], certificate=certificate, key=key)
    days = 10 if client == "soon" else 11
    words = [f"expires in {days} days", day(days), "soon.crt" if client == "soon" else "the broker's certificate"]
    with uplinked(port, security) as uplink:
        wait_until(lambda: uplink.connected)
        wait_until(uplink.faults)
        (fault,) = uplink.faults()
    finding = examined(port, security)
    assert finding.status == "yellow"
    for word in words:
        assert word in fault and word in finding.text, (fault, finding)
    left = security.certificate_days(time.time())
    assert left is not None and abs(left - (10 if client == "soon" else 300)) < 0.1


def test_a_good_certificate_is_no_fault(pki: dict[str, Any], tls_broker: Any) -> None:
    port = tls_broker().port
    security = Security(ca=pki["ca"], certificate=pki["good"][0], key=pki["good"][1])
    with uplinked(port, security) as uplink:
        wait_until(lambda: uplink.connected)
        assert uplink.faults() == () and str(uplink.status) == "connected"
    assert examined(port, security).status == "green"


def test_tls_and_plain_ports_are_told_apart(pki: dict[str, Any], tls_broker: Any, broker: Broker) -> None:
    plain, tls = broker.port, tls_broker().port
    security = Security(ca=pki["ca"], certificate=pki["good"][0], key=pki["good"][1])
    with uplinked(tls, Security()) as uplink:
        wait_until(lambda: "the broker speaks TLS on this port" in str(uplink.status))
        time.sleep(2.5)
        assert "the broker speaks TLS on this port" in str(uplink.status), "and it goes on saying so"
    assert "set telemetry.ca" in examined(tls, Security()).fix
    assert "speaks MQTT without TLS on this port" in state_of(plain, security)
    assert "speaks MQTT without TLS on this port" in examined(plain, security).text


def test_a_clock_that_is_set_ends_the_pause(
    pki: dict[str, Any], tls_broker: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A board without a clock starts in 1970: once it is set, nobody waits for the backoff."""
    monkeypatch.setattr("eyas_device.telemetry.mqtt._BACKOFF_S", (600.0, 600.0))
    port = tls_broker().port
    security = Security(ca=pki["ca"], certificate=pki["good"][0], key=pki["good"][1])
    real, offset = time.time, [-50 * 365 * 86400.0]
    monkeypatch.setattr(time, "time", lambda: real() + offset[0])
    wrong = ssl.SSLCertVerificationError("certificate is not yet valid")
    connect = Uplink._connect

    def connect_by_the_clock(self: Uplink) -> Any:
        if offset[0]:
            raise wrong
        return connect(self)

    monkeypatch.setattr(Uplink, "_connect", connect_by_the_clock)
    with uplinked(port, security) as uplink:
        wait_until(lambda: "the clock is probably wrong" in str(uplink.status))
        assert "the clock says 19" in str(uplink.status) and not uplink.connected
        offset[0] = 0.0
        wait_until(lambda: uplink.connected)


# --- files -----------------------------------------------------------------------------------------------------------


def test_the_file_that_is_wrong_is_named(pki: dict[str, Any], tmp_path: Path) -> None:
    good, other = pki["good"], pki["soon"]
    (tmp_path / "text").write_text("hello\n")
    text, gone = str(tmp_path / "text"), str(tmp_path / "gone")
    pem = Path(good[0]).read_bytes()
    key = serialization.load_pem_private_key(Path(good[1]).read_bytes(), None)
    encryption = serialization.BestAvailableEncryption(b"secret")
    files = {
        "indented": b"  " + pem,
        "locked": key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encryption),
        "der": ssl.PEM_cert_to_DER_cert(pem.decode()),
        "wide": pem.decode().encode("utf-16"),
        "empty": b"",
    }
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    indented, locked, der, wide, empty = (str(tmp_path / name) for name in files)
    for security, words in (
        (Security(ca=pki["ca"], certificate=good[0], key=other[1]), (other[1], "not the private key of", good[0])),
        (Security(ca=pki["ca"], certificate=text, key=good[1]), (f"{text}: no certificate",)),
        (Security(ca=pki["ca"], certificate=good[0], key=text), (f"{text}: no private key",)),
        (Security(ca=text, certificate=good[0], key=good[1]), (f"{text}: no certificates of an authority",)),
        (Security(ca=pki["ca"], certificate=good[0], key=gone), (f"{gone}: cannot be read (No such file",)),
        (Security(ca=str(tmp_path)), (f"{tmp_path}: cannot be read (Is a directory",)),
        (Security(ca=pki["ca"], certificate=indented, key=good[1]), (f"{indented}: no certificate",)),
        (Security(ca=pki["ca"], certificate=good[0], key=locked), (f"{locked}: ", "passphrase", "openssl pkey -in")),
        (Security(ca=der, certificate=good[0], key=good[1]), (f"{der}: ", "DER", "-inform der")),
        (Security(ca=wide, certificate=good[0], key=good[1]), (f"{wide}: ", "UTF-16", "UTF-8")),
        (Security(ca=pki["ca"], certificate=empty, key=good[1]), (f"{empty}: no certificate: the file is empty",)),
    ):
        with pytest.raises(LinkError) as caught:
            security.context()
        for word in words:
            assert word in str(caught.value)
        assert "\n" not in str(caught.value)


@pytest.mark.skipif(os.geteuid() != 0, reason="another user is needed")
def test_an_unreadable_key_names_its_owner_and_the_fix(pki: dict[str, Any], tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    key = tmp_path / "client.key"
    key.write_bytes(Path(pki["good"][1]).read_bytes())
    key.chmod(0o600)
    Path(pki["ca"]).parent.chmod(0o755)
    reader = os.pipe()
    child = os.fork()
    if child == 0:
        os.setgid(65534)
        os.setuid(65534)
        try:
            Security(certificate=str(key), key=str(key)).context()
        except LinkError as error:
            os.write(reader[1], str(error).encode())
        os._exit(0)
    os.waitpid(child, 0)
    os.close(reader[1])
    message = os.read(reader[0], 4096).decode()
    os.close(reader[0])
    assert (
        message.startswith(f"{key}: the user nobody may not read it, it belongs to root")
        or str(tmp_path.parent) in message
    )
    assert "chgrp nogroup" in message


@pytest.mark.parametrize("content", [b"hunter2\n", b"\xef\xbb\xbfhunter2\r\n", b"hunter2", b"hunter2\r\nmore\r\n"])
def test_a_password_file_of_any_editor(tmp_path: Path, content: bytes) -> None:
    (path := tmp_path / "password").write_bytes(content)
    path.chmod(0o600)
    assert read_password(path) == Security(password_file=str(path)).password() == "hunter2"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "empty"),
        (b"\nhunter2\n", "empty"),
        ("hunter2\r\n".encode("utf-16"), "save it as UTF-8"),
        ("hunter2\r\n".encode("utf-16-le"), "save it as UTF-8"),
        (b"hun\tter2\n", "not a password"),
        (b"x" * 5000, "4096 characters"),
    ],
)
def test_what_is_no_password_is_not_sent(tmp_path: Path, content: bytes, words: str) -> None:
    (path := tmp_path / "password").write_bytes(content)
    path.chmod(0o600)
    with pytest.raises(LinkError, match=words) as caught:
        read_password(path)
    assert str(path) in str(caught.value) and "hunter2" not in str(caught.value)


@pytest.mark.parametrize("change", [lambda b: codecs.BOM_UTF8 + b, lambda b: b.replace(b"\n", b"\r\n")])
def test_pem_files_of_any_editor(pki: dict[str, Any], tmp_path: Path, change: Callable[[bytes], bytes]) -> None:
    paths = [Path(pki["ca"]), *map(Path, pki["good"])]
    for path in paths:
        (tmp_path / path.name).write_bytes(change(path.read_bytes()))
    ca, certificate, key = (str(tmp_path / path.name) for path in paths)
    assert Security(ca=ca, certificate=certificate, key=key).context() is not None


def test_a_user_and_password_beyond_ascii(make_broker: Callable[..., Broker], tmp_path: Path) -> None:
    import subprocess

    from tests.support.system_parts import require

    (tool,) = require("mosquitto_passwd")
    subprocess.run([tool, "-b", "-c", tmp_path / "users", "kämera-猫", "gehéim"], check=True, capture_output=True)
    broker = make_broker(options=f"user root\nallow_anonymous false\npassword_file {tmp_path / 'users'}").start()
    (path := tmp_path / "password").write_bytes("\ufeffgehéim\r\n".encode())
    path.chmod(0o600)
    assert state_of(broker.port, Security(user="kämera-猫", password_file=str(path))) == "connected"


# --- lifetimes -------------------------------------------------------------------------------------------------------

_times = st.datetimes(datetime(1951, 1, 1), datetime(9000, 1, 1), timezones=st.just(timezone.utc))
_key = ec.generate_private_key(ec.SECP256R1())


@settings(max_examples=40, deadline=None)
@given(_times, st.timedeltas(timedelta(seconds=1), timedelta(days=300_000)), st.text(min_size=1, max_size=60))
def test_any_lifetime_is_read_as_cryptography_reads_it(start: datetime, length: timedelta, name: str) -> None:
    start = start.replace(microsecond=0)
    end = min(start + timedelta(seconds=max(1, int(length.total_seconds()))), datetime(9999, 1, 1, tzinfo=timezone.utc))
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    certificate = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(_key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(start)
        .not_valid_after(end)
        .sign(_key, hashes.SHA256())
    )
    read = parse_certificate(certificate.public_bytes(serialization.Encoding.DER), "x")
    assert read.not_before == certificate.not_valid_before_utc.timestamp()
    assert read.not_after == certificate.not_valid_after_utc.timestamp()
    assert read.common_name == name


@given(st.binary(max_size=200))
def test_what_is_no_certificate_is_a_value_error(data: bytes) -> None:
    with contextlib.suppress(ValueError):
        parse_certificate(data, "x")


def test_files_without_certificates_have_no_lifetimes(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("-----BEGIN CERTIFICATE-----\nnonsense\n-----END CERTIFICATE-----\n")
    assert read_certificates(tmp_path / "x", "the file") == read_certificates(tmp_path / "none", "the file") == []
