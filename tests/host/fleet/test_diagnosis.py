"""Each mistake on the way to a broker has words and a fix of its own: the doctor's and the link's, at real servers."""

from __future__ import annotations

import json
import re
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from msgspec.structs import replace

from eyas_device.cli import main as eyas_device
from eyas_device.config import Config, TelemetrySection
from eyas_device.doctor import Context, probes
from eyas_device.doctor.finding import Finding
from eyas_device.telemetry.messages import Status
from eyas_device.telemetry.mqtt import Uplink, UplinkSettings
from eyas_device.telemetry.spool.spool import Spool
from eyas_device.telemetry.tls import Security
from eyas_host.fleet.broker.enroll import enroll
from eyas_host.fleet.broker.expel import expel
from eyas_host.fleet.broker.kit import Kit, prepare
from eyas_host.fleet.broker.pki import Authority, Credentials
from tests.support.brokers import free_port
from tests.support.fleet_parts import Processes, listens, needs_mosquitto, wait_until
from tests.support.paths import ROOT
from tests.support.system_parts import require

HOST = "127.0.0.1"


class Site(NamedTuple):
    """Servers and credentials, right and wrong ones."""

    kit: Kit
    cam_7: Credentials
    expired: Credentials
    expelled: Credentials
    stranger: Credentials
    """Of another fleet's authority."""
    plain: int
    """Port of a broker without TLS."""
    guarded: int
    """Port of a broker that asks for a password."""
    full: int
    """Port that accepts no further connection."""
    passwords: dict[str, Path]


@pytest.fixture(scope="module")
def site(open_folder: Path) -> Iterator[Site]:
    """Real brokers: the kit's, a plain one and one with a password."""
    folder, processes = open_folder / "fleet", Processes(open_folder)
    port, plain, guarded = free_port(), free_port(), free_port()
    prepare(folder, bind="0.0.0.0", port=port, names=["broker.test"])
    expelled = enroll(folder, "cam-5", site="s").credentials
    expel(folder, "cam-5")
    kit = prepare(folder, bind="0.0.0.0", port=port, names=["broker.test"])
    process = processes.start(needs_mosquitto(), "-c", str(kit.config))
    wait_until(lambda: listens(port) or process.poll() is not None, 15, "a listening broker")
    (tool,) = require("mosquitto_passwd")
    subprocess.run([tool, "-b", "-c", open_folder / "users", "camera", "right"], check=True, capture_output=True)
    processes.broker(plain)
    login = f"user root\nallow_anonymous false\npassword_file {open_folder / 'users'}"
    processes.broker(guarded, login, name="guarded")
    passwords = {word: open_folder / word for word in ("right", "wrong")}
    for word, path in passwords.items():
        path.write_text(f"{word}\n")
        path.chmod(0o600)
    with socket.socket() as full, socket.socket() as first, socket.socket() as second:
        full.bind((HOST, 0))
        full.listen(0)
        for waiting in (first, second):
            waiting.setblocking(False)
            waiting.connect_ex(full.getsockname())
        yield Site(
            kit=kit,
            cam_7=enroll(folder, "cam-7", site="s").credentials,
            expired=Authority(folder / "ca").issue(open_folder / "expired", "cam-7", days=-0.5),
            expelled=expelled,
            stranger=Authority(open_folder / "other").issue(open_folder / "stranger", "cam-7"),
            plain=plain,
            guarded=guarded,
            full=full.getsockname()[1],
            passwords=passwords,
        )
    processes.close()


@contextmanager
def uplinked(telemetry: TelemetrySection, device: str, machine: str = "0123456789ab") -> Iterator[Uplink]:
    """A device's uplink, as the agent has it."""
    address = telemetry.address
    settings = UplinkSettings(
        host=address.host,
        port=address.port,
        site="s",
        device=device,
        machine=machine,
        security=Security.from_config(telemetry),
    )
    with (
        Spool(None, device=device) as spool,
        Uplink(
            settings,
            spool,
            will=Status(device=device),
            make_status=lambda: Status(state="online", device=device, machine=machine, time=time.time()),
            on_command=lambda payload: None,
        ) as uplink,
    ):
        uplink.start()
        yield uplink


def examined(telemetry: TelemetrySection, device: str) -> Finding:
    """What the doctor says."""
    config = Config()
    config = replace(config, device=replace(config.device, site="s", name=device), telemetry=telemetry)
    return probes.broker(Context(config=config))


def files(given: Credentials) -> dict[str, str]:
    """Keys of [telemetry]."""
    return {"ca": str(given.ca), "certificate": str(given.cert), "key": str(given.key)}


class Case(NamedTuple):
    """A mistake, and what has to be said of it."""

    problem: str
    fix: str
    telemetry: Callable[[Site], dict[str, Any]]
    device: str = "cam-7"


def _login(site: Site, word: str) -> dict[str, Any]:
    return {"user": "camera", "password_file": str(site.passwords[word]), "insecure": True}


def _kit(site: Site, host: str = HOST) -> dict[str, Any]:
    return {"broker": f"{host}:{site.kit.port}", **files(site.cam_7)}


CASES = {
    "plain to tls": Case("speaks TLS on this port", "set telemetry.ca", lambda s: {"broker": _kit(s)["broker"]}),
    "tls to plain": Case(
        "speaks MQTT without TLS on this port", "8883", lambda s: {**_kit(s), "broker": f"{HOST}:{s.plain}"}
    ),
    "no certificate": Case(
        "asks for a client certificate", "--certificate and --key", lambda s: {**_kit(s), "certificate": "", "key": ""}
    ),
    "another authority": Case(
        "not signed by", "ca.crt of this broker's fleet", lambda s: {**_kit(s), "ca": str(s.stranger.ca)}
    ),
    "the system's authorities": Case(
        "not signed by the system's authorities", "ca.crt", lambda s: {"broker": _kit(s)["broker"], "tls": True}
    ),
    "a stranger": Case(
        "signed by an authority that the broker does not know",
        "eyas enroll",
        lambda s: {**_kit(s), **files(s.stranger), "ca": str(s.cam_7.ca)},
    ),
    "expired": Case("client.crt expired on 20", "eyas enroll", lambda s: {**_kit(s), **files(s.expired)}),
    "revoked": Case("revoked", "expelled", lambda s: {**_kit(s), **files(s.expelled)}, "cam-5"),
    "host name": Case(
        "not for 127.0.0.2 but for broker.test, ", "--name 127.0.0.2", lambda s: _kit(s, host="127.0.0.2")
    ),
    "another device's": Case(
        "the certificate is of cam-7, this device is cam-9", "eyas enroll cam-9", _kit, device="cam-9"
    ),
    "no password": Case("without a login", "--password-file", lambda s: {"broker": f"{HOST}:{s.guarded}"}),
    "wrong password": Case(
        "the user camera with this password",
        "password_file",
        lambda s: {"broker": f"{HOST}:{s.guarded}", **_login(s, "wrong")},
    ),
    "nothing there": Case("nothing listens on port 1 of", "start the broker", lambda s: {"broker": f"{HOST}:1"}),
    "no answer": Case("does not answer", "firewall", lambda s: {"broker": f"{HOST}:{s.full}"}),
    "no such name": Case("no-such-host.invalid", "DNS", lambda s: {"broker": "no-such-host.invalid"}),
}


@pytest.mark.parametrize("name", list(CASES))
def test_a_mistake_has_its_own_words_and_fix(site: Site, name: str) -> None:
    case = CASES[name]
    telemetry = TelemetrySection(**case.telemetry(site))
    finding = examined(telemetry, case.device)
    assert finding.status == "red"
    assert case.problem in finding.text and case.fix in finding.fix, finding
    others = [other.problem for key, other in CASES.items() if key != name and other.problem not in case.problem]
    assert not [words for words in others if words in finding.text]
    with uplinked(telemetry, case.device) as uplink:
        wait_until(lambda: case.problem in str(uplink.status), 20, f"{case.problem!r}")
        assert case.fix in str(uplink.status)


def test_the_documentation_has_a_row_for_each() -> None:
    page = (ROOT / "docs/device.md").read_text(encoding="utf-8").partition("### When there is no connection")[2]
    rows = re.findall(r"^\| ([^|]+) \| ([^|]+) \| [^|]+ \|$", page, re.MULTILINE)[1:]
    assert [name for name, _ in rows] == list(CASES)
    for name, words in rows:
        shared = [word for word in CASES[name].problem.split() if word in words]
        assert len(shared) > len(CASES[name].problem.split()) / 2 or "*" in words, name


def test_what_is_right_is_green(site: Site) -> None:
    telemetry = TelemetrySection(**_kit(site))
    assert examined(telemetry, "cam-7").status == "green"
    login = TelemetrySection(broker=f"{HOST}:{site.guarded}", **_login(site, "right"))
    assert "accepts camera, but without TLS" in examined(login, "cam-7").text
    plain = TelemetrySection(broker=f"{HOST}:{site.plain}", **{**_login(site, "right"), "insecure": True})
    assert "cam-7" not in examined(plain, "cam-7").text, "a shared user is no mistake where it may publish"


def test_a_clock_of_1970(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() % 86400)
    telemetry = TelemetrySection(**_kit(site))
    finding = examined(telemetry, "cam-7")
    assert (
        finding.status == "red" and "is valid from 20" in finding.text and "the clock says 1970-01-01" in finding.text
    )
    assert "timedatectl" in finding.fix and "enroll" not in finding.fix


def test_two_devices_of_one_name(site: Site) -> None:
    telemetry = TelemetrySection(**{**_kit(site), **files(enroll(site.kit.folder, "cam-8", site="s").credentials)})
    words = "another machine"
    with uplinked(telemetry, "cam-8", "aaaaaaaaaaaa") as one, uplinked(telemetry, "cam-8", "bbbbbbbbbbbb") as two:
        wait_until(lambda: words in str(one.status) or words in str(two.status), 60, "a device that notices")
        status = next(str(link.status) for link in (one, two) if words in str(link.status))
        assert "uses the name s/cam-8; give each device a [device] name of its own" in status
        finding = examined(telemetry, "cam-8")
    assert finding.status == "yellow" and words in finding.text and "[device] name of its own" in finding.fix


def test_run_and_doctor_take_the_options_of_the_configuration(
    site: Site, pristine_bundle: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    options = [
        "--broker",
        f"{HOST}:{site.kit.port}",
        "--site",
        "s",
        "--name",
        "cam-7",
        "--bundle",
        str(pristine_bundle),
    ]
    for key, value in files(site.cam_7).items():
        options += [f"--{key}", value]
    eyas_device(["doctor", "--json", *options])
    found = {one["check"]: one for one in json.loads(capfd.readouterr().out)["findings"]}
    assert found["broker"]["status"] == "green", found["broker"]
    assert eyas_device(["run", "--camera", "fake:?frames=40", "--fps", "8", *options]) == 0
    out, err = capfd.readouterr()
    assert "mqtt connected" in err and "on disk" not in out.splitlines()[-2], (out, err)


# --- servers that are no brokers -------------------------------------------------------------------------------------


def _serve(answer: bytes, context: ssl.SSLContext | None = None) -> tuple[socket.socket, int]:
    """A server that reads something, answers and hangs up."""
    server = socket.create_server((HOST, 0))

    def loop() -> None:
        while True:
            try:
                connection, _ = server.accept()
            except OSError:
                return
            with suppress(OSError), connection:
                connection.settimeout(5)
                stream = context.wrap_socket(connection, server_side=True) if context else connection
                with suppress(OSError):
                    stream.recv(100)
                    stream.sendall(answer)
                stream.close()

    threading.Thread(target=loop, daemon=True).start()
    return server, int(server.getsockname()[1])


@pytest.mark.parametrize("tls", [False, True])
@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", "a web server (HTTP)"),
        (b"SSH-2.0-OpenSSH_9.2\r\n", "an SSH server"),
        (b"\0" * 20, "does not answer as an MQTT broker"),
        (b"", "does not answer as an MQTT broker"),
    ],
)
def test_a_server_that_is_no_broker(site: Site, answer: bytes, words: str, tls: bool) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER) if tls else None
    if context is not None:
        context.load_cert_chain(site.kit.folder / "broker/server.crt", site.kit.folder / "broker/server.key")
    server, port = _serve(answer, context)
    telemetry = TelemetrySection(broker=f"{HOST}:{port}", **(files(site.cam_7) if tls else {}))
    finding = examined(telemetry, "cam-7")
    assert finding.status == "red" and words in finding.text and "port" in finding.fix, finding
    with uplinked(telemetry, "cam-7") as uplink:
        wait_until(lambda: words in str(uplink.status), 20, words)
    server.shutdown(socket.SHUT_RDWR)
    server.close()
