"""Commands to devices that misbehave, at a broker that lets everybody publish everything; and what is decided alone."""

from __future__ import annotations

import base64
import json
import re
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from paho.mqtt.client import CallbackAPIVersion, Client, MQTTProtocolVersion

from eyas_device.config import COMMANDS
from eyas_device.errors import LinkError
from eyas_device.telemetry.arguments import LONG_S, TAKES, CommandRefused
from eyas_device.telemetry.messages import Command, Event, Result, Status, decode, encode, topic
from eyas_device.telemetry.remote import MAX_AHEAD_S
from eyas_host.fleet.broker.client import BrokerAccess
from eyas_host.fleet.commands import images
from eyas_host.fleet.commands.send import MAX_TIMEOUT_S, Outcome, Request, choose, send
from eyas_host.fleet.commands.show import findings, summary
from eyas_host.fleet.status import since
from eyas_host.support.errors import BrokerUnreachable
from tests.support.brokers import free_port
from tests.support.fleet_parts import Processes, wait_until

SPOOL = str(uuid.UUID(int=7))


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
    processes.broker(
        number, "allow_anonymous true\nmax_packet_size 20000000\nmax_queued_messages 100000"
    )  # the kit has it, too
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


def test_ctrl_c_says_who_may_still_execute_it(port: int, rogue: Any, tmp_path: Path) -> None:
    device = rogue("a", lambda command: [])
    command = [sys.executable, "-m", "eyas_host", "send", "--all", "pause", "--timeout", "60"]
    with subprocess.Popen([*command, "--broker", f"127.0.0.1:{port}"], stderr=subprocess.PIPE, cwd=tmp_path) as sender:
        wait_until(lambda: device.received, 60, "the command")
        sender.send_signal(signal.SIGINT)
        _, errors = sender.communicate(timeout=30)
    assert sender.returncode == 130
    assert errors.decode().splitlines()[-1] == (
        "eyas: interrupted; waiting for 1 of 1: s/a; they may still execute pause"
    )


def test_a_large_fleet(port: int) -> None:
    """One client plays them all."""
    names = [f"cam-{number:04}" for number in range(1500)]
    client = Client(CallbackAPIVersion.VERSION2, protocol=MQTTProtocolVersion.MQTTv5)

    def on_message(client: Client, userdata: object, message: Any) -> None:
        name = message.topic.split("/")[2]
        if int(name[4:]) % 3:
            client.publish(
                topic("s", name, "cmd/result"), encode(result(name, decode(message.payload, Command))), qos=1
            )

    client.on_message = on_message
    client.connect("127.0.0.1", port)
    client.loop_start()
    client.subscribe("eyas/+/+/cmd", qos=1)
    for name in names:
        status = Status(device=name, spool=SPOOL, sequence=0, state="online", time=time.time())
        sent = client.publish(topic("s", name, "status"), encode(status), qos=1, retain=True)
    sent.wait_for_publish(30)
    told: list[str] = []
    try:
        request = Request(command="resume", timeout_s=10)
        outcomes = list(send(BrokerAccess(broker=f"127.0.0.1:{port}"), request, told.append))
    finally:
        client.disconnect()
        client.loop_stop()
    assert sorted(o.device for o in outcomes) == names
    assert [o.state for o in outcomes].count("executed") == 1000
    assert told[-1].startswith("waiting for 500 of 1500: s/cam-0000, s/cam-0003, ") and " and 492 more; " in told[-1]


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
