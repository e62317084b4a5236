"""Uplink to the broker: one thread that connects, sends what the spool holds, and forgets what was acknowledged.

With `delivery = "collector"` a message is forgotten when the collector acknowledges that it is in its store, and on
nothing else. Until then it is sent again: at once after each connection, else after 30 s and then at growing intervals.
With `"broker"` the broker's acknowledgement is enough, which a broker may send before anything is on a disk.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from typing import Any, Literal

import msgspec
from paho.mqtt.client import Client, MQTTErrorCode

from eyas_device.errors import LinkError
from eyas_device.support.closing import Closing
from eyas_device.support.supervised import SupervisedThread
from eyas_device.telemetry.answers import RetainedAnswer
from eyas_device.telemetry.messages import MAX_BYTES, Ack, Header, decode, encode, topic
from eyas_device.telemetry.mqtt_client import Connector, LinkState, LinkStatus, Session
from eyas_device.telemetry.spool.spool import IN_FLIGHT, Held, Spool
from eyas_device.telemetry.tls import Security

Delivery = Literal["collector", "broker"]

_MAX_IN_FLIGHT = {"cmd/result": IN_FLIGHT, "event": 4, "profile": 1, "window": IN_FLIGHT, "status": IN_FLIGHT}
"""Kind -> messages that may wait for the collector, in sending order: the final status comes last."""
_SESSION_S = 86400
_MAX_RECEIVED = 64 << 10
_MAX_RANGES = 1000
_POLL_S = 0.1
_CONNACK_S = 10.0
_PUBACK_S = 30.0
_RESEND_S = (30.0, 600.0)
_BACKOFF_S = (1.0, 60.0)
_STABLE_S = 60.0
_CLOSE_S = 2.0
_ENVELOPE = 256
"""Maximum bytes of a packet besides its payload, with a topic of allowed names."""


class UplinkSettings(msgspec.Struct, frozen=True, kw_only=True):
    """Which broker a device connects to, and as whom."""

    host: str
    port: int = 1883
    site: str
    device: str
    delivery: Delivery = "collector"
    """Whose acknowledgement lets the device forget a message."""
    security: Security = Security()


class _InFlight(msgspec.Struct):
    """A message that was sent and that the collector has not acknowledged yet."""

    kind: str
    sent: float
    due: float
    tries: int = 1
    mid: int | None = None
    """Packet number until the broker acknowledges it."""


class Uplink(Closing):
    """Sends a spool to a broker, and receives acknowledgements and commands from it.

    It never stops trying: with jittered pauses of 1 to 60 s that start again after a connection of a minute.
    """

    def __init__(
        self,
        settings: UplinkSettings,
        spool: Spool,
        *,
        will: Header,
        make_status: Callable[[], Header],
        on_command: Callable[[bytes], None],
    ) -> None:
        """Prepare; `start` connects. Credentials are read at each connection: files that cannot be used now are
        reported in `status` and tried again.

        Args:
            settings: Broker, identity and credentials.
            spool: Messages to send.
            will: Status that the broker publishes if the connection breaks.
            make_status: Returns the status for each new connection.
            on_command: Called with each command's payload in the uplink's thread; must not block.

        """
        self.status = LinkStatus(since=time.monotonic())
        """State of the connection."""
        self.refused = 0
        """Messages that the broker refused."""
        self.ignored = 0
        """Received messages ignored: wrong topic, device or spool, or malformed."""
        self.listening = False
        """Whether the broker granted the subscriptions to acknowledgements and commands."""
        self.resent = 0
        """Messages that were sent again."""
        self.will = will
        """The last will of the next connection."""
        self._answer = RetainedAnswer(topic(settings.site, settings.device, "answer"))
        self._settings, self._spool = settings, spool
        self._make_status, self._on_command = make_status, on_command
        session = Session(
            client_id=f"eyas-{settings.site}-{settings.device}",
            expiry_s=_SESSION_S,
            receive_maximum=IN_FLIGHT,
            max_packet_bytes=_MAX_RECEIVED,
        )
        self._connector = Connector((settings.host, settings.port), session)
        self._client: Client | None = None
        self._in_flight: dict[int, _InFlight] = {}
        self._sent: dict[str, int] = {}
        """Kind -> the highest sequence that was sent."""
        self._acknowledged: set[int] = set()
        self._seen = -1
        self._receive_maximum, self._max_bytes = IN_FLIGHT, MAX_BYTES
        self._accepted: bool | None = None
        """Whether the broker accepted the connection; None: no CONNACK yet."""
        self._connected_at = 0.0
        """Time of the accepting CONNACK."""
        self._failures = 0
        self._closing = threading.Event()
        self.thread = SupervisedThread("uplink", self._run)

    def start(self) -> None:
        """Connect and send in a thread until `close`."""
        self.thread.start()

    @property
    def connected(self) -> bool:
        """Whether the broker accepted the connection and it stands."""
        return self._client is not None and bool(self._accepted)

    def publish_answer(self, payload: bytes, *, expires: bool) -> None:
        """Publish an output's answer, retained, in place of the one before: at once, and at each connection."""
        self._answer.expires, self._answer.payload = expires, payload

    def close(self) -> None:
        """Send what can be sent within two seconds, if there is a connection, and disconnect."""
        self._closing.set()
        self.thread.join(_CLOSE_S + 3.0)

    # The connection

    def _run(self) -> None:
        while not self._closing.is_set():
            self._serve_connection()
            if self._closing.is_set():
                return
            stable = self._connected_at and time.monotonic() - self._connected_at >= _STABLE_S
            self._failures = 0 if stable else self._failures + 1
            pause = min(_BACKOFF_S[0] * 2.0 ** min(self._failures - 1, 10), _BACKOFF_S[1]) if self._failures else 0.5
            until = time.monotonic() + pause * random.uniform(0.5, 1.0)
            while (left := until - time.monotonic()) > 0 and not self._closing.is_set():
                self.thread.progress()
                self._closing.wait(min(left, 1.0))

    def _serve_connection(self) -> None:
        """Connect, then send and receive until the connection ends."""
        self.thread.progress()
        self._reset()
        try:
            client = self._connect()
        except LinkError as error:
            self._set_state(LinkState.DISCONNECTED, str(error))
            return
        except (OSError, ValueError) as error:  # TLS's errors are OSErrors
            self._set_state(LinkState.DISCONNECTED, f"the broker cannot be reached ({error}); trying again")
            return
        self._client = client
        started = time.monotonic()
        close_by: float | None = None
        try:
            while client.loop(_POLL_S) == MQTTErrorCode.MQTT_ERR_SUCCESS and self._accepted is not False:
                now = time.monotonic()
                self.thread.progress()
                if self._accepted is None:
                    if now - started > _CONNACK_S or self._closing.is_set():
                        self._set_state(
                            LinkState.DISCONNECTED, "something listens but does not answer as an MQTT broker"
                        )
                        return
                    continue
                if not self._send(client, now):
                    return
                if self._closing.is_set():
                    close_by = close_by or now + _CLOSE_S
                    if now > close_by or self._all_sent():
                        client.disconnect()
                        return
        except (OSError, ValueError) as error:  # of a socket that closed in between
            self._set_state(LinkState.DISCONNECTED, str(error))
        finally:
            self._drop(client)

    def _reset(self) -> None:
        self._accepted, self._connected_at, self.listening = None, 0.0, False

    def _connect(self) -> Client:
        settings = self._settings
        client = self._connector.make_client()
        client.max_inflight_messages_set(IN_FLIGHT)
        client.will_set(topic(settings.site, settings.device, "status"), encode(self.will), qos=1, retain=True)
        settings.security.apply(client)
        client.on_connect, client.on_disconnect = self._on_connect, self._on_disconnect
        client.on_publish, client.on_subscribe = self._on_publish, self._on_subscribe
        client.on_message = self._on_message
        self._connector.connect(client)
        return client

    def _drop(self, client: Client) -> None:
        """Close the socket in whatever state it is; without a DISCONNECT before, the broker publishes the will."""
        self._client = None
        client.on_disconnect = None
        sock = client.socket()
        if sock is not None:
            sock.close()
        if self._accepted is None and not self._closing.is_set():
            self._connector.switch_version()
        if self.status.state not in (LinkState.REFUSED, LinkState.DISCONNECTED):
            self._set_state(LinkState.DISCONNECTED, "the connection was lost")

    def _set_state(self, state: LinkState, detail: str = "") -> None:
        same = self.status.state is state
        self.status = LinkStatus(state, detail, self.status.since if same else time.monotonic())

    # Callbacks of paho, in the same thread

    def _on_connect(self, client: Client, userdata: object, flags: Any, reason: Any, properties: Any) -> None:
        if reason.is_failure:
            self._accepted = False
            self._set_state(LinkState.REFUSED, str(reason))
            self._connector.switch_if_unsupported(reason)
            return
        self._accepted, self._connected_at = True, time.monotonic()
        self._set_state(LinkState.CONNECTED)
        self._receive_maximum = min(IN_FLIGHT, getattr(properties, "ReceiveMaximum", IN_FLIGHT))
        self._max_bytes = min(MAX_BYTES, getattr(properties, "MaximumPacketSize", MAX_BYTES) - _ENVELOPE)
        for message in self._in_flight.values():
            message.mid, message.due, message.tries = None, self._connected_at, 0
        self._answer.reset()
        self._spool.append(self._make_status())
        kinds = ["cmd", "ack"] if self._settings.delivery == "collector" else ["cmd"]
        client.subscribe([(topic(self._settings.site, self._settings.device, kind), 1) for kind in kinds])

    def _on_disconnect(self, client: Client, userdata: object, flags: Any, reason: Any, properties: Any) -> None:
        if self.status.state is not LinkState.REFUSED:
            self._set_state(LinkState.DISCONNECTED, str(reason))

    def _on_subscribe(self, client: Client, userdata: object, mid: int, reasons: Any, properties: Any) -> None:
        failed = [str(reason) for reason in reasons if reason.is_failure]
        self.listening = not failed
        if failed:
            self._set_state(LinkState.SUBSCRIPTION_REFUSED, ", ".join(failed))

    def _on_publish(self, client: Client, userdata: object, mid: int, reason: Any, properties: Any) -> None:
        if self._answer.acknowledge(mid):
            if reason.is_failure:
                self.refused += 1
                self._set_state(LinkState.MESSAGE_REFUSED, f"answer: {reason}")
            return
        for sequence, message in self._in_flight.items():
            if message.mid == mid:
                message.mid = None
                if reason.is_failure:
                    self.refused += 1
                    self._set_state(LinkState.MESSAGE_REFUSED, str(reason))
                elif self._settings.delivery == "broker":
                    self._acknowledged.add(sequence)
                return

    def _on_message(self, client: Client, userdata: object, message: Any) -> None:
        site, device = self._settings.site, self._settings.device
        try:
            if len(message.payload) > _MAX_RECEIVED:
                self.ignored += 1
            elif message.topic == topic(site, device, "ack"):
                self._on_ack(message.payload)
            elif message.topic == topic(site, device, "cmd"):
                self._on_command(message.payload)
            else:
                self.ignored += 1
        except UnicodeDecodeError:  # paho decodes the topic when it is asked for
            self.ignored += 1

    def _on_ack(self, payload: bytes) -> None:
        """Note the messages that the collector stored; an acknowledgement of what was not sent has no effect."""
        try:
            ack = decode(payload, Ack)
        except msgspec.DecodeError:
            self.ignored += 1
            return
        settings = self._settings
        if ack.device != settings.device or ack.spool not in self._spool.ids or settings.delivery != "collector":
            self.ignored += 1
            return
        ranges = ack.ranges[:_MAX_RANGES]
        self._acknowledged |= {s for s in self._in_flight if any(first <= s <= last for first, last in ranges)}
        now = time.monotonic()
        for message in self._in_flight.values():  # the collector is there: what it has not seen by now may be lost
            if now - message.sent > _RESEND_S[0]:
                message.due = now

    # Sending

    def _send(self, client: Client, now: float) -> bool:
        """Forget what was acknowledged and send what may be sent. False if the connection has to be dropped."""
        if self._acknowledged:
            for sequence in self._acknowledged:
                self._in_flight.pop(sequence, None)
            self._spool.forget(self._acknowledged)
            self._acknowledged, self._seen = set(), -1
            if self.status.state is LinkState.NO_COLLECTOR:
                self._set_state(LinkState.CONNECTED)
        for sequence, message in list(self._in_flight.items()):
            if message.mid is not None and now - message.sent > _PUBACK_S:
                detail = f"the broker did not acknowledge a message within {_PUBACK_S:g} s"
                self._set_state(LinkState.DISCONNECTED, detail)
                return False
            if message.mid is None and message.due <= now and not self._resend(client, sequence, message, now):
                break
        if self._answer.is_due(now) and self._free() > 0:
            self._answer.publish(client, now, mqtt5=self._connector.mqtt5)
        appended = self._spool.appended
        if appended != self._seen and self._send_new(client, now):
            self._seen = appended
        return True

    def _send_new(self, client: Client, now: float) -> bool:
        """Send new messages of every kind; False if there may be more that the broker cannot take now."""
        complete = True
        for kind, max_in_flight in _MAX_IN_FLIGHT.items():
            free = max_in_flight - sum(message.kind == kind for message in self._in_flight.values())
            reserved = kind != "status" and self._receive_maximum > 1  # one is kept for the status
            free = min(free, self._free() - reserved)
            if free <= 0:
                complete = False
                continue
            pending = self._spool.pending(kind, after=self._sent.get(kind, -1), limit=free)
            complete &= len(pending) < free
            for held in pending:
                self._sent[kind] = held.sequence
                if kind == "status":  # it replaces the statuses before
                    old = [s for s, m in self._in_flight.items() if m.kind == "status" and m.mid is None]
                    self._in_flight = {s: m for s, m in self._in_flight.items() if s not in old}
                mid = self._publish(client, held)
                if mid is not None:
                    due = now + _resend_pause(1)
                    self._in_flight[held.sequence] = _InFlight(kind=kind, sent=now, due=due, mid=mid)
        return complete

    def _resend(self, client: Client, sequence: int, message: _InFlight, now: float) -> bool:
        """Send a message again; False if the broker cannot take it now."""
        if self._free() <= 0:
            return False
        held = self._spool.get(sequence)
        mid = None if held is None else self._publish(client, held)
        if mid is None:
            del self._in_flight[sequence]
            return True
        message.mid, message.sent, message.tries = mid, now, message.tries + 1
        message.due = now + _resend_pause(message.tries)
        self.resent += 1
        if message.tries > 2 and self.status.state is LinkState.CONNECTED and self._settings.delivery == "collector":
            self._set_state(LinkState.NO_COLLECTOR, "messages wait")
        return True

    def _publish(self, client: Client, held: Held) -> int | None:
        """Send a message and return its packet number; None for one that the broker would not take: it is dropped."""
        if len(held.payload) > self._max_bytes:
            self._spool.refuse(held)
            return None
        name = topic(self._settings.site, self._settings.device, held.kind)
        return int(client.publish(name, held.payload, qos=1, retain=held.kind == "status").mid)

    def _free(self) -> int:
        waiting = sum(message.mid is not None for message in self._in_flight.values())
        return self._receive_maximum - waiting - self._answer.in_flight

    def _all_sent(self) -> bool:
        """Whether the broker acknowledged everything that may be sent now."""
        sent = self._seen == self._spool.appended and all(m.mid is None for m in self._in_flight.values())
        return sent and self._answer.is_done


def _resend_pause(tries: int) -> float:
    """Seconds until a message is sent again."""
    return min(_RESEND_S[0] * 2.0 ** (max(tries, 1) - 1), _RESEND_S[1]) * random.uniform(0.9, 1.1)
