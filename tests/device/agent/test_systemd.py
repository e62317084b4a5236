"""The service: notifications over a real socket, and a unit file that systemd's own tools accept."""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from eyas_device.agent import report
from eyas_device.agent.health import HealthMonitor
from eyas_device.agent.loop import Loop
from eyas_device.agent.recent import Recent
from eyas_device.agent.report import StatusText
from eyas_device.agent.systemd import LOAD_S, UNIT, Notifier
from eyas_device.camera import open_camera
from eyas_device.camera.fake import FakeCamera
from eyas_device.camera.reconnecting import CameraState, ReconnectingCamera
from eyas_device.commands import run, update
from eyas_device.config import INSTANCES, STATE
from eyas_device.errors import ImageError
from eyas_device.predict import Classifier, Prediction
from eyas_device.preprocess import Pixels
from eyas_device.updates.agent_mirror import REQUEST
from eyas_device.updates.progress import ROOT_STATE, UPDATES
from tests.support.system_parts import require

MAX_EXPOSURE = 2.0


class Manager:
    """Stands where systemd stands: the other end of the notify socket."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        self._socket.bind(f"\0{name[1:]}" if name.startswith("@") else name)
        self.pids: set[int] = set()

    def messages(self, *, wait_s: float = 0.0) -> list[str]:
        """What has arrived; at most `wait_s` for the first."""
        found: list[str] = []
        self._socket.settimeout(wait_s)
        while True:
            try:
                data, ancillary, _, _ = self._socket.recvmsg(4096, socket.CMSG_SPACE(12))
            except (BlockingIOError, TimeoutError):
                return found
            self.pids.update(struct.unpack("iii", rest)[0] for _, _, rest in ancillary)
            found.append(data.decode())
            self._socket.setblocking(False)

    def lines(self, *, wait_s: float = 0.0) -> list[str]:
        return [line for message in self.messages(wait_s=wait_s) for line in message.split("\n")]

    def close(self) -> None:
        self._socket.close()


@pytest.fixture(params=["path", "abstract"])
def manager(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Manager]:
    manager = Manager(f"@eyas-test-{os.getpid()}-{id(request)}" if request.param == "abstract" else str(tmp_path / "n"))
    yield manager
    manager.close()


@pytest.fixture
def one_manager(tmp_path: Path) -> Iterator[Manager]:
    manager = Manager(str(tmp_path / "n"))
    yield manager
    manager.close()


class Ticking:
    """A clock that is moved by hand."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def environ(manager: Manager, *, watchdog_s: float | None = 30.0) -> dict[str, str]:
    extra = (
        {} if watchdog_s is None else {"WATCHDOG_USEC": str(round(watchdog_s * 1e6)), "WATCHDOG_PID": str(os.getpid())}
    )
    return {"NOTIFY_SOCKET": manager.name, **extra}


# --- notifications ----------------------------------------------------------------------------------------------------


def test_notifications_of_a_whole_run(manager: Manager, pristine_bundle: Path) -> None:
    clock = Ticking()
    with Notifier(environ=environ(manager), clock=clock) as notifier, Classifier.open(pristine_bundle) as classifier:
        assert manager.messages() == []
        notifier.extend(LOAD_S)
        assert manager.messages() == [f"EXTEND_TIMEOUT_USEC={LOAD_S * 1e6:.0f}"], "a load may take longer"
        Loop(classifier, open_camera("fake:?frames=5&junk=0"), [notifier]).run()
        notifier.extend(LOAD_S)
    lines = manager.lines()
    assert lines.count("READY=1") == 1
    assert lines[0].startswith("STATUS=tiny-shapes 1.2.3: litert-int8 on litert")
    assert lines.index("WATCHDOG=1") > lines.index("READY=1"), "the first beat after it is not put off"
    assert lines[-1] == "STOPPING=1"
    assert not any(line.startswith("EXTEND") for line in lines)


@pytest.mark.parametrize(
    "camera", ["fake:?frames=600&fps=30&live=1&black=0-9999&size=64x48", "mjpeg:http://127.0.0.1:9/"]
)
def test_the_dark_and_an_absent_camera_are_no_reason_to_wait_with_ready(
    one_manager: Manager, pristine_bundle: Path, camera: str
) -> None:
    notifier = Notifier(environ=environ(one_manager, watchdog_s=0.3))
    with (
        notifier,
        Classifier.open(pristine_bundle) as classifier,
        ReconnectingCamera(lambda: open_camera(camera)) as source,
    ):
        loop = Loop(classifier, source, [notifier])
        threading.Timer(1.0, loop.stop).start()
        loop.run()
    lines = one_manager.lines()
    assert lines.count("READY=1") == 1 and lines.count("WATCHDOG=1") >= 5
    assert any(line.startswith("STATUS=") and ("camera black" in line or "camera lost" in line) for line in lines)


def test_a_stalled_thread_stops_the_beat_but_not_readiness(one_manager: Manager) -> None:
    clock = Ticking()
    with Notifier(environ=environ(one_manager, watchdog_s=30), clock=clock) as notifier:
        notifier.stalled = lambda: "uplink"
        for _ in range(900):
            notifier.on_tick()
            clock.now += 0.1
        lines = one_manager.lines()
        assert "READY=1" in lines and "WATCHDOG=1" not in lines
        assert any("uplink" in line and "makes no progress" in line for line in lines)
        notifier.stalled = lambda: ""
        clock.now += 10
        notifier.on_tick()
        assert one_manager.messages() == ["WATCHDOG=1"]


def test_beats_are_sent_every_third_of_the_watchdogs_time(one_manager: Manager) -> None:
    clock = Ticking()
    with Notifier(environ=environ(one_manager, watchdog_s=30), clock=clock) as notifier:
        sent = []
        for _ in range(900):  # 90 s in turns of a tenth
            notifier.on_tick()
            sent += one_manager.messages()
            clock.now += 0.1
        assert sent == ["READY=1\nWATCHDOG=1", *["WATCHDOG=1"] * 8]
        assert notifier.lost == 0


def test_without_a_watchdog_there_are_no_beats_once_it_is_ready(one_manager: Manager) -> None:
    clock = Ticking()
    with Notifier(environ=environ(one_manager, watchdog_s=None), clock=clock) as notifier:
        assert notifier.watchdog_s is None
        for _ in range(1200):
            notifier.on_tick()
            clock.now += 0.1
        assert one_manager.messages() == ["READY=1"]


@pytest.mark.parametrize(
    ("usec", "pid", "expected"),
    [
        ("30000000", str(os.getpid()), 30.0),
        ("30000000", None, 30.0),
        ("30000000", "1", None),
        ("0", None, None),
        ("-5", None, None),
        ("soon", None, None),
        ("9" * 30, None, None),
        (None, None, None),
    ],
    ids=["mine", "no pid", "another's", "zero", "negative", "text", "huge", "none"],
)
def test_watchdog_of_the_environment(usec: str | None, pid: str | None, expected: float | None) -> None:
    environment = {"WATCHDOG_USEC": usec, "WATCHDOG_PID": pid}
    assert Notifier(environ={k: v for k, v in environment.items() if v is not None}).watchdog_s == expected


def test_a_status_is_one_line_and_sent_when_it_changes(one_manager: Manager) -> None:
    with Notifier(environ=environ(one_manager)) as notifier:
        notifier.status("lost\nWATCHDOG=1\x00\x1b[2J" + "x" * 500)
        (message,) = one_manager.messages()
        assert message.startswith("STATUS=lost WATCHDOG=1 [2J") and "\n" not in message and len(message) < 250
        notifier.status("same")
        notifier.status("same")
        assert one_manager.messages() == ["STATUS=same"]
        notifier.on_camera_state(CameraState(condition="lost", reason="camera mjpeg:x: connection refused"))
        assert one_manager.messages() == ["STATUS=camera lost: mjpeg:x: connection refused"]
        notifier.status("half a surrogate \ud800")
        assert one_manager.messages() == ["STATUS=half a surrogate ?"]


def test_a_reload_begins_and_ends(one_manager: Manager, pristine_bundle: Path) -> None:
    with Notifier(environ=environ(one_manager)) as notifier, Classifier.open(pristine_bundle) as classifier:
        notifier.reloading()
        notifier.reloaded()
        assert one_manager.messages() == [], "nothing is reloaded before the service is ready"
        notifier.on_tick()
        before = time.monotonic_ns() // 1000
        notifier.reloading()
        notifier.reloading()
        ready, reloading = one_manager.messages()
        assert ready == "READY=1\nWATCHDOG=1"
        match = re.fullmatch(r"RELOADING=1\nMONOTONIC_USEC=(\d+)", reloading)
        assert match is not None
        assert before <= int(match[1]) <= time.monotonic_ns() // 1000
        notifier.on_model(classifier)
        status, ready = one_manager.messages()
        assert status.startswith("STATUS=tiny-shapes") and ready == "READY=1"


# --- a loop that hangs, a camera that is lost ------------------------------------------------------------------------


class Hanging(Classifier):
    """A model that hangs on request until it is released."""

    def __init__(self, real: Classifier) -> None:
        super().__init__(real.bundle, real.runtime, real.artefact)
        self.hang, self.hangs, self.go = threading.Event(), threading.Event(), threading.Event()

    def predict(self, frame: Pixels) -> Prediction:
        if self.hang.is_set():
            self.hangs.set()
            self.go.wait(60)
        return super().predict(frame)


def test_inference_that_hangs_stops_the_beat(one_manager: Manager, pristine_bundle: Path) -> None:
    notifier = Notifier(environ=environ(one_manager, watchdog_s=0.15))
    with notifier, Hanging(Classifier.open(pristine_bundle)) as classifier:
        loop = Loop(classifier, open_camera("fake:?frames=1000000&size=64x64"), [notifier])
        thread = threading.Thread(target=loop.run)
        thread.start()
        try:
            assert beats(one_manager, 3)
            classifier.hang.set()
            assert classifier.hangs.wait(30)
            one_manager.messages()
            time.sleep(1.0)
            assert one_manager.messages() == [], "six beats would have been due"
        finally:
            classifier.hang.clear()
            classifier.go.set()
        assert beats(one_manager, 3)
        loop.stop()
        thread.join(30)
        assert not thread.is_alive()


def test_a_camera_that_delivers_nothing_does_not_stop_the_beat(one_manager: Manager, pristine_bundle: Path) -> None:
    class Silent(FakeCamera):
        """Waits for ever, as a live camera that was unplugged."""

        def __init__(self) -> None:
            super().__init__([], live=True)
            self._woken = threading.Event()

        def capture(self) -> None:
            self._woken.wait(60)

        def close(self) -> None:
            self._woken.set()

    notifier = Notifier(environ=environ(one_manager, watchdog_s=0.3))
    with notifier, Classifier.open(pristine_bundle) as classifier:
        loop = Loop(classifier, Silent(), [notifier])
        thread = threading.Thread(target=loop.run)
        thread.start()
        try:
            assert beats(one_manager, 5)
            assert notifier.ready
        finally:
            loop.stop()
            thread.join(30)
        assert not thread.is_alive()


def beats(manager: Manager, wanted: int) -> bool:
    """Whether so many beats arrive within a generous time."""
    deadline = time.monotonic() + 30
    while wanted > 0 and time.monotonic() < deadline:
        wanted -= manager.lines(wait_s=1.0).count("WATCHDOG=1")
    return wanted <= 0


# --- sockets that fail -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", [None, "", "/", "@", "relative", "vsock:2:1234", "/" + "long" * 40, "/no/such/folder/socket"]
)
def test_without_a_usable_socket_nothing_happens(name: str | None) -> None:
    with Notifier(environ={"WATCHDOG_USEC": "1000000"} | ({} if name is None else {"NOTIFY_SOCKET": name})) as notifier:
        notifier.on_tick()
        notifier.status("x")
        notifier.reloading()
        notifier.on_tick()
        assert notifier.ready == (name != "/no/such/folder/socket"), "nobody waits for it without a socket"
    notifier.on_tick()  # also when it is closed
    notifier.close()


def test_a_socket_that_is_full_or_gone_never_disturbs_and_ready_is_sent_later(tmp_path: Path) -> None:
    name = str(tmp_path / "n")
    manager = Manager(name)
    clock = Ticking()
    with Notifier(environ=environ(manager), clock=clock) as notifier:
        started = time.monotonic()
        for number in range(5000):  # far more than a socket holds
            notifier.status(str(number))
        assert notifier.lost > 1000 and time.monotonic() - started < 20, "a full socket does not block"
        notifier.on_tick()
        assert not notifier.ready
        manager.messages()
        manager.close()
        Path(name).unlink()
        clock.now += 1.1
        notifier.on_tick()
        assert not notifier.ready
        manager = Manager(name)
        clock.now += 1.1
        notifier.on_tick()
        assert notifier.ready and manager.messages() == ["READY=1\nWATCHDOG=1"]
    manager.close()


def test_a_beat_that_failed_is_tried_again_soon_but_not_at_every_turn(tmp_path: Path) -> None:
    clock = Ticking()
    with Notifier(environ={"NOTIFY_SOCKET": str(tmp_path / "n"), "WATCHDOG_USEC": "30000000"}, clock=clock) as notifier:
        for _ in range(50):
            notifier.on_tick()
            clock.now += 0.1
    assert 4 <= notifier.lost <= 7, "once a second, and the final message"


# --- a process of its own --------------------------------------------------------------------------------------------


def test_the_real_service_is_ready_beats_reloads_and_stops(manager: Manager, pristine_bundle: Path) -> None:
    command = [sys.executable, "-m", "eyas_device", "run", "--bundle", str(pristine_bundle)]
    process = subprocess.Popen(
        [*command, "--camera", "fake:?frames=999999999&size=64x64&fps=100"],
        env={**os.environ, "NOTIFY_SOCKET": manager.name, "WATCHDOG_USEC": "300000"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    lines: list[str] = []

    def wait_for(line: str, times: int) -> None:
        deadline = time.monotonic() + 60
        while lines.count(line) < times:
            assert time.monotonic() < deadline and process.poll() is None, lines
            lines.extend(manager.lines(wait_s=1.0))

    try:
        wait_for("READY=1", 1)
        wait_for("WATCHDOG=1", 5)
        process.send_signal(signal.SIGHUP)
        wait_for("READY=1", 2)
        process.terminate()
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.wait()
    lines += manager.lines()
    states = [line for line in lines if line in ("READY=1", "RELOADING=1", "STOPPING=1")]
    assert states == ["READY=1", "RELOADING=1", "READY=1", "STOPPING=1"]
    assert manager.pids == {process.pid}, "NotifyAccess=main: only the main process may notify"


# --- the unit --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def systemd_analyze() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs systemd's tool, which needs no running systemd. Skips without it, but fails on continuous integration."""
    (tool,) = require("systemd-analyze")

    def analyze(*arguments: object) -> subprocess.CompletedProcess[str]:
        command = [tool, *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)

    return analyze


TEMPLATE = UNIT.with_name("eyas-device@.service")
UPDATER = UNIT.with_name("eyas-device-update.service")
UPDATER_TEMPLATE = UNIT.with_name("eyas-device-update@.service")
each = pytest.mark.parametrize(
    "unit", [UNIT, TEMPLATE, UPDATER, UPDATER_TEMPLATE], ids=["one", "several", "updater", "updaters"]
)


def settings_of(unit: Path) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for line in unit.read_text(encoding="utf-8").splitlines():
        if match := re.fullmatch(r"([A-Za-z]+)=(.*)", line):
            found.setdefault(match[1], []).append(match[2])
    return found


@pytest.fixture
def installed(tmp_path: Path) -> Callable[[Path], Path]:
    """Copy a unit to where systemd's tools take it; an instance of a template has a name."""

    def install(unit: Path) -> Path:
        target = tmp_path / unit.name.replace("@", "@line-7")
        target.write_text(unit.read_text(encoding="utf-8"))
        return target

    return install


@each
def test_the_unit_is_hardened(
    unit: Path, installed: Callable[[Path], Path], systemd_analyze: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    done = systemd_analyze("security", "--offline=true", "--no-pager", installed(unit))
    match = re.search(r"Overall exposure level for eyas-device(?:-update)?(?:@line-7)?\.service: ([\d.]+)", done.stdout)
    assert match is not None, done.stdout + done.stderr
    assert float(match[1]) <= MAX_EXPOSURE, done.stdout


@each
def test_the_unit_has_no_faults(
    unit: Path, installed: Callable[[Path], Path], systemd_analyze: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    """Systemd before 254 ignores the growing pauses between restarts, and says so."""
    done = systemd_analyze("verify", "--man=no", installed(unit))
    complaints = [line for line in done.stderr.splitlines() if "is not executable" not in line]
    version = int(systemd_analyze("--version").stdout.split()[1])
    if version < 254:
        newer = re.compile(r"Unknown key (?:name )?'Restart(Steps|MaxDelaySec)' in section ")
        ignored = [line for line in complaints if newer.search(line)]
        assert len(ignored) == (0 if "update" in unit.name else 2)
        complaints = [line for line in complaints if line not in ignored]
    assert complaints == []


def test_the_unit_for_several_cameras_differs_in_the_camera_alone() -> None:
    """Configuration, state and runtime folder, and description; everything else, hardening included, is the same."""
    one, several = settings_of(UNIT), settings_of(TEMPLATE)
    different = {key for key in one | several if one.get(key) != several.get(key)}
    assert different == {"Description", "ExecStart", "ExecReload", "RuntimeDirectory", "StateDirectory"}
    assert several["ExecStart"] == [one["ExecStart"][0].replace("device.toml", "devices/%i.toml")]
    assert several["ExecReload"] == [one["ExecReload"][0].replace("device.toml", "devices/%i.toml")]
    config = several["ExecStart"][0].split()[-1].replace("%i", "line-7")
    assert Path(config) == INSTANCES / "line-7.toml"
    assert f"/var/lib/{several['StateDirectory'][0]}" == f"{STATE}/devices/%i"
    # systemd removes a unit's runtime folder with all that is in it when the unit stops: neither lies in the other
    folders = [Path(settings["RuntimeDirectory"][0]) for settings in (one, several)]
    assert folders == [Path("eyas"), Path("eyas-devices/%i")]


def test_the_updater_is_hardened_as_the_agent_is() -> None:
    """It has no devices and comes last; everything else that shuts the agent in shuts it in, too."""
    agent, updater = settings_of(UNIT), settings_of(UPDATER)
    own = {
        *("Description", "Type", "ExecStart", "TimeoutStopSec", "Restart", "RestartSec", "MemoryMax", "TasksMax"),
        *("LimitNOFILE", "Nice", "CPUWeight", "IOSchedulingClass", "OOMScoreAdjust", "PrivateDevices"),
    }
    left_out = {
        *("NotifyAccess", "ExecReload", "TimeoutStartSec", "WatchdogSec", "RestartSteps", "RestartMaxDelaySec"),
        *("KillMode", "SupplementaryGroups", "DeviceAllow", "RemoveIPC"),
        *("RuntimeDirectory", "RuntimeDirectoryMode"),  # systemd would remove the agent's with this unit
    }
    assert {key for key in agent | updater if agent.get(key) != updater.get(key)} == own | left_out
    assert left_out.isdisjoint(updater) and updater["PrivateDevices"] == ["yes"]
    assert updater["StateDirectory"] == agent["StateDirectory"] and updater["User"] == ["eyas"]


def test_the_updater_of_several_cameras_differs_in_the_camera_alone() -> None:
    one, several = settings_of(UPDATER), settings_of(UPDATER_TEMPLATE)
    assert {key for key in one | several if one.get(key) != several.get(key)} == {
        *("Description", "ExecStart", "StateDirectory"),
    }
    assert several["ExecStart"] == [one["ExecStart"][0].replace("device.toml", "devices/%i.toml")]
    assert several["StateDirectory"] == settings_of(TEMPLATE)["StateDirectory"]


def test_root_s_unit_for_the_agent_has_no_network_and_writes_environments_only(
    tmp_path: Path, systemd_analyze: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    for kind in ("path", "service"):
        unit = UNIT.with_name(f"eyas-device-agent-update.{kind}")
        (tmp_path / unit.name).write_text(unit.read_text(encoding="utf-8"))
    service = tmp_path / "eyas-device-agent-update.service"
    done = systemd_analyze("security", "--offline=true", "--no-pager", service)
    assert float(done.stdout.rpartition("service: ")[2].split()[0]) <= 3.0, done.stdout
    done = systemd_analyze("verify", "--man=no", service, service.with_suffix(".path"))
    assert [line for line in done.stderr.splitlines() if "is not executable" not in line] == []
    settings = settings_of(service)
    assert (settings["PrivateNetwork"], settings["ReadWritePaths"]) == (["yes"], ["/opt/eyas"])
    assert f"/var/lib/{settings['StateDirectory'][0]}" == str(ROOT_STATE)
    [watched] = settings_of(service.with_suffix(".path"))["PathChanged"]
    assert watched == f"{STATE}/{UPDATES}/{REQUEST}"


def test_the_pause_between_restarts_grows_but_stays_short() -> None:
    settings = settings_of(UNIT)
    assert (settings["RestartSec"], settings["RestartMaxDelaySec"]) == (["5s"], ["60s"])
    assert int(settings["RestartSteps"][0]) > 1


def test_the_tool_would_find_a_fault(
    systemd_analyze: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    text = UNIT.read_text(encoding="utf-8")
    (faulty := tmp_path / UNIT.name).write_text(text.replace("WatchdogSec=", "WatchdogSecond=").replace("Protect", "#"))
    assert "WatchdogSecond" in systemd_analyze("verify", "--man=no", faulty).stderr
    score = systemd_analyze("security", "--offline=true", "--no-pager", faulty).stdout.rpartition("service: ")[2]
    assert float(score.split()[0]) > MAX_EXPOSURE


def test_the_unit_starts_the_verb_and_never_gives_up() -> None:
    settings = settings_of(UNIT)
    assert (settings["Type"], settings["Restart"], settings["StartLimitIntervalSec"]) == (["notify"], ["always"], ["0"])
    for unit, verb in ((UNIT, run), (UPDATER, update)):
        program, name, *options = settings_of(unit)["ExecStart"][0].split()
        assert (Path(program).name, name) == ("eyas-device", verb.__name__.rpartition(".")[2])
        parser = argparse.ArgumentParser()
        verb.add_arguments(parser)
        parser.parse_args(options)


_WITHOUT_WRITE_EXECUTE = """
import ctypes, json, mmap, sys
import numpy as np

PR_SET_MDWE, PR_MDWE_REFUSE_EXEC_GAIN = 65, 1
if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_MDWE, PR_MDWE_REFUSE_EXEC_GAIN, 0, 0, 0) != 0:
    print(json.dumps("not here"))
    sys.exit()
try:
    mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    refused = False
except PermissionError:
    refused = True

from eyas_device.predict import Classifier

differences = {}
for name in ("litert", "onnx"):
    with Classifier.open(sys.argv[1], name) as classifier:
        golden = classifier.bundle.golden()
        recorded = golden.probabilities[classifier.artefact.name]
        found = np.stack([classifier.predict(frame).probabilities for frame in golden.frames])
        differences[name] = float(np.abs(found - recorded).max())
print(json.dumps({"refused": refused, "differences": differences}))
"""


def test_litert_and_onnx_runtime_answer_without_writable_code(pristine_bundle: Path) -> None:
    command = [sys.executable, "-c", _WITHOUT_WRITE_EXECUTE, str(pristine_bundle)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    if found == "not here":
        pytest.skip("this kernel has no PR_SET_MDWE (Linux 6.3), what MemoryDenyWriteExecute does cannot be tried")
    assert found["refused"], "the process could still make memory both writable and executable"
    assert max(found["differences"].values()) < 0.05 and len(found["differences"]) == 2


def test_the_status_line_holds_figures_and_the_link_and_is_seldom_sent(
    one_manager: Manager, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [1000.0]
    monkeypatch.setattr(report.time, "monotonic", lambda: now[0])
    notifier = Notifier(environ={"NOTIFY_SOCKET": one_manager.name}, clock=lambda: now[0])
    monitor = HealthMonitor()
    monitor.recent = Recent(lambda: now[0])
    monkeypatch.setattr(HealthMonitor, "link", property(lambda self: "not connected: mqtt://me:S3cret@h refused\nx=1"))
    text = StatusText(monitor, notifier)
    monitor.recent.on_tick()
    for _ in range(300):  # a minute
        monitor.recent.on_unreadable(ImageError("x"))
        now[0] += 0.2
        text.on_tick()
    lines = [line for line in one_manager.lines() if line.startswith("STATUS=")]
    assert 1 <= len(lines) <= 7
    assert "0.0 fps" in lines[-1] and "unreadable 100 %" in lines[-1] and "mqtt not connected" in lines[-1]
    assert "S3cret" not in " ".join(lines) and not any(line == "x=1" for line in one_manager.lines())
    notifier.close()
