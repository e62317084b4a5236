"""Commands: refused for each reason, executed once, always answered."""

from __future__ import annotations

import re
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from eyas_device.config import COMMANDS
from eyas_device.errors import BundleError
from eyas_device.telemetry.messages import Command, Result, decode, encode
from eyas_device.telemetry.remote import MAX_AHEAD_S, CommandExecutor, Handler
from eyas_device.telemetry.spool.spool import Spool

NOW = 1.8e9


class Device:
    """A device with a command executor, and the results that it appended."""

    def __init__(self, folder: Path, handlers: dict[str, Handler], allowed: tuple[str, ...] = COMMANDS) -> None:
        self.now = NOW
        self.spool = Spool(folder, device="d")
        self.commands = CommandExecutor(allowed=allowed, spool=self.spool, clock=lambda: self.now)
        self.commands.register(handlers)
        self._seen = -1

    def send(self, **fields: Any) -> str:
        command = Command(**{"id": str(uuid.uuid4()), "name": "pause", "expires": NOW + 60, **fields})
        self.commands.take(encode(command))
        return command.id

    def next_result(self) -> Result:
        deadline = time.monotonic() + 20
        while not (found := self.spool.pending("cmd/result", after=self._seen, limit=1)):
            assert time.monotonic() < deadline, "no result"
            time.sleep(0.005)
        self._seen = found[0].sequence
        return decode(found[0].payload, Result)

    def close(self) -> None:
        self.commands.close()
        self.spool.close()


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Callable[..., Device]]:
    created: list[Device] = []

    def make(*args: Any, **options: Any) -> Device:
        created.append(Device(tmp_path, *args, **options))
        return created[-1]

    yield make
    for device in created:
        device.close()


def test_a_command_is_executed_with_its_arguments(make: Callable[..., Device]) -> None:
    device = make({"pause": lambda command: {"got": dict(command.arguments)}})
    command_id = device.send(arguments={"text": "a", "number": 1.5, "truth": True})
    result = device.next_result()
    assert (result.id, result.name, result.ok, result.detail) == (command_id, "pause", True, "done")
    assert result.data == {"got": {"text": "a", "number": 1.5, "truth": True}}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"name": "reboot"}, "is no command"),
        ({"name": "bench"}, "is not allowed here; telemetry.commands allows: pause"),
        ({"name": "resume"}, "is not known"),
        ({"expires": NOW - 1}, "expired"),
        ({"expires": 0.0}, "expired"),
        ({"expires": NOW + MAX_AHEAD_S + 60}, "24 hours ahead"),
    ],
)
def test_refused(make: Callable[..., Device], fields: dict[str, Any], message: str) -> None:
    executed: list[Command] = []
    device = make({"pause": lambda a: executed.append(a) or {}, "bench": lambda a: {}}, allowed=("pause", "resume"))
    command_id = device.send(**fields)
    result = device.next_result()
    assert (result.id, result.ok) == (command_id, False)
    assert message in result.detail
    assert not executed


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"arguments": {"seconds": None}}, r"cannot read it: .*null"),
        ({"arguments": {"seconds": [1, 2]}}, r"cannot read it: .*array"),
        ({"arguments": {"region": {"x": 1}}}, r"cannot read it: .*object"),
        ({"arguments": ["seconds", 5]}, r"cannot read it: .*array"),
        ({"expires": "tomorrow"}, r"cannot read it: .*expires"),
        ({"expires": None}, r"cannot read it: .*expires"),
        ({"issuer": {"name": "me"}}, r"cannot read it: .*issuer"),
        ({"name": "reboot", "arguments": {"now": None}}, "'reboot' is no command; there are: pause"),
        ({"name": None}, r"cannot read it: .*name"),
        ({"schema": 2}, "schema 2; this agent reads schema 1"),
        ({"schema": 99, "name": "reboot", "arguments": [None]}, "schema 99"),
        ({"schema": "1"}, "schema '1'"),
        ({"schema": None}, "schema None"),
        ({"schema": True}, "schema True"),
    ],
)
def test_a_command_of_tomorrow_is_answered_and_not_executed(
    make: Callable[..., Device], fields: dict[str, Any], message: str
) -> None:
    executed: list[Command] = []
    device = make({"pause": lambda a: executed.append(a) or {}})
    command_id = str(uuid.uuid4())
    head = {"schema": 1, "id": command_id, "name": "pause", "expires": NOW + 60, "of_tomorrow": [{}]}
    device.commands.take(msgspec.json.encode(head | fields))
    result = device.next_result()
    assert (result.id, result.ok, executed) == (command_id, False, [])
    assert re.search(message, result.detail)
    assert device.commands.malformed == 0
    device.send()
    assert device.next_result().ok, "a command of today is executed after it"


def test_a_wrong_clock_refuses(make: Callable[..., Device]) -> None:
    device = make({"pause": lambda a: {}})
    device.now = 100.0
    device.send()
    assert "clock is wrong" in device.next_result().detail


def test_an_id_is_executed_once_also_after_a_restart(make: Callable[..., Device]) -> None:
    executed: list[Command] = []
    handlers = {"pause": lambda a: executed.append(a) or {"number": len(executed)}}
    device = make(handlers)
    command_id = device.send()
    first = device.next_result()
    device.send(id=command_id.upper())
    assert device.next_result().data == first.data == {"number": 1}
    device.close()
    again = make(handlers)
    again._seen = first.sequence + 1
    again.send(id=command_id)
    assert (again.next_result().data, len(executed)) == ({"number": 1}, 1)


def test_a_command_that_ends_the_process_is_not_executed_again(make: Callable[..., Device]) -> None:
    begun, never = threading.Event(), threading.Event()
    device = make({"pause": lambda a: begun.set() or (never.wait(20) and {})})
    command_id = device.send()
    assert begun.wait(20)
    device.send(id=command_id)  # still running
    assert not device.spool.pending("cmd/result")
    remembered = device.spool.command_result(command_id)
    assert remembered is not None
    assert not decode(remembered, Result).ok
    assert "the agent ended" in decode(remembered, Result).detail
    never.set()
    result = device.next_result()
    assert result.ok
    assert not device.spool.pending("cmd/result", after=result.sequence), "a second result"


def _fail(error: Exception) -> Handler:
    def handler(command: Command) -> dict[str, Any]:
        raise error

    return handler


@pytest.mark.parametrize(
    ("handler", "message"),
    [
        (_fail(BundleError("no bundle\x1b[31m")), "no bundle?[31m"),
        (_fail(ValueError("threshold 7; 0 to 1 is allowed")), "threshold 7"),
        (_fail(ZeroDivisionError("x")), "failed: ZeroDivisionError: x"),
        (lambda a: {"x": object()}, "failed: TypeError"),
        (_fail(ValueError("x" * 10_000)), "xxx"),
    ],
)
def test_handlers_that_fail(make: Callable[..., Device], handler: Handler, message: str) -> None:
    device = make({"pause": handler})
    device.send()
    result = device.next_result()
    assert not result.ok
    assert message in result.detail and len(result.detail) <= 500
    device.send()
    assert not device.next_result().ok, "the thread ended"


def test_too_much_data_is_left_out(make: Callable[..., Device]) -> None:
    device = make({"doctor": lambda a: {"x": "y" * 100_000}})
    device.send(name="doctor")
    result = device.next_result()
    assert result.ok and "left_out" in result.data


def test_commands_wait_and_too_many_are_refused(make: Callable[..., Device]) -> None:
    go = threading.Event()
    device = make({"snapshot": lambda a: go.wait(20) and {}})
    for _ in range(12):
        device.send(name="snapshot")
    refused = device.next_result()
    assert "other commands wait" in refused.detail
    go.set()
    results = [device.next_result() for _ in range(8)]
    assert sum(result.ok for result in results) >= 5


@pytest.mark.parametrize(("running", "second"), [("bench", "doctor"), ("doctor", "doctor"), ("doctor", "bench")])
def test_quick_commands_do_not_wait_for_a_long_one(make: Callable[..., Device], running: str, second: str) -> None:
    begun, go = threading.Event(), threading.Event()
    executed: list[str] = []

    def long(command: Command) -> dict[str, Any]:
        begun.set()
        go.wait(20)
        return {}

    quick = {name: lambda a, name=name: executed.append(name) or {} for name in ("pause", "resume", "snapshot")}
    device = make({"bench": long, "doctor": long, **quick})
    first = device.send(name=running)
    assert begun.wait(20)
    for name in quick:
        device.send(name=name)
    results = [device.next_result() for _ in quick]
    assert executed == list(quick) and all(result.ok for result in results), "the long one still runs"
    refused = device.send(name=second)
    result = device.next_result()
    assert (result.id, result.ok) == (refused, False)
    assert f"{running} runs; send {second} again" in result.detail
    go.set()
    assert device.next_result().id == first
    begun.clear()
    device.send(name=second)
    assert begun.wait(20), "the next long one is taken"


def test_each_command_leaves_a_line(make: Callable[..., Device], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "eyas_device.telemetry.remote")
    device = make({"pause": lambda a: {}}, allowed=("pause",))
    issuer = "ana\n<3>forged: bench from http://ana:S3cret@desk/"
    done = device.send(issuer=issuer)
    device.next_result()
    device.send(id=done, issuer=issuer)
    device.next_result()
    refused = device.send(name="bench", issuer="bob")
    device.next_result()
    expired = device.send(expires=NOW - 1)
    device.next_result()
    device.commands.take(b"{")
    lines = [record.getMessage() for record in caplog.records]
    assert [line.rpartition(": ")[2] for line in lines[:1]] == ["executed"]
    assert lines[0] == f"command {done} 'pause' from {issuer.replace('ana:S3cret', '***')!r}: executed"
    assert lines[1].startswith(f"command {done} ") and "repeated" in lines[1]
    assert lines[2].startswith(f"command {refused} 'bench' from 'bob': refused: 'bench' is not allowed")
    assert lines[3] == f"command {expired} 'pause' from '': refused: expired"
    assert len(lines) == 5 and "without a readable id" in lines[4]
    assert all(line.isprintable() for line in lines)


def test_a_result_shows_no_credentials(make: Callable[..., Device]) -> None:
    address = "rtsp://admin:S3cret@cam/live"
    device = make({"doctor": lambda a: {"checks": [{"finding": address}]}, "pause": _fail(ValueError(address))})
    device.send(name="doctor")
    assert device.next_result().data == {"checks": [{"finding": "rtsp://***@cam/live"}]}
    device.send()
    assert device.next_result().detail == "rtsp://***@cam/live"


@pytest.mark.parametrize("payload", [b"", b"{", b"[]", b"x" * 100_000, b'{"id": "x"}', b'{"id": 5}', b"\xff"])
def test_a_command_without_an_id_is_counted_as_malformed(make: Callable[..., Device], payload: bytes) -> None:
    device = make({})
    device.commands.take(payload)
    assert device.commands.malformed == 1
    assert not device.spool.pending("cmd/result")
