"""Commands to devices: real agents behind a mosquitto with the kit's certificates, and devices that misbehave."""

from __future__ import annotations

import base64
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
import msgspec
import pytest
from paho.mqtt.client import CallbackAPIVersion, Client, MQTTProtocolVersion

from eyas_device.config import COMMANDS
from eyas_device.errors import LinkError
from eyas_device.telemetry.arguments import LONG_S, TAKES, CommandRefused
from eyas_device.telemetry.messages import Command, Event, Result, Status, decode, encode, topic
from eyas_device.telemetry.remote import MAX_AHEAD_S
from eyas_host.fleet.broker.client import BrokerAccess
from eyas_host.fleet.broker.kit import Kit
from eyas_host.fleet.commands import images
from eyas_host.fleet.commands.link import CommandLink
from eyas_host.fleet.commands.send import MAX_TIMEOUT_S, Outcome, Request, choose, send
from eyas_host.fleet.commands.show import findings, summary
from eyas_host.fleet.status import since
from eyas_host.support.errors import BrokerUnreachable
from tests.support.agents import AgentProcess, start_kit
from tests.support.brokers import free_port
from tests.support.fleet_parts import Processes, wait_until

SPOOL = str(uuid.UUID(int=7))


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
    assert re.search(r"executed: (cross|disc|square) 0\.\d\d; ", rows["hall-2/cam-7"])
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
    states = [fleet.send("resume", "cam-7", timeout_s=5)["cam-7"].state for _ in range(22)]
    assert states == ["executed"] * 22


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
    assert re.fullmatch(
        r"eyas: broker 127\.0\.0\.1:\d+: connection refused; is the broker running\?\n", answered.stderr
    )


# Devices that misbehave, at a broker that lets everybody publish everything


class Rogue:
    """A device as a plain client, which answers commands as a test wants it to."""

    def __init__(self, port: int, name: str, answer: Any) -> None:
        self.received: list[Command] = []
        self.client = Client(CallbackAPIVersion.VERSION2, protocol=MQTTProtocolVersion.MQTTv5)
        ready = threading.Event()

        def on_message(client: Client, userdata: object, message: Any) -> None:
            command = decode(message.payload, Command)
            self.received.append(command)
            for kind, payload in answer(command):
                data = payload if isinstance(payload, bytes) else encode(payload)
                client.publish(topic("s", name, kind), data, qos=1)

        self.client.on_message = on_message
        self.client.on_subscribe = lambda *_: ready.set()
        self.client.connect("127.0.0.1", port)
        self.client.loop_start()
        self.client.subscribe(topic("s", name, "cmd"), qos=1)
        assert ready.wait(15)
        status = Status(device=name, spool=SPOOL, sequence=0, state="online", time=time.time())
        self.client.publish(topic("s", name, "status"), encode(status), qos=1, retain=True).wait_for_publish(15)

    def close(self) -> None:
        self.client.disconnect()
        self.client.loop_stop()


@pytest.fixture
def port(tmp_path: Path) -> Iterator[int]:
    processes = Processes(tmp_path)
    number = free_port()
    processes.broker(number, "allow_anonymous true\nmax_packet_size 20000000")
    yield number
    processes.close()


@pytest.fixture
def rogue(port: int) -> Iterator[Any]:
    made: list[Rogue] = []

    def make(name: str, answer: Any) -> Rogue:
        made.append(Rogue(port, name, answer))
        return made[-1]

    yield make
    for one in made:
        one.close()


EVIL = "\x1b[2J\x1b]0;owned\x07\x9b31m\u202e\r\n\x00"


def result(device: str, command: Command, sequence: int = 1, **more: Any) -> Result:
    fields: dict[str, Any] = {"ok": True, "detail": "done", "time": time.time(), **more}
    return Result(device=device, spool=SPOOL, sequence=sequence, id=command.id, name=command.name, **fields)


def test_hostile_answers_reach_no_terminal(port: int, rogue: Any, tmp_path: Path) -> None:
    """Control characters, megabytes, answers in another device's name, of another command, and twice."""
    evil = {"checks": [{"check": EVIL, "status": EVIL, "finding": EVIL * 20, "fix": EVIL}] * 90}

    def shouts(command: Command) -> Any:
        yield "cmd/result", result("a", command, detail=EVIL * 500, ok=False)

    def hurts(command: Command) -> Any:
        yield "cmd/result", b"x" * 5_000_000
        yield "cmd/result", encode(result("b", command, data={"x": "y" * 5_000_000}))
        yield "cmd/result", b'{"device":"b","data":' + b"[" * 5000 + b"]" * 5000 + b"}"
        yield "cmd/result", result("a", command)  # in another one's name
        yield "cmd/result", msgspec.structs.replace(result("b", command), id=str(uuid.uuid4()))
        for number in range(2000):
            yield "cmd/result", msgspec.structs.replace(result("b", command, number), id=str(uuid.uuid4()))
        yield "cmd/result", result("b", command, data=evil)
        yield "cmd/result", result("b", command, detail="again", ok=False)

    rogue("a", shouts), rogue("b", hurts)
    for options in ((), ("--json",)):
        command = [sys.executable, "-m", "eyas_host", "send", "--all", "doctor", "--timeout", "20", *options]
        answered = subprocess.run(
            [*command, "--broker", f"127.0.0.1:{port}"], capture_output=True, cwd=tmp_path, timeout=120
        )
        assert answered.returncode == 1, answered.stderr
        text = answered.stdout.decode()
        assert len(text) < 1_000_000 and all(line.isprintable() for line in text.splitlines())
        assert not set(text) & set(EVIL) - {"\n", *"[2J]0;owned31m"}
        if not options:
            states = [line.split()[:2] for line in text.splitlines() if line.startswith("s/")]
            assert sorted(states) == [["s/a", "refused:"], ["s/b", "executed:"]]
        else:
            states = {row["device"]: row["state"] for row in map(json.loads, text.splitlines())}
            assert states == {"a": "refused", "b": "executed"}


def test_a_first_answer_counts_and_megabytes_are_no_answer(port: int, rogue: Any) -> None:
    rogue(
        "a", lambda command: [("cmd/result", result("a", command)), ("cmd/result", result("a", command, 2, ok=False))]
    )
    rogue("b", lambda command: [("cmd/result", encode(result("b", command, data={"x": "y" * 3_000_000})))])
    access = BrokerAccess(broker=f"127.0.0.1:{port}")
    outcomes = {o.device: o for o in send(access, Request(command="resume", timeout_s=2))}
    assert (outcomes["a"].state, outcomes["b"].state) == ("executed", "no answer")


def test_each_device_gets_its_own_command_that_expires(port: int, rogue: Any) -> None:
    devices = [rogue(name, lambda command, name=name: [("cmd/result", result(name, command))]) for name in "abc"]
    before = time.time()
    outcomes = list(send(BrokerAccess(broker=f"127.0.0.1:{port}"), Request(command="pause", timeout_s=5)))
    assert [o.state for o in outcomes] == ["executed"] * 3
    commands = [device.received[0] for device in devices]
    assert len({command.id for command in commands}) == 3
    assert all(before + 5 <= command.expires <= time.time() + 5 for command in commands)
    assert all(re.fullmatch(r"\S+@\S+", command.issuer) for command in commands)


def test_a_clock_that_is_ahead_is_named(port: int, rogue: Any) -> None:
    rogue(
        "a", lambda command: [("cmd/result", result("a", command, ok=False, detail="expired", time=time.time() + 90))]
    )
    (outcome,) = send(BrokerAccess(broker=f"127.0.0.1:{port}"), Request(command="pause", timeout_s=5))
    assert re.fullmatch(r"expired: its clock is (89|90) s ahead of this machine's; .*--timeout", outcome.detail)


def test_a_device_that_nobody_hears_is_said_at_once(port: int, rogue: Any) -> None:
    """Its retained status says online, but no client receives its commands."""
    rogue("a", lambda command: []).close()
    started = time.monotonic()
    (outcome,) = send(BrokerAccess(broker=f"127.0.0.1:{port}"), Request(command="pause"))
    assert (outcome.state, outcome.detail) == ("no answer", "the broker did not pass it on: No matching subscribers")
    assert time.monotonic() - started < 10


@pytest.mark.parametrize(("image", "saved"), [(b"\xff\xd8\xff\xe0 an image", True), (b"#!/bin/sh", False), (b"", None)])
def test_only_an_image_is_saved(tmp_path: Path, image: bytes, saved: bool | None) -> None:
    event = Event(command="x" * 8, image=base64.b64encode(image).decode())
    outcome = Outcome(site="s", device="..", command="snapshot", state="executed", event=event)
    if saved is False:
        with pytest.raises(images.ImageNotSaved, match="no JPEG"):
            images.save(outcome, tmp_path / "new")
        assert not (tmp_path / "new").exists()
    else:
        path = images.save(outcome, tmp_path / "new")
        assert (path is not None) == bool(saved)
        assert path is None or (path.parent == tmp_path / "new" and path.read_bytes() == image)


def test_an_unknown_broker_and_an_empty_one(port: int) -> None:
    with pytest.raises(LinkError, match="knows no device"):
        list(send(BrokerAccess(broker=f"127.0.0.1:{port}"), Request(command="pause")))
    with pytest.raises(BrokerUnreachable, match="nothing listens"):
        list(send(BrokerAccess(broker=f"127.0.0.1:{free_port()}"), Request(command="pause")))
    with pytest.raises(CommandRefused, match="a number above 0 to 1"):
        list(send(BrokerAccess(broker="nowhere.invalid"), Request(command="set-thresholds")))


def test_a_device_that_moved_is_the_one_that_is_connected() -> None:
    online, old, older = Status(state="online", time=5.0), Status(state="offline", time=9.0), Status(time=2.0)
    statuses = {("s", "a"): old, ("t", "a"): online, ("s", "b"): old, ("u", "b"): older}
    assert choose(statuses, ["a"], None) == {("t", "a"): online}
    assert choose(statuses, ["a", "a"], "s") == {("s", "a"): old}
    assert choose(statuses, ["b"], None) == {("s", "b"): old}
    assert list(choose(statuses, [], "s")) == [("s", "a"), ("s", "b")]
    with pytest.raises(LinkError, match="choose one with --site: s, t"):
        choose(statuses | {("s", "a"): online}, ["a"], None)


def test_since_when() -> None:
    assert since(Status(state="offline", time=1.8e9)) == "since 2027-01-15 08:00 UTC, when it was shut down"
    assert since(Status(state="lost", time=0.0)) == "since a time that is not known"
    assert since(Status(state="lost", time=1.8e9)).endswith("which began at 2027-01-15 08:00 UTC")


def test_an_answer_of_another_version_is_not_guessed() -> None:
    for data in ({}, {"until": "soon"}, {"until": 1e300}):
        outcome = Outcome(site="s", device="a", command="pause", state="executed", data=data)
        assert summary(outcome) == "its answer is of another version; --json shows it"
    assert not list(findings(Outcome(site="s", device="a", command="doctor", state="executed", data={"checks": 3})))


def test_every_command_has_arguments_and_a_limit_within_the_devices() -> None:
    assert set(TAKES) == set(COMMANDS)
    assert max(*LONG_S.values(), MAX_TIMEOUT_S) < MAX_AHEAD_S
