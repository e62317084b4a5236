"""The way to the broker: one thread that connects, sends what the spool holds, and forgets what has arrived.

With `delivery = "collector"` a message is forgotten when the collector says that it is in its store, on nothing else;
until then it is sent again: at once after each connection, else after 30 s and then ever more seldom. With `"broker"`
the broker's word is enough, which a broker may give before anything is on a disk.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from typing import Any, Literal

import msgspec
from paho.mqtt.client import CallbackAPIVersion, Client, MQTTErrorCode, MQTTProtocolVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

from eyas_device.errors import LinkError
from eyas_device.support.closing import Closing
from eyas_device.telemetry.messages import MOST_BYTES, Ack, Header, decode, encode, topic
from eyas_device.telemetry.spool.spool import IN_FLIGHT, Held, Spool
from eyas_device.telemetry.tls import Security

Delivery = Literal["collector", "broker"]

_LANES = {"cmd/result": IN_FLIGHT, "event": 4, "profile": 1, "window": IN_FLIGHT, "status": IN_FLIGHT}
"""Kind -> how many may wait for the collector, in the order in which they are sent: a farewell comes last."""
_KEEPALIVE_S = 30
_SESSION_S = 86400
_MOST_RECEIVED = 64 << 10
_MOST_RANGES = 1000
_TURN_S = 0.1
_CONNACK_S = 10.0
_PUBACK_S = 30.0
_AGAIN_S = (30.0, 600.0)
_BACKOFF_S = (1.0, 60.0)
_STABLE_S = 60.0
_FAREWELL_S = 2.0
_ENVELOPE = 256
"""Bytes of a packet beside the payload, at most, with a topic of allowed names."""


class _Flight(msgspec.Struct):
    """A message that was sent and not yet acknowledged by the collector."""

    kind: str
    sent: float
    due: float
    tries: int = 1
    mid: int | None = None
    """Until the broker has acknowledged it."""


class Uplink(Closing):
    """Sends a spool to a broker, and takes acknowledgements and commands from it.

    It never stops trying: with jittered pauses of 1 to 60 s that start again after a connection of a minute.
    """

    def __init__(
        self,
        host: str,
        port: int,
        *,
        site: str,
        device: str,
        spool: Spool,
        will: Header,
        born: Callable[[], Header],
        commanded: Callable[[bytes], None],
        delivery: Delivery = "collector",
        security: Security | None = None,
    ) -> None:
        """Start connecting, in a thread; `born` makes the status of each new connection, `commanded` gets each command
        as it came, in that thread: it must not wait. Raises `LinkError` for credentials that cannot be read.
        """
        self.state = "connecting"
        """For people: `connected`, or why not."""
        self.refused = 0
        """Messages that the broker refused."""
        self.ignored = 0
        """Messages of the broker that were none for us."""
        self.listening = False
        """Whether the broker passes acknowledgements and commands on to us."""
        self.resent = 0
        """How often a message was sent again."""
        self._address, self._site, self._device = (host, port), site, device
        self._spool, self._will, self._born, self._commanded = spool, will, born, commanded
        self._delivery, self._security = delivery, security or Security()
        self._security.context()
        self._security.password()
        self._client: Any = None
        self._flights: dict[int, _Flight] = {}
        self._sent: dict[str, int] = {}
        """Kind -> the highest sequence that was sent."""
        self._arrived: set[int] = set()
        self._spool_id, self._seen = spool.id, -1
        self._protocol = MQTTProtocolVersion.MQTTv5
        self._slots, self._most_bytes = IN_FLIGHT, MOST_BYTES
        self._welcome: bool | None = None
        """Whether the broker let us in; None: it has not answered yet."""
        self._up = 0.0
        """When it did."""
        self._failures = 0
        self._maintained = 0.0
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="telemetry-uplink", daemon=True)
        self._thread.start()

    @property
    def connected(self) -> bool:
        """Whether the broker let us in and is there."""
        return self._client is not None and bool(self._welcome)

    def close(self) -> None:
        """Send what can be sent within two seconds, if there is a connection, and leave."""
        self._closing.set()
        self._thread.join(_FAREWELL_S + 3.0)

    # The connection

    def _run(self) -> None:
        while not self._closing.is_set():
            self._session()
            if self._closing.is_set():
                return
            self._failures = 0 if self._up and time.monotonic() - self._up >= _STABLE_S else self._failures + 1
            pause = min(_BACKOFF_S[0] * 2.0 ** min(self._failures - 1, 10), _BACKOFF_S[1]) if self._failures else 0.5
            until = time.monotonic() + pause * random.uniform(0.5, 1.0)
            while (left := until - time.monotonic()) > 0 and not self._closing.is_set():
                self._maintain()
                self._closing.wait(min(left, 1.0))

    def _session(self) -> None:
        """From connecting to the loss of the connection."""
        self._begin()
        try:
            client = self._connect()
        except (OSError, ValueError) as error:  # TLS's errors are OSErrors
            self.state = (
                str(error)
                if isinstance(error, LinkError)
                else f"not connected: the broker cannot be reached ({error}); trying again"
            )
            return
        self._client = client
        started = time.monotonic()
        farewell: float | None = None
        try:
            while client.loop(_TURN_S) == MQTTErrorCode.MQTT_ERR_SUCCESS and self._welcome is not False:
                now = time.monotonic()
                self._maintain()
                if self._welcome is None:
                    if now - started > _CONNACK_S or self._closing.is_set():
                        self.state = "not connected: something listens but does not answer as an MQTT broker"
                        return
                    continue
                if not self._send(now):
                    return
                if self._closing.is_set():
                    farewell = farewell or now + _FAREWELL_S
                    if now > farewell or self._all_sent():
                        client.disconnect()
                        return
        except (OSError, ValueError) as error:  # of a socket that closed in between
            self.state = f"not connected: {error}"
        finally:
            self._leave(client)

    def _begin(self) -> None:
        self._welcome, self._up, self.listening = None, 0.0, False

    def _connect(self) -> Client:
        old = self._protocol != MQTTProtocolVersion.MQTTv5
        client = Client(
            CallbackAPIVersion.VERSION2,
            client_id=f"eyas-{self._site}-{self._device}",
            protocol=self._protocol,
            **({"clean_session": False} if old else {}),
        )
        client.max_inflight_messages_set(IN_FLIGHT)
        client.will_set(topic(self._site, self._device, "status"), encode(self._will), qos=1, retain=True)
        self._security.apply(client)
        client.on_connect, client.on_disconnect = self._on_connect, self._on_disconnect
        client.on_publish, client.on_subscribe = self._on_publish, self._on_subscribe
        client.on_message = self._on_message
        if old:
            client.connect(*self._address, keepalive=_KEEPALIVE_S)
            return client
        wishes = Properties(PacketTypes.CONNECT)
        wishes.SessionExpiryInterval, wishes.ReceiveMaximum = _SESSION_S, IN_FLIGHT
        wishes.MaximumPacketSize = _MOST_RECEIVED
        client.connect(*self._address, keepalive=_KEEPALIVE_S, clean_start=False, properties=wishes)
        return client

    def _leave(self, client: Client) -> None:
        """Close the socket, whatever state it is in; a broker that was not told farewell publishes the will."""
        self._client = None
        client.on_disconnect = None
        sock = client.socket()
        if sock is not None:
            sock.close()
        if self._welcome is None and not self._closing.is_set():
            # Some brokers of before MQTT 5 just hang up: the next try is the other version's.
            other = {MQTTProtocolVersion.MQTTv5: MQTTProtocolVersion.MQTTv311}
            self._protocol = other.get(self._protocol, MQTTProtocolVersion.MQTTv5)
        if self.state.startswith("connect"):
            self.state = "not connected: the connection was lost"

    # What the broker says, in the same thread

    def _on_connect(self, client: Client, userdata: object, flags: Any, reason: Any, properties: Any) -> None:
        if reason.is_failure:
            self._welcome = False
            self.state = f"refused by the broker: {reason}"
            if "protocol version" in str(reason).lower():
                new = self._protocol == MQTTProtocolVersion.MQTTv5
                self._protocol = MQTTProtocolVersion.MQTTv311 if new else MQTTProtocolVersion.MQTTv5
            return
        self._welcome, self._up, self.state = True, time.monotonic(), "connected"
        self._slots = min(IN_FLIGHT, getattr(properties, "ReceiveMaximum", IN_FLIGHT))
        self._most_bytes = min(MOST_BYTES, getattr(properties, "MaximumPacketSize", MOST_BYTES) - _ENVELOPE)
        for flight in self._flights.values():
            flight.mid, flight.due, flight.tries = None, self._up, 0
        self._spool.append(self._born())
        wanted = [(topic(self._site, self._device, "cmd"), 1)]
        if self._delivery == "collector":
            wanted.append((topic(self._site, self._device, "ack"), 1))
        client.subscribe(wanted)

    def _on_disconnect(self, client: Client, userdata: object, flags: Any, reason: Any, properties: Any) -> None:
        if not self.state.startswith("refused"):
            self.state = f"not connected: {reason}"

    def _on_subscribe(self, client: Client, userdata: object, mid: int, reasons: Any, properties: Any) -> None:
        failed = [str(reason) for reason in reasons if reason.is_failure]
        self.listening = not failed
        if failed:
            self.state = f"connected, but the broker refuses acknowledgements and commands: {', '.join(failed)}"

    def _on_publish(self, client: Client, userdata: object, mid: int, reason: Any, properties: Any) -> None:
        for sequence, flight in self._flights.items():
            if flight.mid == mid:
                flight.mid = None
                if reason.is_failure:
                    self.refused += 1
                    self.state = f"connected, but a message was refused: {reason}"
                elif self._delivery == "broker":
                    self._arrived.add(sequence)
                return

    def _on_message(self, client: Client, userdata: object, message: Any) -> None:
        try:
            if len(message.payload) > _MOST_RECEIVED:
                self.ignored += 1
            elif message.topic == topic(self._site, self._device, "ack"):
                self._acknowledged(message.payload)
            elif message.topic == topic(self._site, self._device, "cmd"):
                self._commanded(message.payload)
            else:
                self.ignored += 1
        except UnicodeDecodeError:  # paho decodes the topic when it is asked for
            self.ignored += 1

    def _acknowledged(self, payload: bytes) -> None:
        """Only what was sent can have arrived: a mistaken acknowledgement costs nothing that was not sent."""
        try:
            ack = decode(payload, Ack)
        except msgspec.DecodeError:
            self.ignored += 1
            return
        if ack.device != self._device or ack.spool != self._spool_id or self._delivery != "collector":
            self.ignored += 1
            return
        ranges = ack.ranges[:_MOST_RANGES]
        self._arrived |= {s for s in self._flights if any(first <= s <= last for first, last in ranges)}
        now = time.monotonic()
        for flight in self._flights.values():  # the collector is there: what it has not seen by now, it may not have
            if now - flight.sent > _AGAIN_S[0]:
                flight.due = now

    # Sending

    def _send(self, now: float) -> bool:
        """Forget what arrived and send what may be sent. False if the connection is to be given up."""
        if self._spool.id != self._spool_id:
            self._spool_id, self._flights, self._sent, self._arrived = self._spool.id, {}, {}, set()
            self._seen = -1
        if self._arrived:
            for sequence in self._arrived:
                self._flights.pop(sequence, None)
            self._spool.forget(self._arrived)
            self._arrived, self._seen = set(), -1
            if self.state.startswith("connected, but no collector"):
                self.state = "connected"
        for sequence, flight in list(self._flights.items()):
            if flight.mid is not None and now - flight.sent > _PUBACK_S:
                self.state = f"not connected: the broker did not acknowledge a message within {_PUBACK_S:g} s"
                return False
            if flight.mid is None and flight.due <= now and not self._repeat(sequence, flight, now):
                break
        appended = self._spool.appended
        if appended != self._seen and self._fill(now):
            self._seen = appended
        return True

    def _fill(self, now: float) -> bool:
        """Send new messages of every kind; False if there may be more for which there is no room now."""
        complete = True
        for kind, most in _LANES.items():
            free = most - sum(flight.kind == kind for flight in self._flights.values())
            free = min(free, self._free() - (kind != "status" and self._slots > 1))  # one place is the status's
            if free <= 0:
                complete = False
                continue
            found = self._spool.pending(kind, after=self._sent.get(kind, -1), limit=free)
            complete &= len(found) < free
            for held in found:
                self._sent[kind] = held.sequence
                if kind == "status":  # the ones before are not wanted any more
                    old = [s for s, f in self._flights.items() if f.kind == "status" and f.mid is None]
                    self._flights = {s: f for s, f in self._flights.items() if s not in old}
                mid = self._publish(held)
                if mid is not None:
                    self._flights[held.sequence] = _Flight(kind=kind, sent=now, due=now + _pause(1), mid=mid)
        return complete

    def _repeat(self, sequence: int, flight: _Flight, now: float) -> bool:
        """Send a message again; False if there is no room now."""
        if self._free() <= 0:
            return False
        held = self._spool.get(sequence)
        mid = None if held is None else self._publish(held)
        if mid is None:
            del self._flights[sequence]
            return True
        flight.mid, flight.sent, flight.tries = mid, now, flight.tries + 1
        flight.due = now + _pause(flight.tries)
        self.resent += 1
        if flight.tries > 2 and self.state == "connected" and self._delivery == "collector":
            self.state = "connected, but no collector acknowledges: messages wait"
        return True

    def _publish(self, held: Held) -> int | None:
        """The number of the packet; None for a message that nobody would take, which is given up."""
        if len(held.payload) > self._most_bytes or self._client is None:
            self._spool.refuse(held)
            return None
        where = topic(self._site, self._device, held.kind)
        info = self._client.publish(where, held.payload, qos=1, retain=held.kind == "status")
        return int(info.mid)

    def _free(self) -> int:
        return self._slots - sum(flight.mid is not None for flight in self._flights.values())

    def _all_sent(self) -> bool:
        """Whether the broker has everything that may be sent now."""
        return self._seen == self._spool.appended and all(flight.mid is None for flight in self._flights.values())

    def _maintain(self) -> None:
        now = time.monotonic()
        if now - self._maintained >= 1.0:
            self._maintained = now
            self._spool.maintain()


def _pause(tries: int) -> float:
    """Seconds until a message is sent again."""
    return min(_AGAIN_S[0] * 2.0 ** (max(tries, 1) - 1), _AGAIN_S[1]) * random.uniform(0.9, 1.1)
