"""Commands: refused for every reason, obeyed once, answered always."""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from eyas_device.config import COMMANDS
from eyas_device.errors import BundleError
from eyas_device.telemetry.messages import Command, Result, decode, encode
from eyas_device.telemetry.remote import MAX_AHEAD_S, Arguments, CommandExecutor, Handler
from eyas_device.telemetry.spool.spool import Spool

NOW = 1.8e9


class Device:
    """A device that obeys, and what it answered."""

    def __init__(self, folder: Path, handlers: dict[str, Handler], allowed: tuple[str, ...] = COMMANDS) -> None:
        self.now = NOW
        self.spool = Spool(folder, device="d")
        self.commands = CommandExecutor(allowed=allowed, spool=self.spool, clock=lambda: self.now)
        self.commands.register(handlers)
        self._seen = -1

    def say(self, **fields: Any) -> str:
        command = Command(**{"id": str(uuid.uuid4()), "name": "pause", "expires": NOW + 60, **fields})
        self.commands.take(encode(command))
        return command.id

    def answer(self) -> Result:
        deadline = time.monotonic() + 20
        while not (found := self.spool.pending("cmd/result", after=self._seen, limit=1)):
            assert time.monotonic() < deadline, "no answer"
            time.sleep(0.005)
        self._seen = found[0].sequence
        return decode(found[0].payload, Result)

    def close(self) -> None:
        self.commands.close()
        self.spool.close()


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Callable[..., Device]]:
    made: list[Device] = []

    def make(*given: Any, **options: Any) -> Device:
        made.append(Device(tmp_path, *given, **options))
        return made[-1]

    yield make
    for device in made:
        device.close()


def test_obeyed_with_arguments_and_answered(make: Callable[..., Device]) -> None:
    device = make({"pause": lambda arguments: {"got": dict(arguments)}})
    number = device.say(arguments={"text": "a", "number": 1.5, "truth": True})
    result = device.answer()
    assert (result.id, result.name, result.ok, result.detail) == (number, "pause", True, "done")
    assert result.data == {"got": {"text": "a", "number": 1.5, "truth": True}}


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"name": "reboot"}, "is no command"),
        ({"name": "bench"}, "is not allowed here; telemetry.commands allows: pause"),
        ({"name": "resume"}, "is not known"),
        ({"expires": NOW - 1}, "expired"),
        ({"expires": 0.0}, "expired"),
        ({"expires": NOW + MAX_AHEAD_S + 60}, "24 hours ahead"),
    ],
)
def test_refused(make: Callable[..., Device], fields: dict[str, Any], words: str) -> None:
    obeyed: list[Arguments] = []
    device = make({"pause": lambda a: obeyed.append(a) or {}, "bench": lambda a: {}}, allowed=("pause", "resume"))
    number = device.say(**fields)
    result = device.answer()
    assert (result.id, result.ok) == (number, False)
    assert words in result.detail
    assert not obeyed


def test_a_wrong_clock_refuses(make: Callable[..., Device]) -> None:
    device = make({"pause": lambda a: {}})
    device.now = 100.0
    device.say()
    assert "clock is wrong" in device.answer().detail


def test_an_id_is_obeyed_once_also_after_a_restart(make: Callable[..., Device]) -> None:
    obeyed: list[Arguments] = []
    handlers = {"pause": lambda a: obeyed.append(a) or {"number": len(obeyed)}}
    device = make(handlers)
    number = device.say()
    first = device.answer()
    device.say(id=number.upper())
    assert device.answer().data == first.data == {"number": 1}
    device.close()
    again = make(handlers)
    again._seen = first.sequence + 1
    again.say(id=number)
    assert (again.answer().data, len(obeyed)) == ({"number": 1}, 1)


def test_a_command_that_ends_the_process_is_not_obeyed_again(make: Callable[..., Device]) -> None:
    begun, never = threading.Event(), threading.Event()
    device = make({"pause": lambda a: begun.set() or (never.wait(20) and {})})
    number = device.say()
    assert begun.wait(20)
    device.say(id=number)  # still running: no second answer
    assert device.spool.pending("cmd/result")[:0] == []
    remembered = device.spool.command_result(number)
    assert remembered is not None
    assert not decode(remembered, Result).ok
    assert "the agent ended" in decode(remembered, Result).detail
    never.set()
    assert device.answer().ok


def _fail(error: Exception) -> Handler:
    def handler(arguments: Arguments) -> dict[str, Any]:
        raise error

    return handler


@pytest.mark.parametrize(
    ("handler", "words"),
    [
        (_fail(BundleError("no bundle\x1b[31m")), "no bundle?[31m"),
        (_fail(ValueError("threshold 7; 0 to 1 is allowed")), "threshold 7"),
        (_fail(ZeroDivisionError("x")), "failed: ZeroDivisionError: x"),
        (lambda a: {"x": object()}, "failed: TypeError"),
        (_fail(ValueError("x" * 10_000)), "xxx"),
    ],
)
def test_handlers_that_fail(make: Callable[..., Device], handler: Handler, words: str) -> None:
    device = make({"pause": handler})
    device.say()
    result = device.answer()
    assert not result.ok
    assert words in result.detail and len(result.detail) <= 500
    device.say()
    assert not device.answer().ok, "the thread lives on"


def test_too_much_data_is_left_out(make: Callable[..., Device]) -> None:
    device = make({"doctor": lambda a: {"x": "y" * 100_000}})
    device.say(name="doctor")
    result = device.answer()
    assert result.ok and "left_out" in result.data


def test_others_wait_and_too_many_are_refused(make: Callable[..., Device]) -> None:
    go = threading.Event()
    device = make({"bench": lambda a: go.wait(20) and {}})
    for _ in range(12):
        device.say(name="bench")
    refused = device.answer()
    assert "other commands wait" in refused.detail
    go.set()
    answers = [device.answer() for _ in range(8)]
    assert sum(answer.ok for answer in answers) >= 5


@pytest.mark.parametrize("payload", [b"", b"{", b"[]", b"x" * 100_000, b'{"id": "x"}', b'{"id": 5}', b"\xff"])
def test_what_has_no_id_cannot_be_answered(make: Callable[..., Device], payload: bytes) -> None:
    device = make({})
    device.commands.take(payload)
    assert device.commands.malformed == 1
    assert not device.spool.pending("cmd/result")
