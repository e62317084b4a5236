"""The live view: what it knows, what it shows, and that nobody's name can spoil it."""

from __future__ import annotations

import io
import json
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from eyas_device.telemetry.messages import Header, Status, encode, topic
from eyas_host.fleet.broker.client import BrokerAccess
from eyas_host.fleet.store.validate import ValidMessage, validate
from eyas_host.fleet.watch.fleet_state import MAX_DEVICES, FleetState, printable
from eyas_host.fleet.watch.live import Subscriber, render, stream, watch
from tests.support.brokers import free_port
from tests.support.fleet_parts import Processes, Sender, event, wait_until, window

SPOOL = str(uuid.UUID(int=7))


def take(seen: FleetState, message: Header, kind: str = "window", now: float = 100.0, **more: Any) -> None:
    verdict = validate(topic("s", message.device, kind), encode(message))
    assert isinstance(verdict, ValidMessage), verdict
    seen.take(verdict, now, **more)


def online(device: str, sequence: int = 0, **more: Any) -> Status:
    return Status(device=device, spool=SPOOL, sequence=sequence, state="online", **more)


def shown(seen: FleetState, now: float = 100.0) -> str:
    out = io.StringIO()
    Console(file=out, width=200, force_terminal=False).print(render(seen, now, "connected"))
    return out.getvalue()


def test_trouble_comes_first() -> None:
    seen = FleetState()
    for device in ("a-fine", "b-lost", "c-dark", "d-strange", "e-gone", "f-silent"):
        take(seen, online(device, ood=device == "d-strange"), "status", 5.0 if device == "f-silent" else 100.0)
    take(seen, Status(device="b-lost", state="lost"), "status")
    take(seen, window("c-dark", SPOOL, 1, camera="lost"))
    take(seen, Status(device="e-gone", spool=SPOOL, sequence=9, state="offline"), "status")
    found = [(line.device, line.condition(100.0)) for line in seen.lines(100.0)]
    assert found == [
        ("b-lost", "lost"),
        ("f-silent", "silent"),
        ("c-dark", "camera"),
        ("e-gone", "offline"),
        ("d-strange", "ood"),
        ("a-fine", "online"),
    ]
    assert seen.summary(100.0)["lost"] == 1


def test_what_a_line_says() -> None:
    seen = FleetState()
    tenths = (0,) * 9 + (6,)
    facts: dict[str, Any] = {
        "seconds": 10.0,
        "uncertain": 3,
        "dropped": 4,
        "temperature_c": 61.4,
        "throttled": ("hot",),
    }
    facts |= {"latency_ms": {"p50": 12.34, "p99": 45.6}, "confidence": {"a": tenths, "b": (6,) + (0,) * 9}}
    take(seen, window("cam", SPOOL, 6, frames=12, **facts))
    take(seen, window("cam", SPOOL, 5, frames=999))
    take(seen, event("cam", SPOOL, 7, top={"crack": 0.51, "fine": 0.49}), "event")
    text = shown(seen, 103.0)
    for words in ("s/cam", "1.2", "12.3", "45.6", "0.50", "25%", "61!", "3 s", "crack 0.51, fine 0.49"):
        assert words in text, words
    assert "999" not in text, "an old window that came late is not shown"


def test_what_the_broker_kept_is_no_sign_of_life() -> None:
    seen = FleetState()
    take(seen, online("cam"), "status", kept=True)
    assert seen.lines(100.0)[0].heard == 0.0


def test_names_and_labels_cannot_write_on_the_screen() -> None:
    seen = FleetState()
    evil = "[red]x[/red]\x1b[2J\x07\n\u202e"
    take(seen, window("cam", SPOOL, 1, model=evil, camera=evil))
    take(seen, event("cam", SPOOL, 2, top={evil: 0.5}), "event")
    text = shown(seen)
    assert "\x1b" not in text
    assert "\x07" not in text
    assert "\u202e" not in text
    assert "[red]x" in text, "markup is shown as it is"
    assert printable("x" * 100) == "x" * 39 + "…"


def test_invented_devices_do_not_fill_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    assert MAX_DEVICES >= 10_000
    monkeypatch.setattr("eyas_host.fleet.watch.fleet_state.MAX_DEVICES", 5)
    seen = FleetState()
    for number in range(20):
        take(seen, window(f"cam-{number}", SPOOL, 1))
    assert len(seen.lines(100.0)) == 5
    assert seen.messages == 20


@pytest.fixture
def processes(tmp_path: Path) -> Iterator[Processes]:
    made = Processes(tmp_path)
    yield made
    made.close()


def test_json_lines_from_a_broker_that_comes_later(processes: Processes) -> None:
    port, out = free_port(), io.StringIO()
    access = BrokerAccess(broker=f"127.0.0.1:{port}")
    thread = threading.Thread(target=stream, args=(access, out), kwargs={"seconds": 12.0, "people": io.StringIO()})
    thread.start()
    time.sleep(0.5)
    processes.broker(port)
    sender = Sender(port)
    try:
        number = iter(range(10_000))

        def arrived() -> bool:
            sender.send(b"no message")
            sender.send(encode(window("cam-1", sender.spool, next(number))).replace(b",", b",\n"))
            time.sleep(0.1)
            return bool(out.getvalue())

        wait_until(arrived, 30, "a message")
    finally:
        sender.close()
        thread.join(30)
    first = json.loads(out.getvalue().splitlines()[0])
    assert (first["kind"], first["site"], first["message"]["device"]) == ("window", "s", "cam-1")
    assert all(json.loads(line)["kind"] == "window" for line in out.getvalue().splitlines())


def test_a_table_where_there_is_no_terminal(processes: Processes) -> None:
    port = free_port()
    processes.broker(port)
    sender, out = Sender(port), io.StringIO()
    sender.client.publish("eyas/s/cam-1/status", encode(online("cam-1", model="shapes 1.0.0")), qos=1, retain=True)
    watch(BrokerAccess(broker=f"127.0.0.1:{port}"), seconds=2.0, console=Console(file=out, width=200))
    sender.close()
    assert "1 online" in out.getvalue()
    assert "shapes 1.0.0" in out.getvalue()


def test_a_refusal_is_said(processes: Processes) -> None:
    port = free_port()
    processes.broker(port, "allow_anonymous false")
    with Subscriber(BrokerAccess(broker=f"127.0.0.1:{port}")) as tap:
        wait_until(lambda: "refused by the broker: Not authorized" in tap.state)
