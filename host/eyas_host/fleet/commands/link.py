"""Connection of a sender of commands: what devices are there, and what the commanded ones answer."""

from __future__ import annotations

import math
import queue
import threading
import time
from collections.abc import Collection
from typing import Any
from uuid import uuid4

import msgspec
from paho.mqtt.client import Client
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

from eyas_device.support.closing import Closing
from eyas_device.telemetry.messages import MAX_BYTES, Command, Event, Result, Status, encode, topic
from eyas_device.telemetry.mqtt_client import Connector, Session
from eyas_host.fleet.broker.client import BrokerAccess, end_session
from eyas_host.fleet.store.validate import ValidMessage, validate
from eyas_host.support.errors import BrokerUnreachable

MAX_DEVICES = 20_000
"""Most devices that are noted, so that invented names do not fill the memory."""
_CONNECT_S, _QUIET_S, _STATUSES_S = 6.0, 0.5, 10.0
"""Time limit for a connection; the silence that ends the retained statuses, and their time limit."""
_STATUSES = "eyas/+/+/status"
_SESSION_S = 300
"""How long the broker keeps answers while the connection is interrupted."""
_MAX_PACKET = MAX_BYTES + 1024
_TOPICS_AT_ONCE = 100
_NO_SUBSCRIBERS = 0x10
"""MQTT 5 reason code of a PUBACK: nobody receives the message."""

Device = tuple[str, str]
"""Site and name."""


class Refused(msgspec.Struct, frozen=True):
    """The broker did not pass a command on."""

    id: str
    reason: str


Answer = Result | Event | Refused


class CommandLink(Closing):
    """Reads the retained statuses of a fleet, publishes commands, and receives what belongs to them.

    Of what arrives, only the first result and the first event of each command are kept: nothing that a device sends
    besides takes memory.
    """

    def __init__(self, access: BrokerAccess) -> None:
        """Connect and read the statuses.

        Raises `BrokerUnreachable` for a broker that does not answer or refuses, `LinkError` for an invalid address or
        invalid credentials.
        """
        self.answers: queue.Queue[tuple[Device, Answer]] = queue.Queue()
        """What devices answered, and the broker."""
        self._access = access
        self._lock = threading.Lock()
        self._statuses: dict[Device, Status] = {}
        self._expected: set[tuple[Device, str, type[Result] | type[Event]]] = set()
        """Device, command and kind of what may still come."""
        self._published: dict[int, tuple[Device, str]] = {}
        """Packet number -> device and command that the broker has not acknowledged."""
        self._early: dict[int, Any] = {}
        """Acknowledgements that came before their packet number was noted."""
        self._topics = [(_STATUSES, 0)]  # of QoS 1, a broker queues a thousand
        self._events: queue.Queue[tuple[str, Any]] = queue.Queue()
        session = Session(client_id=f"eyas-send-{uuid4().hex[:12]}", expiry_s=_SESSION_S, max_packet_bytes=_MAX_PACKET)
        self._connector = Connector(access.address[:2], session)
        self._client = self._connect()
        try:
            self._read_statuses()
        except BaseException:
            self.close()
            raise

    @property
    def statuses(self) -> dict[Device, Status]:
        """Newest status of each device."""
        with self._lock:
            return dict(self._statuses)

    def listen(self, devices: Collection[Device], kinds: Collection[str]) -> None:
        """Subscribe to messages of some kinds; returns when the broker granted it. Raises `BrokerUnreachable`."""
        topics = [(topic(site, name, kind), 1) for site, name in devices for kind in kinds]
        for first in range(0, len(topics), _TOPICS_AT_ONCE):
            some = topics[first : first + _TOPICS_AT_ONCE]
            self._topics += some
            self._client.subscribe(some)
            self._wait_for("subscribed", _CONNECT_S)

    def publish(self, device: Device, command: Command, *, expires_s: float, events: bool) -> None:
        """Send a command; with `events`, an event belongs to its answer.

        After `expires_s` the broker drops it (MQTT 5), besides the device's own check of `command.expires`.
        """
        properties = None
        if self._connector.client_mqtt5:
            properties = Properties(PacketTypes.PUBLISH)
            properties.MessageExpiryInterval = max(1, math.ceil(expires_s))
        with self._lock:
            for kind in (Result, Event) if events else (Result,):
                self._expected.add((device, command.id, kind))
        sent = self._client.publish(topic(*device, "cmd"), encode(command), qos=1, properties=properties)
        with self._lock:
            self._published[sent.mid] = (device, command.id)
            early = self._early.pop(sent.mid, None)
        if early is not None:
            self._on_publish(self._client, None, sent.mid, early, None)

    def close(self) -> None:
        """Disconnect; the broker keeps nothing."""
        end_session(self._client, mqtt5=self._connector.client_mqtt5)
        self._client.loop_stop()

    def _connect(self) -> Client:
        """Connect with MQTT 5, or with 3.1.1 where the broker knows nothing newer."""
        problem = ""
        for _ in range(2):
            client = self._start()
            try:
                kind, value = self._events.get(timeout=_CONNECT_S)
            except queue.Empty:
                kind, value = "silent", ""
            if kind == "connected":
                return client
            client.disconnect()
            client.loop_stop()
            problem = str(value)
            if kind == "refused" and not self._connector.switch_if_unsupported(value):
                break
            if kind != "refused":
                self._connector.not_answered()
                problem = self._access.describe("") or "something listens, but does not answer as an MQTT broker"
                if self._access.address.tls:
                    break
            self._events = queue.Queue()
        raise BrokerUnreachable(f"broker {self._access.broker}: {problem}")

    def _start(self) -> Client:
        client = self._connector.make_client()
        self._access.apply(client)
        client.on_connect, client.on_disconnect = self._on_connect, self._on_disconnect
        client.on_subscribe, client.on_publish = self._on_subscribe, self._on_publish
        client.on_message = self._on_message
        self._access.start(self._connector, client)
        return client

    def _read_statuses(self) -> None:
        self._wait_for("subscribed", _CONNECT_S)
        end = time.monotonic() + _STATUSES_S
        while time.monotonic() < end:
            try:
                self._wait_for("retained", _QUIET_S)
            except BrokerUnreachable:
                return

    def _wait_for(self, kind: str, timeout: float) -> None:
        end = time.monotonic() + timeout
        while True:
            try:
                found, value = self._events.get(timeout=max(0.0, end - time.monotonic()))
            except queue.Empty:
                raise BrokerUnreachable(f"broker {self._access.broker}: no reply") from None
            if found == "forbidden":
                raise BrokerUnreachable(f"broker {self._access.broker}: it refused a subscription: {value}")
            if found == kind:
                return

    def _on_connect(self, client: Client, userdata: object, flags: Any, reason: Any, properties: Any) -> None:
        if reason.is_failure:
            self._events.put(("refused", reason))
            return
        self._connector.accepted()
        self._events.put(("connected", None))
        for first in range(0, len(self._topics), _TOPICS_AT_ONCE):
            client.subscribe(self._topics[first : first + _TOPICS_AT_ONCE])

    def _on_disconnect(self, client: Client, userdata: object, flags: Any, reason: Any, properties: Any) -> None:
        self._events.put(("gone", reason))

    def _on_subscribe(self, client: Client, userdata: object, mid: int, reasons: Any, properties: Any) -> None:
        refused = [str(reason) for reason in reasons if reason.is_failure]
        self._events.put(("forbidden", refused[0]) if refused else ("subscribed", None))

    def _on_publish(self, client: Client, userdata: object, mid: int, reason: Any, properties: Any) -> None:
        with self._lock:
            if mid not in self._published:
                self._early[mid] = reason
                return
            device, command = self._published.pop(mid)
        nobody = getattr(reason, "value", 0) == _NO_SUBSCRIBERS
        if reason.is_failure or nobody:
            self.answers.put((device, Refused(command, str(reason))))

    def _on_message(self, client: Client, userdata: object, message: Any) -> None:
        if len(message.payload) > MAX_BYTES:
            return
        valid = validate(message.topic, message.payload)
        if not isinstance(valid, ValidMessage):
            return
        device, content = (valid.id.site, valid.id.device), valid.message
        if isinstance(content, Status):
            with self._lock:
                if device in self._statuses or len(self._statuses) < MAX_DEVICES:
                    self._statuses[device] = content
            if message.retain:
                self._events.put(("retained", None))
        elif isinstance(content, Result | Event):
            command = content.id if isinstance(content, Result) else content.command
            key = (device, command, Result if isinstance(content, Result) else Event)
            with self._lock:
                expected = key in self._expected
                self._expected.discard(key)
            if expected:
                self.answers.put((device, content))
