"""How a service starts, and what does not end it: telemetry comes first, then the model, then the camera."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from eyas_device.agent.reporter import Reporter, ReporterSettings
from eyas_device.errors import EXIT_CONFIG
from eyas_device.predict import Classifier
from eyas_device.support.supervised import SupervisedThread
from eyas_device.telemetry.messages import Health, Status
from eyas_device.telemetry.mqtt import Uplink, UplinkSettings
from eyas_device.telemetry.spool.spool import Spool
from eyas_device.updates.slots import Slots
from tests.device.agent.test_reporter import Inbox, inbox, wait_until
from tests.device.agent.test_systemd import Manager, environ
from tests.support.brokers import Broker, free_port
from tests.support.servers import StreamServer

LIVE = "fake:?live=1&fps=40&frames=1000000&size=64x48"


@pytest.fixture
def state(tmp_path: Path) -> Path:
    return tmp_path / "state"


@pytest.fixture
def start(tmp_path: Path, state: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Start the service with a source, a broker and further lines of its configuration."""
    started: list[subprocess.Popen[str]] = []

    def start(source: str, port: int, more: str = "", **environment: str) -> subprocess.Popen[str]:
        (config := tmp_path / "device.toml").write_text(
            f'[device]\nsite = "s"\nname = "cam"\nstate = "{state}"\n[camera]\nsource = "{source}"\n'
            f'[telemetry]\nbroker = "127.0.0.1:{port}"\nwindow_s = 0.5\n{more}'
        )
        command = [sys.executable, "-m", "eyas_device", "run", "--config", str(config)]
        started.append(
            subprocess.Popen(
                command,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                env={**os.environ, **environment},
            )
        )
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate(timeout=10)


def status_with(box: Inbox, true: Callable[[Status], object]) -> Status:
    """The next status for which something is true."""
    while True:
        _, _, status = box.next("status", 40)
        if true(status):
            return status  # type: ignore[no-any-return]


@pytest.mark.parametrize("source", ["v4l2:/dev/null", "login"])
def test_a_camera_that_is_not_one_now_is_reported_and_tried_again(
    source: str,
    broker: Broker,
    state: Path,
    pristine_bundle: Path,
    start: Callable[..., subprocess.Popen[str]],
) -> None:
    Slots(state).install(pristine_bundle, check=lambda root: None)
    server = StreamServer()
    server.start()
    try:
        spec = server.spec("login", "guard:wrong@") if source == "login" else source
        with inbox(broker.port) as box:
            process = start(spec, broker.port)
            status = status_with(box, lambda status: status.camera == "lost" and status.model)
            expected = {"v4l2:/dev/null": "not a video device", "login": "refused (401)"}[source]
            assert expected in status.reason and "wrong" not in status.reason
            assert status.model == "tiny-shapes 1.2.3" and status.selection == "the bundle's preference"
            process.terminate()
            assert process.wait(30) == 0
    finally:
        server.kill()


def test_a_device_without_a_good_model_says_so_and_gets_one(
    broker: Broker, state: Path, pristine_bundle: Path, start: Callable[..., subprocess.Popen[str]], tmp_path: Path
) -> None:
    manager = Manager(str(tmp_path / "notify"))
    try:
        with inbox(broker.port) as box:
            process = start(LIVE, broker.port, **{k: v for k, v in environ(manager).items() if k != "WATCHDOG_PID"})
            status = status_with(box, lambda status: status.refused_reason and status.camera == "delivering")
            assert (status.model, status.refused_model) == ("", "") and "no good slot yet" in status.refused_reason
            lines = manager.lines(wait_s=10)
            assert lines.count("READY=1") == 1 and lines.index("READY=1") > 0
            assert lines[0].startswith("EXTEND_TIMEOUT_USEC="), "a slow start was not extended before the load"
            assert any("no model runs" in line for line in lines if line.startswith("STATUS="))
            Slots(state).install(pristine_bundle, check=lambda root: None)
            process.send_signal(signal.SIGHUP)
            assert status_with(box, lambda status: status.model).refused_reason == ""
            box.next("window")
    finally:
        manager.close()


def test_a_key_that_cannot_be_read_is_no_reason_to_be_dark(
    state: Path, pristine_bundle: Path, start: Callable[..., subprocess.Popen[str]], tmp_path: Path
) -> None:
    Slots(state).install(pristine_bundle, check=lambda root: None)
    process = start(LIVE, free_port(), f'ca = "{tmp_path / "renewed-ca.pem"}"\n')
    assert process.stdout is not None
    line = next(line for line in process.stdout if "renewed-ca.pem" in line)
    assert "PEM files" in line and "needed" in line


@pytest.mark.parametrize(
    ("more", "reason"), [("[model]\nsauce = 1\n", "sauce"), ("[privacy]\nband = [2, 1]\n", "privacy")]
)
def test_an_error_in_the_configuration_ends_the_service_for_good(
    more: str, reason: str, start: Callable[..., subprocess.Popen[str]]
) -> None:
    process = start(LIVE, free_port(), more)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == EXIT_CONFIG and reason in out


def test_a_wrong_camera_in_the_configuration_is_an_error_of_the_configuration(
    state: Path, pristine_bundle: Path, start: Callable[..., subprocess.Popen[str]]
) -> None:
    Slots(state).install(pristine_bundle, check=lambda root: None)
    process = start("v4l2:0?size=big", free_port())
    out, _ = process.communicate(timeout=60)
    assert process.returncode == EXIT_CONFIG
    assert "device.toml: [camera] source: camera v4l2:0?size=big: " in out
    assert Slots(state).attempts("a") == 0


# --- supervised threads ----------------------------------------------------------------------------------------------


def test_the_window_thread_goes_on_after_an_error_and_says_so(pristine_bundle: Path) -> None:
    calls, errors = [0], list[tuple[str, BaseException]]()

    def health() -> Health:
        calls[0] += 1
        if calls[0] == 2:
            raise OSError(5, "Input/output error")  # one bad reading of a sensor, once
        return Health()

    uplink = UplinkSettings(host="127.0.0.1", port=9, site="s", device="d")
    with (
        Classifier.open(pristine_bundle) as classifier,
        Reporter(ReporterSettings(uplink=uplink, window_s=0.2), classifier, health=health) as reporter,
    ):
        reporter.watch(lambda name, error: errors.append((name, error)))
        reporter.start()
        wait_until(lambda: bool(errors), 10)
        before = reporter.spool.appended
        wait_until(lambda: reporter.spool.appended >= before + 3, 10)
        assert [(name, type(error)) for name, error in errors] == [("window", OSError)]
        assert reporter.stalled == ""


def test_the_uplink_goes_on_after_an_error(broker: Broker) -> None:
    failures, errors = [2], list[str]()

    def make_status() -> Status:
        if failures[0]:
            failures[0] -= 1
            raise RuntimeError("a surprise in a callback")
        return Status(state="online")

    with (
        Spool(None, device="d") as spool,
        inbox(broker.port) as box,
        Uplink(
            UplinkSettings(host="127.0.0.1", port=broker.port, site="s", device="d"),
            spool,
            will=Status(device="d"),
            make_status=make_status,
            on_command=print,
        ) as uplink,
    ):
        uplink.thread.on_error = lambda name, error: errors.append(f"{name}: {error}")
        uplink.start()
        assert status_with(box, lambda status: status.state == "online")
        assert errors == ["uplink: a surprise in a callback"] * 2 and uplink.thread.errors == 2


def test_a_thread_that_hangs_is_stalled_and_one_that_pauses_after_an_error_is_not() -> None:
    release = threading.Event()
    hanging = SupervisedThread("hanging", lambda: bool(release.wait(30)) or None)
    assert not hanging.stalled(0.0), "it has not been started"
    hanging.start()
    time.sleep(0.3)
    assert hanging.stalled(0.2) and not hanging.stalled(10)
    release.set()
    hanging.join(10)
    assert not hanging.stalled(0.0), "it was to end"

    def fail() -> None:
        raise ValueError("again")

    failing = SupervisedThread("failing", fail, pauses_s=(0.01, 0.05))
    failing.on_error = lambda name, error: fail()  # also whoever counts may fail
    failing.start()
    wait_until(lambda: failing.errors >= 5, 10)
    assert failing.alive and not failing.stalled(5)
    failing.join(10)
    assert not failing.alive
