"""Enrolment: a device's files, its complete configuration, and what is asked or refused before."""

from __future__ import annotations

import os
import pty
import select
import stat
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eyas_device.camera import KINDS
from eyas_device.config import COMMANDS, read_config
from eyas_device.errors import CameraSpecError, ConfigError, LinkError
from eyas_device.support.names import NAME
from eyas_host.cli import options
from eyas_host.fleet.broker.enroll import enroll
from eyas_host.fleet.broker.kit import local_address, prepare
from eyas_host.fleet.broker.pki import Authority, days_left, serial_number
from eyas_host.fleet.broker.revocation import LIST, load_list, revoked
from tests.support.brokers import free_port
from tests.support.inside import eyas

_NAMES = st.from_regex(NAME, fullmatch=True, alphabet=st.characters(codec="ascii"))


def on_a_terminal(folder: Path, *words: str, typed: str) -> subprocess.CompletedProcess[str]:
    """`eyas` in a folder, on a terminal where a person answers `typed`."""
    command = [sys.executable, "-m", "eyas_host", *words]
    ours, terminal = pty.openpty()
    try:
        process = subprocess.Popen(
            command, cwd=folder, stdin=terminal, stdout=subprocess.PIPE, stderr=terminal, text=True
        )
        os.write(ours, typed.encode())
        shown = b""
        deadline = time.monotonic() + 60
        while process.poll() is None and time.monotonic() < deadline:
            if select.select([ours], [], [], 0.1)[0]:
                shown += os.read(ours, 4096)
        assert process.stdout is not None
        return subprocess.CompletedProcess(command, process.wait(5), process.stdout.read(), shown.decode())
    finally:
        os.close(ours)
        os.close(terminal)


def test_everything_that_a_device_needs(tmp_path: Path) -> None:
    enrolled = enroll(tmp_path, "cam-7", site="hall-2", camera="v4l2:0", broker="server.lan:8883")
    own = tmp_path / "devices/cam-7"
    assert 800 < days_left(enrolled.credentials.cert) <= 826
    assert {path.name: stat.S_IMODE(path.stat().st_mode) for path in own.iterdir()} == {
        "ca.crt": 0o644,
        "client.crt": 0o644,
        "client.key": 0o600,
        "device.toml": 0o600,
    }
    config = read_config(own / "device.toml")
    assert (config.device.site, config.device.name, config.camera.source) == ("hall-2", "cam-7", "v4l2:0")
    assert config.telemetry.address == ("server.lan", 8883, True)
    assert config.telemetry.commands == COMMANDS
    assert config.telemetry.key == "/etc/eyas/credentials/client.key"


def test_root_unpacks_what_the_service_may_read(tmp_path: Path) -> None:
    archive = enroll(tmp_path, "cam-7", camera="v4l2:0", broker="h").archive
    assert stat.S_IMODE(archive.stat().st_mode) == 0o600
    with tarfile.open(archive) as tar:
        members = {member.name: member for member in tar.getmembers()}
    assert {(member.uname, member.gname, member.uid, member.gid) for member in members.values()} == {
        ("root", "eyas", 0, 0)
    }
    assert {name: member.mode for name, member in members.items()} == {
        "credentials/ca.crt": 0o644,
        "credentials/client.crt": 0o644,
        "credentials/client.key": 0o640,
        "device.toml": 0o640,
    }


@settings(max_examples=10, deadline=None)
@given(name=_NAMES, site=_NAMES)
def test_any_valid_name_can_be_enrolled(name: str, site: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        if {name, site} & {".", ".."} or name == "eyas-host":
            with pytest.raises(LinkError):
                enroll(Path(folder), name, site=site)
            return
        enrolled = enroll(Path(folder), name, site=site)
        with tarfile.open(enrolled.archive) as tar:
            tar.extractall(folder, filter="data")
        config = read_config(Path(folder) / "device.toml")
        assert (config.device.name, config.device.site) == (name, site)


@pytest.mark.parametrize(
    "broker",
    ["", "host:0", "host:x", "host:70000", "host:99999999", "a..b:1", "BROKER:8883", "broker.example", "example.com:1"],
)
def test_invalid_addresses_of_the_broker(tmp_path: Path, broker: str) -> None:
    with pytest.raises(LinkError, match="--broker"):
        enroll(tmp_path, "cam-1", broker=broker)
    with pytest.raises(LinkError, match="--name"):
        prepare(tmp_path, names=[broker])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["", "a/b", "+", "#", "..", "eyas-host", "x" * 65, "a b", "cam\n"])
def test_invalid_device_names(tmp_path: Path, name: str) -> None:
    with pytest.raises(LinkError):
        enroll(tmp_path, name)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("camera", "words"),
    [
        ("", "allowed are v4l2:"),
        ("/dev/video0", "write 'v4l2:/dev/video0'"),
        ("0", "write 'v4l2:0'"),
        ("http://10.0.0.7/stream", "write 'mjpeg:http://10.0.0.7/stream'"),
        ("v4l2:zero", "not a device"),
        ("v4l2:0?size=1", "size='1' is not valid"),
        ("rtsp://", "rtsp"),
        ("mjpeg:ftp://10.0.0.7", "mjpeg"),
        ("gst:videotestsrc", "ends in appsink"),
        ("picamera2:x", "not a camera number"),
        ("fake:?live=2", "live='2' is not valid"),
        ("folder:", "write folder:PATH"),
        ("folder:images", "an absolute path of the device, as folder:/srv/images"),
        ("video:~/clip.mp4", "an absolute path of the device"),
    ],
)
def test_a_wrong_camera_is_answered_with_the_right_spelling(tmp_path: Path, camera: str, words: str) -> None:
    with pytest.raises(CameraSpecError) as caught:
        enroll(tmp_path, "cam-1", camera=camera)
    assert words in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_every_kind_of_camera_can_be_enrolled_although_it_is_elsewhere(tmp_path: Path) -> None:
    specs = {
        "v4l2": "v4l2:7?size=1280x720&fps=30",
        "rtsp": "rtsp://user:secret@10.0.0.7/live",
        "rtsps": "rtsps://10.0.0.7/live",
        "mjpeg": "mjpeg:http://10.0.0.7/stream",
        "picamera2": "picamera2:?size=1640x1232&fps=10",
        "gst": "gst:nvarguscamerasrc ! appsink",
        "video": "video:/srv/none.mp4",
        "folder": "folder:/srv/none",
        "fake": "fake:?live=1",
    }
    assert set(specs) == set(KINDS)
    for kind, spec in specs.items():
        enrolled = enroll(tmp_path, f"cam-{kind}", camera=spec, broker="server.lan")
        assert read_config(enrolled.config).camera.source == enrolled.camera == spec


def test_the_kits_own_address(tmp_path: Path) -> None:
    prepare(tmp_path, bind="::1", port=21883, names=["2001:db8::17"])
    enrolled = enroll(tmp_path, "cam-1")
    config = read_config(enrolled.config)
    assert config.telemetry.address == enrolled.broker == ("2001:db8::17", 21883, True)
    assert local_address(tmp_path) == ("::1", 21883, True)


def test_a_later_enrolment_keeps_what_it_is_not_told(tmp_path: Path) -> None:
    first = enroll(tmp_path, "cam-7", site="hall-2", camera="v4l2:0", broker="server.lan", commands=["pause", "resume"])
    with first.config.open("a") as stream:
        stream.write("\n[loop]\nfps = 5.0\n")
    again = enroll(tmp_path, "cam-7", camera="v4l2:1")
    assert (again.site, again.camera, again.commands) == ("hall-2", "v4l2:1", ("pause", "resume"))
    assert again.warnings == ()
    assert (
        "its site was hall-2; after the flash, `eyas forget cam-7`" in enroll(tmp_path, "cam-7", site="x").warnings[0]
    )
    config = read_config(again.config)
    assert (config.loop.fps, config.telemetry.address.host) == (5.0, "server.lan")
    first.config.write_text("[camera]\nsauce = 1\n")
    with pytest.raises(ConfigError, match="sauce"):
        enroll(tmp_path, "cam-7")


def test_replacing_revokes_the_earlier_certificates_alone(tmp_path: Path) -> None:
    prepare(tmp_path)
    first = serial_number(enroll(tmp_path, "cam-7").credentials.cert)
    other = serial_number(enroll(tmp_path, "cam-8").credentials.cert)
    enrolled = enroll(tmp_path, "cam-7", replace=True)
    authority = Authority(tmp_path / "ca", create=False)
    for place in ("ca", "broker"):
        assert revoked(load_list(tmp_path / place / LIST, authority.certificate)) == {first: "cam-7"}
    assert enrolled.revoked == 1
    assert {serial_number(enrolled.credentials.cert), other}.isdisjoint({first})


def test_the_verb_says_what_comes_first_and_what_comes_next(tmp_path: Path) -> None:
    done = eyas(tmp_path, "enroll", "cam-7", "--camera", "v4l2:0", "--broker", "server.lan")
    assert (done.code, done.out) == (2, "")
    assert "fleet: there is no kit; `eyas broker --bind 0.0.0.0` comes first" in done.err
    kit = tmp_path / "fleet"
    prepare(kit)
    done = eyas(tmp_path, "enroll", "cam-7")
    assert done.code == 2 and "--camera SPEC is needed, e.g. v4l2:0" in done.err
    done = eyas(tmp_path, "enroll", "cam-7", "--camera", "v4l2:0")
    assert done.code == 2 and "listens on 127.0.0.1 only" in done.err
    assert "`eyas broker --bind 0.0.0.0`" in done.err and "--broker 127.0.0.1:8883" in done.err
    assert not (kit / "devices").exists()
    prepare(kit, bind="0.0.0.0", names=["10.1.2.3"])
    done = eyas(tmp_path, "enroll", "cam-7", "--camera", "v4l2:0", "--site", "hall-2", "--commands", "pause,resume")
    assert done.code == 0, done.err
    assert "fleet/devices/cam-7/device.toml: site hall-2, camera v4l2:0, broker 10.1.2.3:8883" in done.out
    assert "commands it executes: pause, resume" in done.out
    assert "next:    eyas flash USER@HOST --name cam-7 --bundle DIR" in done.out
    assert read_config(kit / "devices/cam-7/device.toml").telemetry.address == ("10.1.2.3", 8883, True)


def test_a_broker_keeps_its_address_and_its_names(tmp_path: Path) -> None:
    """A restart without options must not lock out the devices that were enrolled for them."""
    first = prepare(tmp_path, bind="0.0.0.0", port=28883, names=["10.1.2.3"])
    assert prepare(tmp_path) == first
    assert prepare(tmp_path, names=["10.1.2.4"]).hosts[0] == "10.1.2.4"
    assert prepare(tmp_path).hosts[0] == "10.1.2.4"


def test_an_address_that_is_not_in_the_certificate_is_a_warning(tmp_path: Path) -> None:
    prepare(tmp_path, bind="0.0.0.0")
    [warning] = enroll(tmp_path, "cam-7", broker="server.lan").warnings
    assert "start `eyas broker` with --name server.lan" in warning
    assert enroll(tmp_path, "cam-8").warnings == ()


def test_a_known_name_is_asked_about(tmp_path: Path) -> None:
    prepare(tmp_path / "fleet", bind="0.0.0.0", names=["10.1.2.3"])
    words = ("enroll", "cam-7", "--camera", "v4l2:0")
    assert eyas(tmp_path, *words).code == 0
    cert = tmp_path / "fleet/devices/cam-7/client.crt"
    before = serial_number(cert)
    refused = eyas(tmp_path, *words)
    assert refused.code == 2 and serial_number(cert) == before
    assert "cam-7 is enrolled, its certificate is valid until 20" in refused.err
    assert "--yes" in refused.err and "--replace" in refused.err and "eyas expel cam-7" in refused.err
    no = on_a_terminal(tmp_path, *words, typed="n\n")
    assert no.returncode == 2 and "nothing was changed" in no.stderr and serial_number(cert) == before
    asked = on_a_terminal(tmp_path, *words, typed="y\n")
    assert asked.returncode == 0 and "Issue another certificate?" in asked.stderr and serial_number(cert) != before
    assert "1 earlier certificate still valid, until `eyas expel cam-7`" in asked.stdout
    assert eyas(tmp_path, *words, "--yes").code == 0
    replaced = eyas(tmp_path, *words, "--replace")
    assert replaced.code == 0 and "3 earlier certificates revoked" in replaced.out


@pytest.mark.parametrize("verb", ["collect", "watch", "forget"])
def test_a_verb_before_the_broker_says_what_comes_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, verb: str
) -> None:
    words = (verb, "cam-7") if verb == "forget" else (verb,)
    done = eyas(tmp_path, *words, "--kit", "fleet")
    assert done.code == 2 and "`eyas broker` comes first" in done.err
    monkeypatch.setattr(options, "MQTT_PORT", free_port())
    done = eyas(tmp_path, *words)
    assert done.code == 2 and "there is no kit in ./fleet, and nothing listens on 127.0.0.1" in done.err
    assert "`eyas broker` comes first" in done.err
    (tmp_path / "fleet").mkdir()
    done = eyas(tmp_path, *words)
    assert done.code == 2 and "fleet/host: no credentials; `eyas broker` comes first" in done.err


@pytest.mark.parametrize("verb", ["broker", "enroll", "expel", "forget", "collect", "watch"])
def test_the_old_name_of_the_kits_option_is_answered_with_the_new_one(tmp_path: Path, verb: str) -> None:
    done = eyas(tmp_path, verb, "--folder", "fleet")
    assert done.code == 2 and "--folder is now --kit" in done.err
