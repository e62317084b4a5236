"""Commands to devices: real agents behind a mosquitto with the kit's certificates and access list."""

from __future__ import annotations

import json
import re
import signal
import stat
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import pytest

from eyas_device.telemetry.messages import Command, Result, Status
from eyas_host.fleet.broker.client import BrokerAccess
from eyas_host.fleet.broker.kit import Kit, prepare
from eyas_host.fleet.commands.link import CommandLink
from eyas_host.fleet.commands.send import Outcome, Request, send
from eyas_host.fleet.commands.show import findings, summary
from tests.support.agents import AgentProcess, start_broker, start_kit
from tests.support.brokers import free_port
from tests.support.fleet_parts import Processes, wait_until


class Fleet(NamedTuple):
    """A kit's broker with three agents: everything allowed, pause alone allowed, and one at another site."""

    kit: Kit
    access: BrokerAccess
    folder: Path
    seven: AgentProcess
    eight: AgentProcess
    nine: AgentProcess

    def status(self, name: str) -> Status:
        with CommandLink(self.access) as link:
            return next(status for (_, device), status in link.statuses.items() if device == name)

    def is_in_state(self, name: str, state: str) -> bool:
        with CommandLink(self.access) as link:
            return any(device == name and status.state == state for (_, device), status in link.statuses.items())

    def send(self, command: str, *devices: str, **more: Any) -> dict[str, Outcome]:
        outcomes = list(send(self.access, Request(command=command, devices=devices, **more)))
        assert len({outcome.device for outcome in outcomes}) == len(outcomes), "one outcome a device"
        return {outcome.device: outcome for outcome in outcomes}

    def eyas(self, *words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "eyas_host", "send", *words, "--kit", str(self.kit.folder)]
        return subprocess.run(command, capture_output=True, text=True, cwd=self.folder, timeout=300)


@pytest.fixture(scope="module")
def fleet(pristine_bundle: Path) -> Iterator[Fleet]:
    with tempfile.TemporaryDirectory(prefix="eyas-send-") as name:
        (folder := Path(name)).chmod(0o755)
        processes = Processes(folder)
        kit = start_kit(folder, processes)
        access = BrokerAccess(
            broker=f"localhost:{kit.port}", ca=kit.host.ca, certificate=kit.host.cert, key=kit.host.key
        )
        privacy = "images = true\nmax_side = 64\nretention_days = 7"
        agents = (
            AgentProcess(kit, pristine_bundle, folder, "cam-7", privacy=privacy).start(),
            AgentProcess(kit, pristine_bundle, folder, "cam-8", commands='["pause", "snapshot"]').start(),
            AgentProcess(kit, pristine_bundle, folder, "cam-9", site="yard", privacy="events = true").start(),
        )
        made = Fleet(kit, access, folder, *agents)
        try:
            wait_until(
                lambda: all(made.is_in_state(name, "online") for name in ("cam-7", "cam-8", "cam-9")),
                90,
                "three agents",
            )
            yield made
        finally:
            for agent in agents:
                agent.stop()
            processes.close()


def test_pause_and_resume_with_their_answers(fleet: Fleet) -> None:
    before = time.time()
    answered = fleet.eyas("cam-7", "pause", "--minutes", "10")
    assert answered.returncode == 0, answered.stderr
    until = re.fullmatch(r"hall-2/cam-7  executed: paused until (\S+ \S+) UTC\n", answered.stdout)
    assert until is not None, answered.stdout
    asked = time.strftime("%Y-%m-%d %H:%M", time.gmtime(before + 600))
    later = time.strftime("%Y-%m-%d %H:%M", time.gmtime(time.time() + 600))
    assert asked <= until[1] <= later
    wait_until(lambda: fleet.status("cam-7").paused, 20, "the pause")
    refused = fleet.send("snapshot", "cam-7")["cam-7"]
    assert (refused.state, refused.detail) == ("refused", "snapshot: the loop is paused; send resume first")
    assert fleet.send("resume", "cam-7")["cam-7"].state == "executed"
    wait_until(lambda: not fleet.status("cam-7").paused, 20, "the end of the pause")


def test_all_with_one_that_refuses_and_one_that_is_offline(fleet: Fleet) -> None:
    """Exit code 1; what forbids it and since when it is away are said, and the others have executed it."""
    stopped = time.time()
    fleet.nine.stop()
    wait_until(lambda: fleet.is_in_state("cam-9", "offline"), 20, "cam-9 offline")
    try:
        answered = fleet.eyas("--all", "set-thresholds", "--threshold", "0.95", "--seconds", "60", "--json")
        assert answered.returncode == 1, answered.stderr
        rows = {row["device"]: row for row in map(json.loads, answered.stdout.splitlines())}
        assert {name: row["state"] for name, row in rows.items()} == {
            "cam-7": "executed",
            "cam-8": "refused",
            "cam-9": "offline",
        }
        data = rows["cam-7"]["data"]
        assert (data["before"], data["threshold"]) == (0.9, 0.95) and 0 < data["until"] - time.time() <= 60
        assert rows["cam-8"]["detail"].startswith("'set-thresholds' is not allowed here")
        assert 'add "set-thresholds" to commands under [telemetry]' in rows["cam-8"]["detail"]
        minute = time.strftime("%Y-%m-%d %H:%M", time.gmtime(stopped))
        assert re.match(
            rf"since {minute[:-1]}\d UTC, when it was shut down; nothing was sent$", rows["cam-9"]["detail"]
        )
        assert fleet.send("resume", site="yard")["cam-9"].state == "offline", "a site chooses its devices alone"
    finally:
        fleet.nine.start()
        wait_until(lambda: fleet.is_in_state("cam-9", "online"), 60, "cam-9")


def test_a_snapshot_saves_the_image_that_privacy_allows(fleet: Fleet) -> None:
    answered = fleet.eyas("--all", "snapshot", "--out", "images")
    assert answered.returncode == 1, "cam-8 may send no event at all"
    rows = {line.split()[0]: line for line in answered.stdout.splitlines()}
    (image,) = (fleet.folder / "images").iterdir()
    assert f"images/{image.name} (64x48, may be kept 7 days)" in rows["hall-2/cam-7"]
    assert re.search(r"executed: (cross|disc|stripes) 0\.\d\d; ", rows["hall-2/cam-7"])
    assert image.name.startswith("hall-2-cam-7-") and stat.S_IMODE(image.stat().st_mode) == 0o600
    assert cv2.imread(str(image)).shape == (48, 64, 3)
    assert "refused: privacy.events and privacy.images are off" in rows["hall-2/cam-8"]
    assert "no image: privacy.images is off; set images = true under [privacy]" in rows["yard/cam-9"]


def test_two_senders_get_their_own_answers_each(fleet: Fleet) -> None:
    taken: list[Outcome] = []

    def ask() -> None:
        for _ in range(3):
            taken.append(fleet.send("snapshot", "cam-7")["cam-7"])

    threads = [threading.Thread(target=ask) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    events = [outcome.event for outcome in taken]
    assert all(outcome.state == "executed" for outcome in taken)
    assert len({event.command for event in events if event is not None}) == 6, "nobody got another one's event"


def test_the_remote_doctor_reads_the_agents_configuration(fleet: Fleet) -> None:
    answered = fleet.eyas("cam-7", "doctor")
    assert answered.returncode == 0, answered.stderr
    lines = answered.stdout.splitlines()
    assert re.fullmatch(r"hall-2/cam-7  executed: \d+ green, \d+ yellow, \d+ red, \d+ not checked", lines[0])
    assert re.match(rf"green +configuration +{re.escape(str(fleet.seven.config))}$", lines[1])
    assert any(re.match(r"green +golden +tiny-shapes 1\.2\.3 in ", line) for line in lines)
    assert not any(line.split()[1:2] == ["camera"] for line in lines), "the loop holds it"


def test_a_benchmark_comes_with_its_figures(fleet: Fleet) -> None:
    outcome = fleet.send("bench", "cam-7")["cam-7"]
    assert outcome.state == "executed", outcome.detail
    assert re.fullmatch(
        r"litert litert-int8, 1 thread, p50 [\d.]+ ms, p99 [\d.]+ ms, [\d.]+ frames/s", summary(outcome)
    )


def test_commands_are_answered_without_a_collector(fleet: Fleet) -> None:
    """More results than windows may wait: nobody acknowledges them, and whoever asks reads them from the broker."""
    device = ("hall-2", "cam-7")
    with CommandLink(fleet.access) as link:
        link.listen([device], ["cmd/result"])
        for _ in range(25):
            command = Command(id=str(uuid.uuid4()), name="resume", expires=time.time() + 60)
            link.publish(device, command, expires_s=60, events=False)
            _, answer = link.answers.get(timeout=15)
            assert isinstance(answer, Result) and (answer.id, answer.ok) == (command.id, True)


def test_a_device_that_does_not_answer_executes_nothing_later(fleet: Fleet) -> None:
    """It is connected, but stopped: the command waits at the broker and in its socket, and has expired."""
    told: list[str] = []
    fleet.nine.signal(signal.SIGSTOP)
    try:
        request = Request(command="pause", devices=("cam-9", "cam-8"), timeout_s=3)
        outcomes = {outcome.device: outcome for outcome in send(fleet.access, request, told.append)}
    finally:
        time.sleep(1)
        fleet.nine.signal(signal.SIGCONT)
    assert outcomes["cam-8"].state == "executed"
    assert outcomes["cam-9"].state == "no answer" and "not started any more" in outcomes["cam-9"].detail
    assert told and told[0].startswith("waiting for 1 of 2: yard/cam-9; ")
    assert fleet.send("resume", "cam-9")["cam-9"].state == "executed", "it answers again"
    assert not fleet.status("cam-9").paused
    log = fleet.nine.log.read_text()
    assert "'pause'" not in log or re.search(r"'pause' from '.*': refused: expired", log)
    assert not re.search(r"'pause' from '.*': executed", log)


def test_a_killed_device_is_sent_nothing(fleet: Fleet) -> None:
    """The last will carries when the connection began, so that somebody knows since when it may be gone."""
    began = fleet.status("cam-9").time
    fleet.nine.stop(kill=True)
    try:
        wait_until(lambda: fleet.is_in_state("cam-9", "lost"), 30, "the last will")
        outcome = fleet.send("pause", "cam-9")["cam-9"]
        assert outcome.state == "offline" and outcome.detail.startswith("the broker lost its connection, which began")
        assert time.strftime("%Y-%m-%d %H:", time.gmtime(began)) in outcome.detail
    finally:
        fleet.nine.start()
        wait_until(lambda: fleet.is_in_state("cam-9", "online"), 60, "cam-9")
    assert not fleet.status("cam-9").paused


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["cam-7", "set-thresholds", "--threshold", "1.5"], "threshold = 1.5; a number above 0 to 1 is needed"),
        (["cam-7", "set-thresholds"], "set-thresholds: no threshold; a number above 0 to 1 is needed"),
        (["cam-7", "pause", "--minutes", "1441"], "or minutes, above 0 to 1440, are allowed"),
        (["cam-7", "pause", "--minutes", "nan"], "or minutes, above 0 to 1440, are allowed"),
        (["cam-7", "resume", "--minutes", "5"], "unknown argument 'minutes'; it takes no arguments"),
        (["cam-7", "reboot"], "'reboot' is no command; there are: pause, resume, set-thresholds, snapshot"),
        (["pause", "cam-7"], "the command comes last: eyas send cam-7 pause"),
        (["pause"], "pause: name a device, or give --all or --site SITE"),
        (["cam-7", "pause", "--all"], "either --all or names of devices, not both: cam-7"),
        (["cam/7", "pause"], "device 'cam/7': 1 to 64 letters"),
        (["cam-7", "cam-77", "pause"], "device 'cam-77' is unknown; did you mean cam-7"),
        (["pause", "--site", "hall"], "no device of the site 'hall'; did you mean hall-2?"),
        (["cam-9", "pause", "--site", "hall-2"], "device 'cam-9' is unknown at the site 'hall-2'; did you mean"),
    ],
)
def test_mistakes_send_nothing(fleet: Fleet, words: list[str], message: str) -> None:
    log = fleet.seven.log.read_text().count("command ")
    answered = fleet.eyas(*words)
    assert (answered.returncode, answered.stdout) == (2, "")
    assert message in answered.stderr and "Traceback" not in answered.stderr
    assert fleet.seven.log.read_text().count("command ") == log


def test_a_broker_that_is_not_there(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "eyas_host", "send", "cam-7", "pause", "--broker", f"127.0.0.1:{free_port()}"]
    answered = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=60)
    assert answered.returncode == 1
    assert re.fullmatch(r"eyas: broker 127\.0\.0\.1:\d+: nothing listens on .*\n", answered.stderr)


def test_an_answer_survives_a_broker_that_is_killed(pristine_bundle: Path) -> None:
    """It had the command and the subscription; the device repeats its result, and the sender comes back for it."""
    with tempfile.TemporaryDirectory(prefix="eyas-send-") as name:
        (folder := Path(name)).chmod(0o755)
        processes = Processes(folder)
        kit = prepare(folder / "fleet", port=free_port())
        broker = start_broker(kit, processes)
        agent = AgentProcess(kit, pristine_bundle, folder, "cam-1").start()
        access = BrokerAccess(
            broker=f"localhost:{kit.port}", ca=kit.host.ca, certificate=kit.host.cert, key=kit.host.key
        )
        outcomes: list[Outcome] = []
        try:
            with CommandLink(access) as link:
                wait_until(lambda: link.statuses, 60, "the agent")
                wait_until(lambda: "mqtt connected" in agent.log.read_text(), 20, "the connection")
            asking = threading.Thread(target=lambda: outcomes.extend(send(access, Request(command="doctor"))))
            asking.start()
            time.sleep(2.0)
            assert not outcomes
            broker.kill()
            broker.wait(10)
            start_broker(kit, processes)
            asking.join(100)
        finally:
            agent.stop()
            processes.close()
    (outcome,) = outcomes
    assert outcome.state == "executed" and len(list(findings(outcome))) > 15
    assert outcome.seconds > 2
