"""The live view: conditions of devices, the table, and safe printing of names from the network."""

from __future__ import annotations

import io
import json
import re
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from eyas_device.errors import LinkError
from eyas_device.support.streams import PLAIN
from eyas_device.telemetry.messages import Header, Status, Update, encode, topic
from eyas_host.fleet.broker.client import BrokerAccess
from eyas_host.fleet.store.validate import ValidMessage, validate
from eyas_host.fleet.watch import live
from eyas_host.fleet.watch.fleet_state import MAX_DEVICES, FleetState
from eyas_host.fleet.watch.live import _update, printable, render, stream, watch
from eyas_host.fleet.watch.subscriber import BrokerMessage, Subscriber
from eyas_host.fleet.watch.table import age, shares
from eyas_host.support.errors import BrokerUnreachable
from tests.support.brokers import free_port
from tests.support.fleet_parts import Processes, Sender, event, wait_until, window

SPOOL = str(uuid.UUID(int=7))


def add(fleet: FleetState, message: Header, kind: str = "window", now: float = 100.0, **more: Any) -> None:
    verdict = validate(topic("s", message.device, kind), encode(message))
    assert isinstance(verdict, ValidMessage), verdict
    fleet.add(verdict, now, **more)


def online(device: str, sequence: int = 0, **more: Any) -> Status:
    return Status(device=device, spool=SPOOL, sequence=sequence, state="online", **more)


def shown(fleet: FleetState, now: float = 100.0, width: int = 200) -> str:
    out = io.StringIO()
    console = Console(file=out, width=width, force_terminal=False)
    console.print(render(fleet, now, "connected", width=console.width))
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


def troubled() -> FleetState:
    """Devices whose long names and reasons do not fit a narrow terminal in one line."""
    fleet = FleetState()
    reason = "the server closed the connection after 17 bytes of a frame that should have 51 200"
    add(
        fleet,
        online("line-3-camera-above-belt", 1, camera="lost", reason=reason, model="solar-cells 12.34.56"),
        "status",
    )
    refused = "litert-int8 failed the golden check: a probability differs by more than 0.05 from the recorded one"
    add(fleet, online("b", 1, model="m 1.0.0", refused_model="m 2.0.0", refused_reason=refused), "status")
    add(
        fleet, online("c", 1, model="m 1.0.0", ood=True, ood_reason="darker than 99 % of the training images"), "status"
    )
    add(fleet, online("d", 1, restarts={"loop": 3, "uplink": 1}, synchronised=False), "status")
    add(fleet, online("e", 1, refused_reason="/var/lib/eyas: no bundle is installed"), "status")
    add(fleet, window("f", SPOOL, 2, frames=65, unreadable=35, nonfinite=7, model="m 1.0.0", digest="0123456789ab"))
    add(
        fleet,
        online("g", 1, camera="degraded", reason="12 % of the frames are broken", faults=("disk full",)),
        "status",
    )
    add(fleet, Status(device="h", spool=SPOOL, sequence=1, state="updating", certificate_days=3.2), "status")
    return fleet


@pytest.mark.parametrize("width", [60, 80, 100, 200])
def test_every_problem_can_be_read_at_any_width(width: int) -> None:
    text = shown(troubled(), 103.0, width)
    assert max(map(len, text.splitlines())) <= width
    words = " ".join(text.split())
    for problem in (
        "camera lost: the server closed the connection after 17 bytes of a frame that should have 51 200",
        "m 2.0.0 was refused: litert-int8 failed the golden check: a probability differs by more than 0.05 from",
        "out of distribution: darker than 99 % of the training images",
        "started again after errors: loop 3, uplink 1; its clock is not synchronised",
        "no model runs: /var/lib/eyas: no bundle is installed",
        "35% of the frames cannot be read; 7 predictions were not finite",
        "camera degraded: 12 % of the frames are broken; disk full",
        "its state is 'updating', which this version does not know; its certificate expires in 3 days",
    ):
        assert problem in words, problem
    name = "line-3-camera-above-belt"
    assert any(line.startswith(("line-", name)) and "camera " in line for line in text.splitlines())
    assert width < 100 or name in text, "the device's name is cut last"
    for device, state in {
        "b": "refused",
        "c": "ood",
        "d": "online",
        "e": "no model",
        "f": "degraded",
        "h": "updating",
    }.items():
        assert any(line.split()[:1] == [device] and state in line for line in text.splitlines()), device


BASICS = ["device", "state", "labels", "conf.", "fps", "p50", "ms", "drop", "unread", "age"]


def busy(device: str, **more: Any) -> FleetState:
    fleet = FleetState()
    model: dict[str, Any] = {"model": "solar-cells 1.0.0", "digest": "0123456789ab"}
    add(fleet, online(device, 1, agent="0.1.0", **model), "status")
    facts: dict[str, Any] = {"seconds": 10.0, "uncertain": 3, "latency_ms": {"p50": 12.34, "p99": 45.6}, "dropped": 4}
    facts |= {"counts": {"crack": 72, "fine": 46, "dust": 2}, "confidence_sum": {"crack": 114.0}, "unreadable": 5}
    facts |= {"ood_quantile": 0.91, "temperature_c": 61.4, "throttled": ("hot",)}
    add(fleet, window(device, SPOOL, 6, frames=120, **(facts | model | more)))
    return fleet


def test_a_terminal_of_80_columns_shows_what_everybody_needs() -> None:
    fleet = busy("line-3-camera")
    narrow, wide = (shown(fleet, 103.0, width).splitlines() for width in (80, 140))
    assert narrow[1].split() == BASICS
    row = "line-3-camera online crack 60% +2 0.95 12.0 12.3 4 4% 3 s"
    assert narrow[2].split() == row.split()
    assert wide[1].split() == [*BASICS, "site", "model", "agent", "ood", "°C"]
    row = "line-3-camera online crack 60% fine 38% dust 2% 0.95 12.0 12.3 4 4% 3 s"
    row += " s solar-cells 1.0.0 0123456 0.1.0 91% 61!"
    assert wide[2].split() == row.split()
    everything = shown(fleet, 103.0, 200).splitlines()[1].split()
    assert everything[-4:] == ["uncertain", "p99", "ms", "frames"], "nobody's camera has a state"


@pytest.mark.parametrize("width", [*range(20, 200, 7), 80, 100, 140])
def test_nothing_is_wider_than_the_terminal(width: int) -> None:
    name, long = "camera-" + "x" * 40 + "-017", {f"a-label-of-a-very-long-name-{n}": 9 - n for n in range(8)}
    fleet = busy(name, counts=long, model="a-model-of-a-very-long-name-indeed 1.0.0")
    lines = shown(fleet, 103.0, width).splitlines()
    assert max(map(len, lines)) <= width
    row = next(line for line in lines if line.startswith("camera"))
    assert row.split()[0].endswith("-017"), "names of one fleet differ at their ends"
    if width >= 80:
        assert re.search(r"a-\S+ 20% (\+7|a-\S+ 18%)", row) and " 12.0  " in row and row.index(" 3 s") < 120


def test_devices_of_one_name_have_their_site() -> None:
    fleet = busy("cam")
    verdict = validate(topic("t", "cam", "window"), encode(window("cam", SPOOL, 1)))
    assert isinstance(verdict, ValidMessage)
    fleet.add(verdict, 100.0)
    assert sorted(line.split()[0] for line in shown(fleet, 103.0, 80).splitlines()[2:]) == ["s/cam", "t/cam"]


@pytest.mark.parametrize(
    ("counts", "width", "text"),
    [
        ({}, 20, ""),
        ({"a": 0}, 20, ""),
        ({"a": 5}, 20, "a 100%"),
        ({"a": 1, "b": 3}, 20, "b 75% a 25%"),
        ({"a": 1, "b": 3}, 10, "b 75% +1"),
        ({"a-long-name": 1}, 12, "a-l…ame 100%"),
        ({"x\x1b[2J": 1}, 20, "x\ufffd[2J 100%"),
        ({"猫猫猫猫": 1, "b": 1}, 12, "b 50% +1"),
    ],
)
def test_shares_of_labels_fit(counts: dict[str, int], width: int, text: str) -> None:
    assert shares(counts, width) == text


def test_ages_are_short() -> None:
    assert [age(s) for s in (0.4, 99.0, 100.0, 5000, 7000, 1e6)] == ["0 s", "99 s", "2 min", "83 min", "2 h", "12 d"]


def test_since_when_a_device_is_gone_is_said() -> None:
    fleet = FleetState()
    add(fleet, online("a", 1), "status")
    add(fleet, Status(device="b", spool=SPOOL, sequence=1, state="offline", time=1.8e9), "status")
    add(fleet, Status(device="c", state="lost", time=1.8e9), "status")
    words = " ".join(shown(fleet, 400.0, 80).split())
    assert "connected, but nothing came for 300 s" in words
    assert "since 2027-01-15 08:00 UTC, when it was shut down" in words
    assert "the broker lost its connection, which began at 2027-01-15 08:00 UTC" in words


def test_json_is_what_was_sent_in_every_encoding(monkeypatch: pytest.MonkeyPatch) -> None:
    """Labels that the encoding lacks, and an ellipsis, which a line of text may replace."""
    label = "猫\N{CAT}\N{HORIZONTAL ELLIPSIS}"
    payload = encode(event("cam", SPOOL, 7, label=label, top={label: 0.51}))

    class Broker:
        status, was_connected = "connected", True

        def __init__(self, access: BrokerAccess) -> None:
            self.left = [BrokerMessage(topic("s", "cam", "event"), payload, retained=False)]

        def __enter__(self) -> Broker:
            return self

        def __exit__(self, *error: object) -> None: ...

        def take(self, seconds: float) -> list[BrokerMessage]:
            return [self.left.pop()] if self.left else []

    monkeypatch.setattr(live, "Subscriber", Broker)
    for encoding in ("ascii", "cp1252", "utf-8"):
        raw = io.BytesIO()
        out = io.TextIOWrapper(raw, encoding=encoding, errors=PLAIN)
        stream(BrokerAccess(), out, seconds=0.01, log=io.StringIO())
        line = json.loads(raw.getvalue().decode(encoding))
        assert line["message"]["label"] == label, encoding


def test_models_of_one_name_and_version_are_told_apart() -> None:
    fleet = FleetState()
    for device, digest in (("a", "0123456789ab"), ("b", "fedcba987654")):
        add(fleet, window(device, SPOOL, 1, model="m 1.0.0", digest=digest))
    assert [device.model for device in fleet.devices(100.0)] == ["m 1.0.0 0123456", "m 1.0.0 fedcba9"]


def test_a_full_screen_keeps_the_worst() -> None:
    fleet = troubled()
    out = io.StringIO()
    console = Console(file=out, width=80, height=12, force_terminal=False)
    console.print(render(fleet, 103.0, "connected", width=80, height=12))
    lines = out.getvalue().splitlines()
    assert len(lines) <= 12
    heading = next(number for number, line in enumerate(lines) if line.startswith("device "))
    assert lines[heading + 1].split()[:3] == ["e", "no", "model"]
    assert lines[-1].endswith(" more")


def test_a_broker_that_is_never_reached_is_an_error() -> None:
    """An empty table would read as an empty fleet."""
    access = BrokerAccess(broker=f"127.0.0.1:{free_port()}")
    for terminal in (False, True):
        with pytest.raises(BrokerUnreachable, match="nothing listens"):
            watch(access, seconds=0.6, console=Console(file=io.StringIO(), width=80, force_terminal=terminal))
    with pytest.raises(LinkError, match="nothing listens"):
        stream(access, io.StringIO(), seconds=0.6, log=io.StringIO())


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
    for words in ("cam ", "1.2", "12.3", "45.6", "0.50", "25%", "61!", "3 s", "crack 0.51, fine 0.49"):
        assert words in text, words
    assert "999" not in text, "a late, older window is not shown"


def test_a_retained_message_is_no_sign_of_life() -> None:
    fleet = FleetState()
    add(fleet, online("cam"), "status", retained=True)
    assert fleet.devices(100.0)[0].last_seen == 0.0


def test_an_older_devices_credentials_are_not_shown() -> None:
    fleet = FleetState()
    reason = "camera gst:rtspsrc location=rtsp://admin:S3cret@cam/ user-pw=S3cret ! appsink: no frame came"
    add(fleet, online("a", camera="lost", reason=reason), kind="status")
    assert "no frame came" in shown(fleet) and "S3cret" not in shown(fleet)


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
        wait_until(lambda: "nobody is accepted without a login (Not authorized)" in str(subscriber.status))


@pytest.mark.parametrize("width", [80, 140])
def test_updates_are_seen_at_any_width(width: int) -> None:
    fleet, reason = FleetState(), "failed on probation: the previous model's label on 3 of 50 frames"
    states: dict[str, dict[str, Any]] = {
        "a-new": {"state": "probation", "model": "shapes 2.0.0"},
        "b-back": {"state": "rolled back", "model": "shapes 2.0.0", "reason": reason},
        "c-not-ours": {"state": "refused", "model": "shapes 3.0.0", "reason": "signed by nobody we know\x1b[2J"},
        "d-later": {"state": "failed", "model": "shapes 3.0.0", "reason": "no route to host"},
        "e-strange": {"state": "hovering", "clock": "the clock is of 1970, expiry is not judged"},
    }
    for device, update in states.items():
        back = {"refused_model": "shapes 2.0.0", "refused_reason": reason} if device == "b-back" else {}
        add(fleet, online(device, model="shapes 1.0.0", update=Update(**update), **back), "status")
    assert {d.device: d.condition(100.0) for d in fleet.devices(100.0)} == {
        "b-back": "rolled back",
        "c-not-ours": "refused",
        "a-new": "probation",
        "d-later": "online",
        "e-strange": "online",
    }
    text = shown(fleet, width=width)
    flat = " ".join(text.split())
    for expected in (
        "1 rolled back, 1 refused, 1 probation, 2 online",
        f"shapes 2.0.0 was rolled back: {reason}",
        "shapes 3.0.0 was refused: signed by nobody we know",
        "shapes 3.0.0 failed: no route to host",
        "updates: the clock is of 1970",
    ):
        assert expected in flat, text
    assert "\x1b" not in text and text.count(reason) <= 1
    assert max(map(len, text.splitlines())) <= width
