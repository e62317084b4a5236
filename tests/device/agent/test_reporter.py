"""Telemetry through a real broker: status and windows, acknowledgements, commands, old brokers and bad ones."""

from __future__ import annotations

import hashlib
import json
import queue
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from paho.mqtt.client import CallbackAPIVersion, Client, MQTTProtocolVersion

from eyas_device import __version__
from eyas_device.agent.loop import Loop
from eyas_device.agent.ood import OodDetector
from eyas_device.agent.reporter import Reporter, ReporterSettings
from eyas_device.camera import open_camera
from eyas_device.config import PrivacySection
from eyas_device.errors import LinkError
from eyas_device.predict import Classifier
from eyas_device.telemetry.messages import (
    KINDS,
    Ack,
    Command,
    Event,
    Header,
    Health,
    Profile,
    Result,
    Status,
    Window,
    decode,
    encode,
    hint_topic,
)
from eyas_device.telemetry.mqtt import Uplink, UplinkSettings
from eyas_device.telemetry.mqtt_client import LinkState
from eyas_device.telemetry.remote import CommandExecutor, Handler
from eyas_device.telemetry.spool.spool import IN_FLIGHT, Spool, SpoolLimits
from eyas_device.telemetry.tls import Security
from tests.device.telemetry.test_messages import FUZZED, hostile
from tests.support.brokers import Broker, forward, free_port
from tests.support.system_parts import require


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
                return topic, retained, decode(payload, KINDS[kind])


@contextmanager
def inbox(port: int) -> Iterator[Inbox]:
    box = Inbox(port)
    try:
        yield box
    finally:
        box.client.disconnect()
        box.client.loop_stop()


@contextmanager
def linked(
    bundle: Path,
    port: int,
    *,
    spool: Spool | None = None,
    handlers: dict[str, Handler] | None = None,
    **settings: Any,
) -> Iterator[tuple[Classifier, Reporter]]:
    uplink = UplinkSettings(host="127.0.0.1", port=port, site="hall-2", device="cam-7")
    with (
        Classifier.open(bundle) as classifier,
        Reporter(
            ReporterSettings(uplink=uplink, **{"window_s": 30.0, **settings}), classifier, spool=spool
        ) as reporter,
    ):
        reporter.start(handlers)
        yield classifier, reporter


@contextmanager
def uplinked(
    port: int, spool: Spool, *, on_command: Callable[[bytes], None] = print, **settings: Any
) -> Iterator[Uplink]:
    """A spool on its way to a broker, without anything that fills it."""
    with Uplink(
        UplinkSettings(host="127.0.0.1", port=port, site="hall-2", device="cam-7", **settings),
        spool,
        will=Status(device="cam-7"),
        make_status=lambda: Status(state="online"),
        on_command=on_command,
    ) as uplink:
        uplink.start()
        yield uplink


class Collector(Inbox):
    """Stores what arrives, by identity, and acknowledges it while `acknowledges` is set."""

    def __init__(self, port: int) -> None:
        self.stored: dict[tuple[str, int], int] = {}
        self.acknowledges = True
        super().__init__(port)
        self.client.on_message = self._store

    def _store(self, client: Client, userdata: object, message: Any) -> None:
        _, site, device, kind = message.topic.split("/", 3)
        if kind in ("ack", "cmd") or not self.acknowledges:
            return
        header = decode(message.payload, Header)
        if header.sequence < 0:
            return
        identity = (header.spool, header.sequence)
        self.stored[identity] = self.stored.get(identity, 0) + 1
        ack = Ack(device=device, spool=header.spool, ranges=((header.sequence, header.sequence),))
        client.publish(f"eyas/{site}/{device}/ack", encode(ack), qos=1)


@contextmanager
def collecting(port: int) -> Iterator[Collector]:
    box = Collector(port)
    try:
        yield box
    finally:
        box.client.disconnect()
        box.client.loop_stop()


class OldBroker:
    """Proxy that passes MQTT 3.1.1 on to a broker and refuses MQTT 5, with a reply or without one."""

    def __init__(self, port: int, reply: bytes) -> None:
        self.seen: list[int] = []
        self._reply, self._behind = reply, port
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.port = self._socket.getsockname()[1]
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            try:
                client, _ = self._socket.accept()
            except OSError:
                return
            hello = client.recv(4096)
            level = hello[hello.index(b"MQTT") + 4]
            self.seen.append(level)
            if level == 5:
                client.sendall(self._reply)
                client.close()
                continue
            behind = socket.create_connection(("127.0.0.1", self._behind))
            behind.sendall(hello)
            for a, b in ((client, behind), (behind, client)):
                threading.Thread(target=forward, args=(a, b), daemon=True).start()

    def close(self) -> None:
        self._socket.close()


def wait_until(true: Callable[[], bool], timeout: float = 15) -> None:
    deadline = time.monotonic() + timeout
    while not true():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.01)


def test_online_status_windows_and_offline_status(broker: Broker, pristine_bundle: Path) -> None:
    with inbox(broker.port) as box:
        with linked(pristine_bundle, broker.port) as (classifier, reporter):
            topic, _, online = box.next("status")
            assert topic == "eyas/hall-2/cam-7/status"
            assert (online.state, online.agent, online.device) == ("online", __version__, "cam-7")
            assert (online.model, online.artefact) == ("tiny-shapes 1.2.3", "litert-int8")
            detector = OodDetector(classifier.bundle)
            detector.on_descriptor.append(reporter.add_descriptor)
            with open_camera("fake:?frames=12&junk=3") as camera:
                Loop(classifier, camera, [detector, reporter]).run()
        topic, retained, window = box.next("window")
        assert window.sketch.n >= 1 and 0 < len(window.sketch.mean) <= 8
        assert (topic, retained) == ("eyas/hall-2/cam-7/window", False)
        assert window.frames == sum(window.counts.values()) == 11
        assert {label: sum(bins) for label, bins in window.confidence_bins.items()} == window.counts
        assert all(len(bins) == 10 for bins in window.confidence_bins.values())
        assert 0 < sum(window.confidence_sum.values()) <= window.frames
        assert 0 < window.latency_ms["p50"] <= window.latency_ms["p99"] <= window.latency_ms["max"]
        assert window.seconds > 0
        offline = box.next("status")[2]
        assert offline.state == "offline"
        assert offline.spool == window.spool == online.spool
        assert [online.sequence, window.sequence, offline.sequence] == [0, 1, 2]
    with inbox(broker.port) as late:
        assert late.next("status")[1:] == (True, offline)


def test_windows_come_by_the_clock(broker: Broker, pristine_bundle: Path) -> None:
    with inbox(broker.port) as box, linked(pristine_bundle, broker.port, window_s=0.2):
        windows = [box.next("window")[2] for _ in range(3)]
    assert [window.frames for window in windows] == [0, 0, 0], "a camera that stands still has to show"
    assert all(0.15 < window.seconds < 5 for window in windows)
    first = windows[0].sequence
    assert [window.sequence for window in windows] == [first, first + 1, first + 2]


def test_a_killed_device_is_reported_lost(broker: Broker, pristine_bundle: Path) -> None:
    command = [sys.executable, "-m", "eyas_device", "run", "--bundle", str(pristine_bundle), "--camera", "fake:"]
    command += ["--loop", "--fps", "20", "--broker", f"127.0.0.1:{broker.port}", "--site", "s", "--name", "d"]
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
    with linked(pristine_bundle, broker.port, window_s=0.2) as (classifier, reporter):
        wait_until(lambda: "nothing listens" in reporter.link.detail)
        broker.start()
        with inbox(broker.port) as box:
            wait_until(lambda: reporter.link.state is LinkState.CONNECTED)
            assert box.next("status")[2].state == "online"
        broker.stop()
        wait_until(lambda: reporter.link.state is LinkState.DISCONNECTED)
        with open_camera("fake:?frames=5") as camera:
            started = time.monotonic()
            Loop(classifier, camera, [reporter]).run()
            assert time.monotonic() - started < 2, "the frame loop waited for the broker"
        broker.start()
        with inbox(broker.port) as box:
            frames = 0
            while frames < 5:
                frames += box.next("window")[2].frames
            assert frames == 5
            wait_until(lambda: reporter.link.state is LinkState.CONNECTED)


def test_a_refused_device_says_so(make_broker: Callable[..., Broker], pristine_bundle: Path) -> None:
    broker = make_broker(options="allow_anonymous false").start()
    with linked(pristine_bundle, broker.port) as (_, reporter):
        wait_until(
            lambda: str(reporter.link).startswith(
                "refused by the broker: nobody is accepted without a login (Not authorized)"
            )
        )


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
        facts = {"host": "127.0.0.1", "site": "s", "device": "d", **wrong}
        window_s = facts.pop("window_s", 10.0)
        with pytest.raises(LinkError):
            Reporter(ReporterSettings(uplink=UplinkSettings(**facts), window_s=window_s), classifier)


def test_only_the_collectors_acknowledgement_empties_the_spool(broker: Broker, tmp_path: Path) -> None:
    with Spool(tmp_path, device="cam-7") as spool, uplinked(broker.port, spool) as uplink:
        wait_until(lambda: uplink.listening)
        sequences = [spool.append(Window(frames=n)) for n in range(100)]
        with collecting(broker.port) as collector:
            collector.acknowledges = False
            time.sleep(1.0)
            assert [held.sequence for held in spool.pending("window", limit=200)] == sequences
            assert sum(message.kind == "window" for message in uplink._outbox._in_flight.values()) == IN_FLIGHT
            collector.acknowledges = True
            client = collector.client
            wrong: tuple[bytes, ...] = (
                encode(Ack(device="cam-7", spool=str(uuid.uuid4()), ranges=((0, 2**62),))),
                encode(Ack(device="other", spool=spool.id, ranges=((0, 2**62),))),
                b"{}",
                b"nonsense",
            )
            for payload in wrong:
                client.publish("eyas/hall-2/cam-7/ack", payload, qos=1)
            wait_until(lambda: uplink.ignored == len(wrong))
            assert len(spool.pending("window", limit=200)) == 100
            # An acknowledgement of everything counts only for what was sent.
            everything = encode(Ack(device="cam-7", spool=spool.id, ranges=((0, 2**62), (5, 1))))
            client.publish("eyas/hall-2/cam-7/ack", everything, qos=1)
            wait_until(lambda: not spool.pending("window"))
            assert len(collector.stored) >= 100 - IN_FLIGHT
            assert uplink.status.state is LinkState.CONNECTED


def test_nothing_is_lost_though_broker_and_device_die(
    make_broker: Callable[..., Broker], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The broker forgets everything when it dies, and the collector hears nothing while it is not connected."""
    monkeypatch.setattr("eyas_device.telemetry.outbox._RESEND_S", (1.0, 5.0))
    broker, names, appended = make_broker().start(), set(), set()
    with collecting(broker.port) as collector:
        for part in range(3):
            with Spool(tmp_path, device="cam-7") as spool:
                names.add(spool.id)
                with uplinked(broker.port, spool) as uplink:
                    wait_until(lambda link=uplink: link.connected, 30)
                    appended |= {spool.append(Window(frames=part)) for _ in range(40)}
                    if part == 1:
                        broker.stop()
                        appended |= {spool.append(Window(frames=9)) for _ in range(40)}
                        broker.start()
                    if part == 2:
                        wait_until(lambda s=spool: not s.pending("window"), 60)
        stored = {sequence for _, sequence in collector.stored}
    assert len(names) == 1
    assert appended <= stored


def test_with_delivery_broker_its_acknowledgement_is_enough(broker: Broker, tmp_path: Path) -> None:
    with Spool(tmp_path, device="cam-7") as spool, uplinked(broker.port, spool, delivery="broker"):
        for number in range(100):
            spool.append(Window(frames=number))
        wait_until(lambda: not any(spool.pending(kind) for kind in KINDS))


@pytest.mark.parametrize("reply", [b"\x20\x03\x00\x84\x00", b"\x20\x02\x00\x01", b""])
def test_a_broker_of_before_mqtt_5(broker: Broker, tmp_path: Path, reply: bytes) -> None:
    old = OldBroker(broker.port, reply)
    try:
        with collecting(broker.port) as collector, Spool(tmp_path, device="cam-7") as spool:
            sequence = spool.append(Window(frames=1))
            with uplinked(old.port, spool):
                wait_until(lambda: not spool.pending("window"), 30)
            assert (spool.id, sequence) in collector.stored
        assert old.seen[:2] == [5, 4]
    finally:
        old.close()


def test_a_server_that_never_answers_blocks_nothing(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as deaf, Spool(tmp_path, device="cam-7") as spool:
        with uplinked(deaf.getsockname()[1], spool):
            time.sleep(0.5)
            started = time.monotonic()
        assert time.monotonic() - started < 5
        assert spool.append(Window()) >= 0


def test_the_spool_is_synced_while_the_uplink_hangs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A resolver has no time limit, and off-line is when a power cut costs most."""
    ended, asked = threading.Event(), threading.Event()

    def resolve(*args: Any, **options: Any) -> list[Any]:
        asked.set()
        ended.wait(60)
        raise socket.gaierror(-3, "Temporary failure in name resolution")

    monkeypatch.setattr("socket.getaddrinfo", resolve)
    spool = Spool(tmp_path, device="cam-7", limits=SpoolLimits(sync_s=0.1))
    uplink = UplinkSettings(host="broker.example", port=1883, site="hall-2", device="cam-7")

    def broken_sensor() -> Health:
        raise OSError(5, "Input/output error")

    reporter = Reporter(ReporterSettings(uplink=uplink, window_s=0.1), health=broken_sensor, spool=spool)
    reporter.start()
    try:
        assert asked.wait(10)
        for _ in range(2):
            spool.append(Window())
            wait_until(lambda: not spool._syncs.waiting)
    finally:
        ended.set()
        monkeypatch.setattr(reporter, "_health", Health)
        reporter.close()


def test_a_message_that_is_too_long_is_dropped_and_counted(make_broker: Callable[..., Broker], tmp_path: Path) -> None:
    broker = make_broker(options="allow_anonymous true\nmax_packet_size 20000").start()
    with collecting(broker.port) as collector, Spool(tmp_path, device="cam-7") as spool:
        with uplinked(broker.port, spool):
            long = spool.append(Event(image="x" * 30_000))
            short = spool.append(Event(image="x" * 3000))
            wait_until(lambda: not spool.pending("event"))
            spool.append(Window())
            wait_until(lambda: not spool.pending("window"))
        assert (spool.id, short) in collector.stored
        assert (spool.id, long) not in collector.stored


def test_a_topic_that_is_refused_is_kept_and_reported(make_broker: Callable[..., Broker], tmp_path: Path) -> None:
    (tmp_path / "acl").write_text("topic readwrite eyas/+/+/status\ntopic readwrite eyas/hall-2/cam-7/window\n")
    broker = make_broker(options=f"user root\nallow_anonymous true\nacl_file {tmp_path / 'acl'}").start()
    with Spool(tmp_path / "spool", device="cam-7") as spool, uplinked(broker.port, spool, delivery="broker") as uplink:
        spool.append(Event(label="x"))
        spool.append(Window())
        wait_until(lambda: not spool.pending("window"))
        wait_until(lambda: uplink.refused > 0)
        assert "Not authorized" in uplink.status.detail
        assert len(spool.pending("event")) == 1


def test_commands_are_executed_once_and_answered_through_the_spool(broker: Broker, pristine_bundle: Path) -> None:
    executed: list[Any] = []

    def snapshot(command: Command) -> dict[str, Any]:
        executed.append(dict(command.arguments))
        return {"number": len(executed)}

    options = {"handlers": {"snapshot": snapshot, "pause": snapshot}, "commands": ("snapshot",)}
    with inbox(broker.port) as box, linked(pristine_bundle, broker.port, **options) as (_, reporter):
        wait_until(lambda: reporter._uplink.listening)
        command = Command(id=str(uuid.uuid4()), name="snapshot", arguments={"a": 1.5}, expires=time.time() + 60)
        for _ in range(2):
            box.client.publish("eyas/hall-2/cam-7/cmd", encode(command), qos=1)
            topic, _, result = box.next("cmd/result")
            assert topic == "eyas/hall-2/cam-7/cmd/result"
            assert (result.id, result.ok, result.data) == (command.id, True, {"number": 1})
        refused = Command(id=str(uuid.uuid4()), name="pause", expires=time.time() + 60)
        box.client.publish("eyas/hall-2/cam-7/cmd", encode(refused), qos=1)
        result = box.next("cmd/result")[2]
        assert (result.id, result.ok) == (refused.id, False)
        assert "not allowed" in result.detail
    assert executed == [{"a": 1.5}]


def test_a_hint_is_passed_on_once_and_never_trusted(broker: Broker, tmp_path: Path) -> None:
    hints: queue.Queue[None] = queue.Queue()
    desired = hint_topic("hall-2", "early")
    with inbox(broker.port) as box:
        box.client.publish(desired, b"\xff not a document", qos=1, retain=True).wait_for_publish(10)
        settings = UplinkSettings(host="127.0.0.1", port=broker.port, site="hall-2", device="cam-7", hint=desired)
        spool = Spool(tmp_path / "spool", device="cam-7")
        with Uplink(
            settings,
            spool,
            will=Status(device="cam-7"),
            make_status=lambda: Status(state="online"),
            on_command=print,
            on_hint=lambda: hints.put(None),
        ) as uplink:
            uplink.start()
            hints.get(timeout=15)
            before = uplink.ignored
            box.client.publish(desired, b"x" * (65 << 10), qos=1, retain=True)  # too long for a device
            box.client.publish(hint_topic("hall-2", "others"), b"2", qos=1)
            box.client.publish(desired, b"", qos=1, retain=True)
            box.client.publish(desired, b"\xff not a document", qos=1)
            box.client.publish(desired, b"2", qos=1, retain=True)
            hints.get(timeout=15)
            broker.stop()
            broker.start()
            wait_until(lambda: box.client.is_connected() and uplink.listening and uplink.connected)
            box.client.publish(desired, b"2", qos=1, retain=True)
            box.client.publish(desired, b"3", qos=1, retain=True)
            hints.get(timeout=15)
            assert hints.empty(), "the same hint was passed on twice"
            assert uplink.ignored == before


def test_the_arm_of_a_window_ends_with_the_probation(broker: Broker, pristine_bundle: Path) -> None:
    arm = ["candidate"]
    uplink = UplinkSettings(host="127.0.0.1", port=broker.port, site="hall-2", device="cam-7")
    with inbox(broker.port) as box, Classifier.open(pristine_bundle) as classifier:
        settings = ReporterSettings(uplink=uplink, window_s=30.0)
        with Reporter(settings, classifier, arm=lambda: arm[0]) as reporter:
            reporter.start()
            box.next("status")
            Loop(classifier, open_camera("fake:?frames=3"), [reporter]).run()
            arm[0] = ""
            reporter.refresh_arm()
            Loop(classifier, open_camera("fake:?frames=2"), [reporter]).run()
        windows = [box.next("window")[2] for _ in range(2)]
    assert [(window.arm, window.frames) for window in windows] == [("candidate", 3), ("", 2)]


def test_events_leave_as_the_privacy_rules_say(broker: Broker, pristine_bundle: Path) -> None:
    privacy = PrivacySection(
        images=True, sample_rate=1.0, min_interval_s=0.0, max_images_per_day=2, max_side=32, blur="whole"
    )
    with inbox(broker.port) as box, linked(pristine_bundle, broker.port, privacy=privacy) as (classifier, reporter):
        wait_until(lambda: reporter.link.state is LinkState.CONNECTED)
        with open_camera("fake:?frames=6") as camera:
            for _ in range(6):
                Loop(classifier, camera, [reporter]).run(frames=1)
                wait_until(lambda: reporter._events.empty())
        events = [box.next("event")[2] for _ in range(3)]
    assert [bool(event.image) for event in events] == [True, True, False]
    assert events[0].image_policy["width"] == 32
    assert events[0].image_policy["blur"] == "whole"
    assert events[2].image_policy == {"image": "none: only 2 a day are allowed"}
    assert events[0].why == "sampled"
    assert sum(events[0].top.values()) == pytest.approx(1.0, abs=0.01)
    assert events[0].label == max(events[0].top, key=lambda label: events[0].top[label])


def test_a_requested_event_waits_for_its_turn(broker: Broker, pristine_bundle: Path) -> None:
    """Predictions that come faster than events can be encoded cost none of the requested ones."""
    privacy = PrivacySection(images=True, max_side=32)
    with inbox(broker.port) as box, linked(pristine_bundle, broker.port, privacy=privacy) as (classifier, reporter):
        wait_until(lambda: reporter.link.state is LinkState.CONNECTED)
        go, encode_image = threading.Event(), reporter._policy.image
        reporter._policy.image = lambda *args: go.wait(20) and encode_image(*args)  # type: ignore[method-assign]
        assert [reporter.request_event(command, 60.0) for command in "abcd"] == ["included"] * 4
        with open_camera("fake:?frames=12") as camera:
            loop = Loop(classifier, camera, [reporter])
            loop.run(frames=6)
            go.set()
            for _ in range(6):
                wait_until(lambda: reporter._events.empty())
                loop.run(frames=1)
        events = [box.next("event")[2] for _ in range(4)]
    assert [event.why for event in events] == ["command"] * 4 and all(event.image for event in events)
    assert [event.command for event in events] == ["a", "b", "c", "d"], "whoever sent one knows its own"


def test_a_swapped_model_begins_a_new_window(broker: Broker, pristine_bundle: Path) -> None:
    with inbox(broker.port) as box:
        with linked(pristine_bundle, broker.port) as (classifier, reporter):
            wait_until(lambda: reporter.link.state is LinkState.CONNECTED)
            with open_camera("fake:?frames=3") as camera:
                Loop(classifier, camera, [reporter]).run()
            with Classifier.open(pristine_bundle, "openvino") as other, open_camera("fake:?frames=2") as camera:
                Loop(other, camera, [reporter]).run()
        first, second = box.next("window")[2], box.next("window")[2]
    assert [(w.artefact, w.frames) for w in (first, second)] == [("litert-int8", 3), ("openvino-fp32", 2)]


def test_a_model_of_the_same_name_and_version_begins_a_new_window(
    broker: Broker, pristine_bundle: Path, tmp_path: Path
) -> None:
    """Retrained under an old version, it may answer differently: the digest of its manifest tells them apart."""
    retrained = tmp_path / "retrained"
    shutil.copytree(pristine_bundle, retrained)
    manifest = json.loads((retrained / "manifest.json").read_text())
    manifest["confidence"]["threshold"] = 0.99
    (retrained / "manifest.json").write_text(json.dumps(manifest))
    with inbox(broker.port) as box:
        with linked(pristine_bundle, broker.port) as (classifier, reporter):
            status = box.next("status")[2]
            with open_camera("fake:?frames=3") as camera:
                Loop(classifier, camera, [reporter]).run()
            with Classifier.open(retrained, "litert") as other, open_camera("fake:?frames=2") as camera:
                Loop(other, camera, [reporter]).run()
        first, second = box.next("window")[2], box.next("window")[2]
    digests = [
        hashlib.sha256((root / "manifest.json").read_bytes()).hexdigest()[:12] for root in (pristine_bundle, retrained)
    ]
    assert [(w.digest, w.frames) for w in (first, second)] == [(digests[0], 3), (digests[1], 2)]
    assert (first.model, first.artefact) == (second.model, second.artefact)
    assert status.digest == digests[0]


def test_the_status_after_a_swap_names_the_new_model(broker: Broker, pristine_bundle: Path) -> None:
    """Also where the change was reported before the reporter knew the model."""
    with inbox(broker.port) as box, linked(pristine_bundle, broker.port) as (_, reporter):
        assert box.next("status")[2].artefact == "litert-int8"
        reporter.report_status()
        assert box.next("status")[2].artefact == "litert-int8"
        with Classifier.open(pristine_bundle, "openvino") as other:
            reporter.on_model(other)
            assert box.next("status")[2].artefact == "openvino-fp32"


def test_a_window_costs_little(pristine_bundle: Path, tmp_path: Path) -> None:
    spool = Spool(tmp_path, device="cam-7")
    with linked(pristine_bundle, free_port(), spool=spool) as (_, reporter):
        reporter._append_window()
        cpu = time.thread_time()
        for _ in range(500):
            reporter._append_window()
        assert (time.thread_time() - cpu) / 500 < 0.003, "0.3 ms on a quiet machine"


@pytest.mark.parametrize("tls", ["right", "wrong authority", "expired"])
def test_tls_with_certificates(make_broker: Callable[..., Broker], tmp_path: Path, tls: str) -> None:
    pem = certificates(tmp_path)
    options = f"cafile {pem['ca']}\ncertfile {pem['server']}\nkeyfile {pem['server-key']}\nrequire_certificate true"
    broker = make_broker(options=f"user root\nallow_anonymous true\n{options}").start()
    name = "expired" if tls == "expired" else "device"
    security = Security(
        ca=pem["other-ca" if tls == "wrong authority" else "ca"], certificate=pem[name], key=pem[f"{name}-key"]
    )
    with Spool(None, device="cam-7") as spool, uplinked(broker.port, spool, security=security) as uplink:
        if tls == "right":
            wait_until(lambda: uplink.status.state is LinkState.CONNECTED)
        else:
            wait_until(lambda: uplink.status.state is LinkState.DISCONNECTED)
            assert not uplink.connected


def certificates(folder: Path) -> dict[str, str]:
    """Name -> PEM file: an authority, a server of 127.0.0.1, two clients (one expired), another authority."""
    (tool,) = require("openssl")

    def run(*arguments: str) -> None:
        subprocess.run([tool, *arguments], check=True, capture_output=True, cwd=folder, timeout=60)

    (folder / "server.ext").write_text("subjectAltName=IP:127.0.0.1\n")
    key = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")
    for ca in ("ca", "other-ca"):
        run("req", "-x509", *key, "-subj", f"/CN={ca}", "-keyout", f"{ca}-key.pem", "-out", f"{ca}.pem", "-days", "2")
    for name in ("server", "device", "expired"):
        run("req", *key, "-subj", f"/CN={name}", "-keyout", f"{name}-key.pem", "-out", f"{name}.csr")
        more = ["-extfile", "server.ext"] if name == "server" else []
        days = "-1" if name == "expired" else "1"
        signed = ("-CA", "ca.pem", "-CAkey", "ca-key.pem", "-CAcreateserial", "-days", days)
        run("x509", "-req", "-in", f"{name}.csr", "-out", f"{name}.pem", *signed, *more)
    return {path.stem: str(path) for path in folder.glob("*.pem")}


def test_credentials_that_cannot_be_used(tmp_path: Path) -> None:
    (tmp_path / "password").write_text("secret\n")
    (tmp_path / "password").chmod(0o644)
    wrong = {
        "cannot be read": Security(user="u", password_file=str(tmp_path / "none")),
        "chmod 600": Security(user="u", password_file=str(tmp_path / "password")),
        "PEM files": Security(ca=str(tmp_path / "password")),
        "both": Security(certificate="x"),
    }
    for message, security in wrong.items():
        with Spool(None, device="d") as spool, uplinked(9, spool, security=security) as uplink:
            wait_until(lambda message=message, uplink=uplink: message in str(uplink.status))
            assert uplink.thread.alive
    (tmp_path / "password").chmod(0o600)
    assert Security(password_file=str(tmp_path / "password")).password() == "secret"


def test_hostile_messages_change_nothing(tmp_path: Path) -> None:
    """The callbacks of an uplink that is not connected get what a broker might send, on any topic."""

    class Message:
        def __init__(self, topic: str, payload: bytes) -> None:
            self.topic, self.payload = topic, payload

    rng = random.Random(11)
    ends = ["ack", "cmd", "status", "window", "event", "cmd/result", "", "\u0000", "ack/x"]
    with Spool(tmp_path, device="cam-7") as spool:
        kept = [spool.append(message) for message in (Window(), Event(), Profile(), Result())]
        executed: list[Any] = []
        handlers: dict[str, Handler] = {"pause": lambda command: executed.append(command) or {}}
        with (
            CommandExecutor(allowed=["pause"], spool=spool) as commands,
            uplinked(9, spool, on_command=commands.take) as uplink,
        ):
            commands.register(handlers)
            for number in range(FUZZED):
                topic = f"eyas/hall-2/{rng.choice(['cam-7', 'other'])}/{rng.choice(ends)}"
                uplink._on_message(None, None, Message(topic, hostile(rng)))
                if number % 500 == 0:
                    uplink._on_message(None, None, Message("eyas/hall-2/cam-7/ack", b"x" * (10 << 20)))
            assert uplink.ignored > FUZZED // 4
        assert not executed
        assert [spool.get(number) is not None for number in kept] == [True] * 4
