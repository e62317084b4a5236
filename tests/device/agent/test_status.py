"""Asking the running agent: what it answers, who may ask, and what happens with hostile or broken ends."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import socket
import stat
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import msgspec
import pytest

from eyas_device.agent.health import HealthMonitor
from eyas_device.agent.report import describe
from eyas_device.agent.systemd import UNIT
from eyas_device.bundle import MANIFEST
from eyas_device.cli import main
from eyas_device.config import Config, DeviceSection
from eyas_device.doctor import Context, examine, probes, system
from eyas_device.errors import EyasError
from eyas_device.telemetry.local import (
    SOCKET,
    AgentStatus,
    CameraReport,
    Figures,
    LinkReport,
    LogReport,
    ModelReport,
    StatusServer,
    ask,
)
from eyas_device.telemetry.messages import Health
from eyas_device.updates import records
from eyas_device.updates.records import AgentFile, AgentRecord
from eyas_device.updates.slots import Slots
from tests.device.agent.test_app import LIVE, Service, serve  # noqa: F401 - fixture
from tests.support.brokers import free_port

ODD = "\x1b[2J猫\n"


@pytest.fixture
def state(tmp_path: Path) -> Path:
    (folder := tmp_path / "state").mkdir()
    return folder


@pytest.fixture
def served(state: Path) -> Iterator[Callable[..., StatusServer]]:
    """Start servers that end with the test."""
    started: list[StatusServer] = []

    def start(
        describe: Callable[[], AgentStatus] = lambda: AgentStatus(device="d"), folder: Path = state
    ) -> StatusServer:
        started.append(StatusServer(folder, describe, on_error=lambda name, error: errors.append(error)))
        return started[-1]

    errors: list[BaseException] = []
    yield start
    for server in started:
        server.close()


# A whole agent


def test_a_running_agent_says_what_it_does(
    serve: Callable[..., Service],  # noqa: F811 - fixture
    pristine_bundle: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    state, port = tmp_path / ("s" * 40) / ("d" * 100), free_port()
    state.mkdir(parents=True)
    Slots(state).install(pristine_bundle)
    (config := tmp_path / "device.toml").write_text(
        f'[device]\nstate = "{state}"\nsite = "hall-2"\nname = "cam"\n[camera]\nsource = "{LIVE}"\n'
        f'[telemetry]\nbroker = "127.0.0.1:{port}"\nwindow_s = 0.2\n'
    )
    service = serve("--config", config)
    service.wait_for("frames ")
    assert main(["status", "--config", str(config), "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    digest = hashlib.sha256((pristine_bundle / MANIFEST).read_bytes()).hexdigest()
    assert (found["site"], found["device"], found["pid"]) == ("hall-2", "cam", service.process.pid)
    assert found["model"]["name"] == "tiny-shapes 1.2.3" and digest.startswith(found["model"]["digest"])
    assert len(found["model"]["digest"]) == 12 and found["model"]["slot"] == "a"
    assert found["model"]["artefact"] == "litert-int8" and found["model"]["selection"]
    assert found["camera"]["state"] == "delivering" and found["camera"]["last_frame_s"] < 5
    assert found["recent"]["fps"] > 1 and found["recent"]["latency_ms"]["p50"] > 0
    assert sum(found["recent"]["counts"].values()) == found["recent"]["frames"] > 0
    assert found["link"]["state"].startswith("not connected") and found["link"]["on_disk"] >= 1
    assert not found["healthy"] and any("mqtt not connected" in problem for problem in found["problems"])
    assert any("mqtt not connected" in entry["text"] for entry in found["warnings"])
    status = (state / SOCKET).stat()
    assert stat.S_IMODE(status.st_mode) == 0o600 and status.st_uid == os.geteuid()
    assert main(["status", "--state", str(state)]) == 1
    assert "hall-2/cam: degraded" in capsys.readouterr().out
    context = Context(config=Config(device=DeviceSection(state=str(state))))
    (row,) = examine(context, [system.agent])
    assert row.status == "yellow" and "tiny-shapes 1.2.3" in row.finding and "mqtt not connected" in row.finding
    assert service.end() == 0
    assert re.search(r"[\d,]+ messages? waits? on disk for the next start", "\n".join(service.lines))
    assert not (state / SOCKET).exists()


@pytest.mark.parametrize("runtime", ["eyas", "eyas-devices/line-7"])
def test_a_service_can_be_asked_while_its_disk_takes_nothing(
    runtime: str, served: Callable[..., StatusServer], state: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its record and socket are in memory, in the unit's runtime folder."""
    (tmp_path / "run" / runtime).mkdir(parents=True)
    monkeypatch.setattr(records, "RUN", tmp_path / "run")
    monkeypatch.setenv("RUNTIME_DIRECTORY", str(tmp_path / "run" / runtime))
    (state / SOCKET).mkdir()  # nothing can be put there
    (state / "agent.json").mkdir()
    assert records.read_agent(state) is None
    with AgentFile(state) as file:
        assert file.held
        file.write(AgentRecord(model="tiny-shapes 1.2.3"))
        served()
        monkeypatch.delenv("RUNTIME_DIRECTORY")  # who asks is no service
        found = records.read_agent(state)
        assert found is not None and (found.pid, found.model) == (os.getpid(), "tiny-shapes 1.2.3")
        assert ask(state).device == "d"
    assert records.read_agent(state) is None
    (other := tmp_path / "other").mkdir()
    assert records.agent_folder(other) == other


def test_the_last_words_count_what_is_lost(
    serve: Callable[..., Service],  # noqa: F811 - fixture
    pristine_bundle: Path,
    tmp_path: Path,
) -> None:
    (config := tmp_path / "device.toml").write_text(
        f'[device]\nstate = "/proc/nowhere"\n[camera]\nsource = "{LIVE}"\n'
        f'[telemetry]\nbroker = "127.0.0.1:{free_port()}"\nwindow_s = 0.2\n'
    )
    service = serve("--config", config, "--bundle", pristine_bundle)
    service.wait_for("frames ")
    assert service.end() == 0
    assert re.search(r"[\d,]+ messages wait in memory only: lost", "\n".join(service.lines))


# The socket


def test_a_stale_socket_is_replaced_and_only_the_owner_is_let_in(
    state: Path, served: Callable[..., StatusServer]
) -> None:
    with socket.socket(socket.AF_UNIX) as killed:
        killed.bind(str(state / SOCKET))
    served()
    assert ask(state).device == "d"
    assert stat.S_IMODE((state / SOCKET).stat().st_mode) == 0o600
    if os.geteuid() == 0:
        assert connects_as_another_user(state) == errno.EACCES


def connects_as_another_user(state: Path) -> int:
    """The error number of a connection by a user who may enter the folder."""
    state.chmod(0o755)
    child = os.fork()
    if child == 0:
        os.chdir(state)
        os.setuid(65534)
        try:
            socket.socket(socket.AF_UNIX).connect(SOCKET)
        except OSError as error:
            os._exit(error.errno or 1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_hostile_clients_cost_the_others_nothing(state: Path, served: Callable[..., StatusServer]) -> None:
    calls: list[float] = []

    def describe() -> AgentStatus:
        calls.append(time.monotonic())
        return AgentStatus(device="d", problems=("x" * 60_000,))

    served(describe)
    clients = []
    for number in range(40):
        clients.append(client := socket.socket(socket.AF_UNIX))
        client.settimeout(0.05)
        with suppress(OSError):
            client.connect(str(state / SOCKET))
            client.send(b"GET / HTTP/1.1\r\n\r\n" * (number + 1))  # and never reads what it gets
    for client in clients[1:]:
        client.close()
    started = time.monotonic()
    assert ask(state, timeout_s=20).problems == ("x" * 60_000,)
    clients[0].close()
    assert len(calls) <= 2 + (time.monotonic() - started) * 5, "many clients cost no more than one"


def test_a_description_that_fails_is_said_and_tried_again(state: Path, served: Callable[..., StatusServer]) -> None:
    answers = iter([ZeroDivisionError("sensor"), None])

    def describe() -> AgentStatus:
        if (error := next(answers)) is not None:
            raise error
        return AgentStatus(device="again")

    served(describe)
    with pytest.raises(EyasError, match="failed to describe itself"):
        ask(state)
    assert ask(state, timeout_s=10).device == "again"  # the thread starts again after a second


def test_one_agent_answers_for_a_state_folder(state: Path) -> None:
    with AgentFile(state) as first, AgentFile(state) as second:
        assert first.held and not second.held
    with AgentFile(state / "missing") as without:
        assert not without.held


class Impostor:
    """What a broken or hostile program at the socket sends."""

    def __init__(self, state: Path, *pieces: bytes, pause_s: float = 0.0, ends: bool = True) -> None:
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(str(state / SOCKET))
        self.listener.listen(1)
        self.pieces, self.pause_s, self.ends = pieces, pause_s, ends
        self.left = threading.Event()
        threading.Thread(target=self.answer, daemon=True).start()

    def answer(self) -> None:
        client, _ = self.listener.accept()
        with suppress(OSError), client:
            for piece in self.pieces:
                client.sendall(piece)
                time.sleep(self.pause_s)
            if not self.ends:
                self.left.wait(20)

    def close(self) -> None:
        self.left.set()
        self.listener.close()


@pytest.mark.parametrize(
    ("pieces", "pause_s", "ends", "message"),
    [
        ((b"SSH-2.0-OpenSSH\r\n",), 0.0, True, "is not an agent of this version"),
        ((b"\xff\xfe{",), 0.0, True, "is not an agent of this version"),
        ((b"[" * 100_000,), 0.0, True, "is not an agent of this version"),
        ((b"x" * (1 << 20),) * 4, 0.0, True, "is not an agent of this version"),
        ((b"{",), 0.0, False, "does not answer within 0.5 s"),
        ((b" ",) * 100, 0.05, True, "does not answer within 0.5 s"),
    ],
)
def test_what_is_not_an_agent_is_one_line(
    pieces: tuple[bytes, ...], pause_s: float, ends: bool, message: str, state: Path
) -> None:
    impostor = Impostor(state, *pieces, pause_s=pause_s, ends=ends)
    try:
        started = time.monotonic()
        with pytest.raises(EyasError, match=message):
            ask(state, timeout_s=0.5)
        assert time.monotonic() - started < 10
    finally:
        impostor.close()


def test_nobody_to_ask(state: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def said(*arguments: object) -> str:
        assert main(["status", *map(str, arguments)]) == 2
        return capsys.readouterr().err

    assert "no agent runs with this state folder; start it" in said("--state", state)
    assert "no such folder; only an agent with a state folder" in said("--state", tmp_path / "missing")
    (state / SOCKET).write_text("a file")
    assert os.strerror(errno.ENOTSOCK) in said("--state", state)
    (state / SOCKET).unlink()
    (state / SOCKET).symlink_to("/run/systemd/notify")
    assert os.strerror(errno.ENOTSOCK) in said("--state", state)
    (state / SOCKET).unlink()
    with AgentFile(state) as held:
        held.write(AgentRecord())
        assert f"process {os.getpid()} runs here but cannot be asked" in said("--state", state)


# What counts as a problem


@pytest.mark.parametrize(
    ("health", "problem"),
    [
        ({"paused": True, "paused_until": 7200.0}, "paused for another 2.0 h"),
        ({"paused": True}, "paused"),
        (
            {"ood": True, "ood_reason": "darker than the training images"},
            "out of distribution: darker than the training",
        ),
        ({"throttled": ("under-voltage", "throttled")}, "throttled: under-voltage, throttled"),
        ({"faults": ("output http://me:S3cret@h/ fails",)}, "output http://***@h/ fails"),
    ],
)
def test_each_problem_is_one_sentence(health: dict[str, object], problem: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monitor = HealthMonitor()
    monitor.models = SimpleNamespace(progress="", record=AgentRecord(model="m 1.0.0"))  # type: ignore[assignment]
    if "paused_until" in health:  # seconds from now
        health = health | {"paused_until": time.time() + 7200.0}
    monkeypatch.setattr(HealthMonitor, "health", lambda self: Health(**health))  # type: ignore[arg-type]
    status = describe(monitor, Config())
    assert len(status.problems) == 1 and problem in status.problems[0] and not status.healthy
    monkeypatch.setattr(HealthMonitor, "health", lambda self: Health())
    assert describe(monitor, Config()).healthy


def test_a_model_that_was_refused_or_is_missing_is_a_problem() -> None:
    monitor = HealthMonitor()
    assert "no model runs" in describe(monitor, Config()).problems[0]
    record = AgentRecord(model="m 1.0.0", refused_model="m 2.0.0", refused_reason="too slow", manifest_sha256="ab" * 32)
    monitor.models = SimpleNamespace(progress="", record=record)  # type: ignore[assignment]
    status = describe(monitor, Config())
    assert status.problems == ("m 2.0.0 was refused: too slow",)
    assert (status.model.name, status.model.digest) == ("m 1.0.0", "ab" * 6)


# The verb


FULL = AgentStatus(
    agent="0.1.0",
    pid=7,
    site="hall",
    device="cam",
    uptime_s=7300,
    healthy=False,
    problems=(f"camera lost: no route {ODD}",),
    model=ModelReport(name="solar 1.3.0", digest="3f2a", slot="b", artefact="litert-int8", selection="as configured",
                      refused="solar 1.4.0", refused_reason="too slow"),
    camera=CameraReport(source="rtsp://h/", state="lost", reason="no route", since_s=200, last_frame_s=201, losses=3),
    recent=Figures(seconds=60, frames=90, fps=1.5, uncertain=9, unreadable=10, latency_ms={"p50": 12.34},
                   counts={ODD: 90}),
    frames=1234567,
    ood=True,
    ood_reason="darker than 99 % of the training images",
    link=LinkReport(broker="h:8883", state="connected", since_s=90, on_disk=12, in_memory=3, given_up={"event": 2},
                    certificate_days=9.4),
    paused=True,
    paused_until=1_800_000_000.0,
    restarts={"window": 2},
    temperature_c=71.6,
    throttled=("under-voltage",),
    warnings=(LogReport(time=1_800_000_000.0, level="warning", text=f"camera lost {ODD}", count=1250),),
)  # fmt: skip


def test_people_see_all_of_it_and_nothing_that_moves_the_cursor(
    state: Path, served: Callable[..., StatusServer], capsys: pytest.CaptureFixture[str]
) -> None:
    served(lambda: FULL)
    assert main(["status", "--state", str(state)]) == 1
    shown = capsys.readouterr().out
    assert all(line.isprintable() for line in shown.splitlines())
    for text in (
        "hall/cam: degraded",
        r"! camera lost: no route \x1b[2J猫", "solar 1.3.0 (3f2a, slot b)", "refused: solar 1.4.0",
        "1,234,567 since the start", "90, 1.5 fps", "p50 12.3 ms", "uncertain 10.0 %", "unreadable 10.0 %",
        "out of distribution: yes (darker than 99 % of the training images)", "12 on disk, 3 in memory", "event 2",
        "certificate 9 days", "yes until 2027-01-", "window 2", "72 °C, throttled: under-voltage", "up 2.0 h",
        "(1,250 times)", "lost for 3 min, last frame 3 min ago, lost 3 times",
    ):  # fmt: skip
        assert text in shown, text
    assert main(["status", "--state", str(state), "--json"]) == 1
    assert msgspec.json.decode(capsys.readouterr().out, type=AgentStatus) == FULL


def test_a_healthy_agent_is_0(
    state: Path, served: Callable[..., StatusServer], capsys: pytest.CaptureFixture[str]
) -> None:
    served(lambda: AgentStatus(site="s", device="d", healthy=True))
    assert main(["status", "--state", str(state)]) == 0
    assert "s/d: healthy" in capsys.readouterr().out


def test_a_newer_agent_is_understood(state: Path) -> None:
    impostor = Impostor(state, b'{"device":"d","of_tomorrow":[1],"recent":{"fps":2,"gpu":3},"healthy":true}\n')
    try:
        status = ask(state)
        assert (status.device, status.recent.fps, status.healthy) == ("d", 2, True)
    finally:
        impostor.close()


def test_the_doctor_takes_the_agents_word_for_a_camera_that_it_holds(
    state: Path, served: Callable[..., StatusServer]
) -> None:
    config = Config(device=DeviceSection(state=str(state)))
    config = msgspec.structs.replace(config, camera=msgspec.structs.replace(config.camera, source="v4l2:97"))
    served(lambda: AgentStatus(camera=CameraReport(source="v4l2:97", state="delivering")))
    with AgentFile(state) as held:
        held.write(AgentRecord())
        (row,) = examine(Context(config=config), [probes.camera])
    assert row.status == "green" and "delivering, held by the agent" in row.finding


def test_the_unit_allows_the_socket() -> None:
    families = re.search(r"^RestrictAddressFamilies=(.*)$", UNIT.read_text(), re.MULTILINE)
    assert families is not None and "AF_UNIX" in families[1].split()
