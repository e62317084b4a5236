"""Telemetry through a real broker."""

from __future__ import annotations

import queue
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from paho.mqtt.client import CallbackAPIVersion, Client, MQTTProtocolVersion

from eyas_device import __version__
from eyas_device.camera import open_camera
from eyas_device.errors import LinkError
from eyas_device.link import Link
from eyas_device.pipeline import Loop
from eyas_device.predict import Classifier
from eyas_device.telemetry import Status, Window, decode

from .conftest import Broker


class Inbox:
    """Everything that arrives below `eyas/`, received by a plain paho client."""

    def __init__(self, port: int) -> None:
        self._messages: queue.Queue[tuple[str, bool, bytes]] = queue.Queue()
        subscribed = queue.Queue[object]()
        self.client = Client(CallbackAPIVersion.VERSION2, protocol=MQTTProtocolVersion.MQTTv5)
        self.client.on_message = lambda c, u, m: self._messages.put((m.topic, m.retain, m.payload))
        self.client.on_connect = lambda c, *_: c.subscribe("eyas/#", qos=1)
        self.client.on_subscribe = lambda *_: subscribed.put(None)
        self.client.connect("127.0.0.1", port)
        self.client.loop_start()
        subscribed.get(timeout=10)

    def next(self, kind: str, timeout: float = 15) -> tuple[str, bool, Any]:
        """Topic, retained, message of the next one of a kind; others are passed over."""
        deadline = time.monotonic() + timeout
        while True:
            topic, retained, payload = self._messages.get(timeout=max(0.01, deadline - time.monotonic()))
            if topic.endswith(f"/{kind}"):
                return topic, retained, decode(payload, Status if kind == "status" else Window)


@contextmanager
def inbox(port: int) -> Iterator[Inbox]:
    box = Inbox(port)
    try:
        yield box
    finally:
        box.client.disconnect()
        box.client.loop_stop()


@contextmanager
def linked(bundle: Path, port: int, window_s: float = 30.0) -> Iterator[tuple[Classifier, Link]]:
    with (
        Classifier.open(bundle) as classifier,
        Link(
            "127.0.0.1",
            port,
            site="hall-2",
            device="cam-7",
            classifier=classifier,
            window_s=window_s,
        ) as link,
    ):
        yield classifier, link


def wait_until(true: Callable[[], bool], timeout: float = 15) -> None:
    deadline = time.monotonic() + timeout
    while not true():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.01)


def test_birth_windows_and_farewell(broker: Broker, pristine_bundle: Path) -> None:
    with inbox(broker.port) as box:
        with linked(pristine_bundle, broker.port) as (classifier, link):
            topic, _, birth = box.next("status")
            assert topic == "eyas/hall-2/cam-7/status"
            assert (birth.state, birth.agent, birth.device) == ("online", __version__, "cam-7")
            assert (birth.model, birth.artefact) == ("tiny-shapes 1.2.3", "litert-int8")
            with open_camera("fake:?frames=12&junk=3") as camera:
                Loop(classifier, camera, [link]).run()
        topic, retained, window = box.next("window")
        assert (topic, retained) == ("eyas/hall-2/cam-7/window", False)
        assert window.frames == sum(window.counts.values()) == 11
        assert {label: sum(tenths) for label, tenths in window.confidence.items()} == window.counts
        assert all(len(tenths) == 10 for tenths in window.confidence.values())
        assert 0 < window.latency_ms["p50"] <= window.latency_ms["p99"] <= window.latency_ms["max"]
        assert window.seconds > 0
        farewell = box.next("status")[2]
        assert farewell.state == "offline"
        assert farewell.spool == window.spool == birth.spool
        assert [birth.sequence, window.sequence, farewell.sequence] == [0, 1, 2]
    with inbox(broker.port) as late:
        assert late.next("status")[1:] == (True, farewell)


def test_windows_come_by_the_clock(broker: Broker, pristine_bundle: Path) -> None:
    with inbox(broker.port) as box, linked(pristine_bundle, broker.port, window_s=0.2):
        windows = [box.next("window")[2] for _ in range(3)]
    assert [window.frames for window in windows] == [0, 0, 0], "a camera that stands still has to show"
    assert all(0.15 < window.seconds < 5 for window in windows)
    first = windows[0].sequence
    assert [window.sequence for window in windows] == [first, first + 1, first + 2]


def test_a_killed_device_is_reported_lost(broker: Broker, pristine_bundle: Path) -> None:
    command = [sys.executable, "-m", "eyas_device", "run", "--bundle", str(pristine_bundle), "--camera", "fake:"]
    command += ["--loop", "--fps", "20", "--mqtt", f"127.0.0.1:{broker.port}", "--site", "s", "--device-id", "d"]
    with inbox(broker.port) as box:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            assert box.next("status")[2].state == "online"
        finally:
            process.send_signal(signal.SIGKILL)
            process.wait()
        lost = box.next("status")[2]
    assert (lost.state, lost.sequence, lost.device) == ("lost", -1, "d")


def test_a_broker_that_comes_late_and_comes_back(make_broker: Callable[..., Broker], pristine_bundle: Path) -> None:
    broker = make_broker()
    with linked(pristine_bundle, broker.port, window_s=0.2) as (classifier, link):
        wait_until(lambda: "cannot be reached" in link.state)
        broker.start()
        with inbox(broker.port) as box:
            wait_until(lambda: link.state == "connected")
            assert box.next("status")[2].state == "online"
        broker.stop()
        wait_until(lambda: link.state.startswith("not connected"))
        with open_camera("fake:?frames=5") as camera:
            started = time.monotonic()
            Loop(classifier, camera, [link]).run()
            assert time.monotonic() - started < 2, "the frame loop waited for the broker"
        broker.start()
        with inbox(broker.port) as box:
            frames = 0
            while frames < 5:
                frames += box.next("window")[2].frames
            assert frames == 5
            wait_until(lambda: link.state == "connected")


def test_a_refused_device_says_so(make_broker: Callable[..., Broker], pristine_bundle: Path) -> None:
    broker = make_broker(options="allow_anonymous false").start()
    with linked(pristine_bundle, broker.port) as (_, link):
        wait_until(lambda: "refused by the broker: Not authorized" in link.state)


def test_closing_without_a_broker_does_not_hang(pristine_bundle: Path) -> None:
    started = time.monotonic()
    with linked(pristine_bundle, 9):  # nobody listens there
        pass
    assert time.monotonic() - started < 5


@pytest.mark.parametrize(
    "wrong",
    [{"device": "a/b"}, {"site": "+"}, {"device": ""}, {"port": 0}, {"host": "a" * 70}, {"host": ""}, {"window_s": 0}],
)
def test_impossible_settings(wrong: dict[str, Any], pristine_bundle: Path) -> None:
    with Classifier.open(pristine_bundle) as classifier:
        facts = {"classifier": classifier}
        with pytest.raises(LinkError):
            Link(**{"host": "127.0.0.1", "site": "s", "device": "d", **facts, **wrong})
