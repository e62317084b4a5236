"""The live view: conditions of devices, the table, and safe printing of names from the network."""

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
from eyas_host.fleet.watch.fleet_state import MAX_DEVICES, FleetState
from eyas_host.fleet.watch.live import _update, printable, render, stream, watch
from eyas_host.fleet.watch.subscriber import BrokerMessage, Subscriber
from tests.support.brokers import free_port
from tests.support.fleet_parts import Processes, Sender, event, wait_until, window

SPOOL = str(uuid.UUID(int=7))


def add(fleet: FleetState, message: Header, kind: str = "window", now: float = 100.0, **more: Any) -> None:
    verdict = validate(topic("s", message.device, kind), encode(message))
    assert isinstance(verdict, ValidMessage), verdict
    fleet.add(verdict, now, **more)


def online(device: str, sequence: int = 0, **more: Any) -> Status:
    return Status(device=device, spool=SPOOL, sequence=sequence, state="online", **more)


def shown(fleet: FleetState, now: float = 100.0) -> str:
    out = io.StringIO()
    Console(file=out, width=200, force_terminal=False).print(render(fleet, now, "connected"))
    return out.getvalue()


def test_an_expelled_device_leaves_the_table() -> None:
    """The broker removes its retained status by an empty message, which is no invalid one."""

    class Broker:
        def take(self, timeout: float) -> list[BrokerMessage]:
            return [BrokerMessage("eyas/s/b/status", b"", False), BrokerMessage("eyas/s/a/window", b"", False)]

    fleet = FleetState()
    for device in ("a", "b"):
        add(fleet, online(device), "status")
    _update(fleet, Broker())  # type: ignore[arg-type]
    assert [device.device for device in fleet.devices(100.0)] == ["a"]
    assert fleet.invalid == 1, "an empty window is one"


def test_the_worst_condition_comes_first() -> None:
    fleet = FleetState()
    for device in ("a-fine", "b-lost", "c-dark", "d-strange", "e-gone", "f-silent"):
        add(fleet, online(device, ood=device == "d-strange"), "status", 5.0 if device == "f-silent" else 100.0)
    add(fleet, Status(device="b-lost", state="lost"), "status")
    add(fleet, window("c-dark", SPOOL, 1, camera="lost"))
    add(fleet, Status(device="e-gone", spool=SPOOL, sequence=9, state="offline"), "status")
    found = [(d.device, d.condition(100.0)) for d in fleet.devices(100.0)]
    assert found == [
        ("b-lost", "lost"),
        ("f-silent", "silent"),
        ("c-dark", "camera"),
        ("e-gone", "offline"),
        ("d-strange", "ood"),
        ("a-fine", "online"),
    ]
    assert fleet.summary(100.0)["lost"] == 1


def test_a_row_shows_the_last_window() -> None:
    fleet = FleetState()
    tenths = (0,) * 9 + (6,)
    facts: dict[str, Any] = {
        "seconds": 10.0,
        "uncertain": 3,
        "dropped": 4,
        "temperature_c": 61.4,
        "throttled": ("hot",),
    }
    facts |= {"latency_ms": {"p50": 12.34, "p99": 45.6}, "confidence": {"a": tenths, "b": (6,) + (0,) * 9}}
    add(fleet, window("cam", SPOOL, 6, frames=12, **facts))
    add(fleet, window("cam", SPOOL, 5, frames=999))
    add(fleet, event("cam", SPOOL, 7, top={"crack": 0.51, "fine": 0.49}), "event")
    text = shown(fleet, 103.0)
    for words in ("s/cam", "1.2", "12.3", "45.6", "0.50", "25%", "61!", "3 s", "crack 0.51, fine 0.49"):
        assert words in text, words
    assert "999" not in text, "a late, older window is not shown"


def test_a_retained_message_is_no_sign_of_life() -> None:
    fleet = FleetState()
    add(fleet, online("cam"), "status", retained=True)
    assert fleet.devices(100.0)[0].last_seen == 0.0


def test_names_and_labels_cannot_control_the_terminal() -> None:
    fleet = FleetState()
    evil = "[red]x[/red]\x1b[2J\x07\n\u202e"
    add(fleet, window("cam", SPOOL, 1, model=evil, camera=evil))
    add(fleet, event("cam", SPOOL, 2, top={evil: 0.5}), "event")
    text = shown(fleet)
    assert "\x1b" not in text
    assert "\x07" not in text
    assert "\u202e" not in text
    assert "[red]x" in text, "markup is shown as it is"
    assert printable("x" * 100) == "x" * 39 + "…"


def test_invented_devices_do_not_fill_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    assert MAX_DEVICES >= 10_000
    monkeypatch.setattr("eyas_host.fleet.watch.fleet_state.MAX_DEVICES", 5)
    fleet = FleetState()
    for number in range(20):
        add(fleet, window(f"cam-{number}", SPOOL, 1))
    assert len(fleet.devices(100.0)) == 5
    assert fleet.messages == 20


@pytest.fixture
def processes(tmp_path: Path) -> Iterator[Processes]:
    made = Processes(tmp_path)
    yield made
    made.close()


def test_json_lines_from_a_broker_that_starts_later(processes: Processes) -> None:
    port, out = free_port(), io.StringIO()
    access = BrokerAccess(broker=f"127.0.0.1:{port}")
    thread = threading.Thread(target=stream, args=(access, out), kwargs={"seconds": 12.0, "log": io.StringIO()})
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


def test_a_refusal_is_shown(processes: Processes) -> None:
    port = free_port()
    processes.broker(port, "allow_anonymous false")
    with Subscriber(BrokerAccess(broker=f"127.0.0.1:{port}")) as subscriber:
        wait_until(lambda: str(subscriber.status) == "refused by the broker: Not authorized")
