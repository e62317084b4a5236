"""Uplink to the broker: one thread that connects, sends what the spool holds, and forgets what was acknowledged.

With `delivery = "collector"` a message is forgotten when the collector acknowledges that it is in its store, and on
nothing else. Until then it is sent again: at once after each connection, else after 30 s and then at growing intervals.
With `"broker"` the broker's acknowledgement is enough, which a broker may send before anything is on a disk.
"""

from __future__ import annotations

import random
import ssl
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import msgspec
from paho.mqtt.client import Client, MQTTErrorCode
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

from eyas_device.board.identity import machine
from eyas_device.errors import LinkError
from eyas_device.support.closing import Closing
from eyas_device.support.supervised import SupervisedThread
from eyas_device.telemetry.answers import RetainedAnswer
from eyas_device.telemetry.certificates import Certificate, parse_certificate
from eyas_device.telemetry.diagnosis import NOT_A_BROKER, Diagnosis, diagnose, other_identity, refused, unreachable
from eyas_device.telemetry.messages import MAX_BYTES, Ack, Header, Status, decode, encode, topic
from eyas_device.telemetry.mqtt_client import Connector, LinkState, LinkStatus, Session, client_id, disconnect_reason
from eyas_device.telemetry.outbox import Delivery, Outbox
from eyas_device.telemetry.packet_loop import PacketLoop
from eyas_device.telemetry.spool.spool import IN_FLIGHT, Held, Spool
from eyas_device.telemetry.tls import Security

_SESSION_S = 86400
_MAX_RECEIVED = 64 << 10
_TURN_S, _CLOSING_TURN_S = 0.5, 0.05
"""Longest wait for packets or messages."""
_CONNACK_S = 10.0
_BACKOFF_S = (1.0, 60.0)
_BLAMED_S = 1.0
"""Pause after a connection that ended because of a single message: it is no reason to wait."""
_STABLE_S = 60.0
_CLOSE_S = 2.0
_TAKEN_OVER = 0x8E
"""MQTT 5 reason code of a DISCONNECT: another client connected with the same client id."""
_UNEXPLAINED = 2
"""Short connections in a row after which another device of the same name is looked for."""
_TWIN_PAUSE_S = (60.0, 180.0)
"""Pause while another machine uses the name: each gets the connection for a while."""
_TWIN_GONE_S = 300.0
_CLOCK_JUMP_S = 60.0
_ENVELOPE = 256
_OVERHEAD = 10
"""Bytes of a PUBLISH packet besides topic and payload: fixed header, length of the topic, packet number, properties."""


class UplinkSettings(msgspec.Struct, frozen=True, kw_only=True):
    """Which broker a device connects to, and as whom."""

    host: str
    port: int = 1883
    site: str
    device: str
    delivery: Delivery = "collector"
    """Whose acknowledgement lets the device forget a message."""
    security: Security = Security()
    will_delay_s: int = 5
    """A connection that comes back within this time was not lost: the broker publishes no last will (MQTT 5)."""
    hint: str = ""
    """Topic of hints that another release is wanted; empty: none is subscribed to."""
    machine: str = msgspec.field(default_factory=machine)
    """Hash of the machine: tells two devices of one name apart."""

    @property
    def address(self) -> tuple[str, int]:
        """Host and port."""
        return self.host, self.port


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
        on_hint: Callable[[], None] = lambda: None,
    ) -> None:
        """Prepare; `start` connects. Credentials are read at each connection: files that cannot be used now are
        reported in `status` and tried again.

        Args:
            settings: Broker, identity and credentials.
            spool: Messages to send.
            will: Status that the broker publishes if the connection breaks.
            make_status: Returns the status for each new connection.
            on_command: Called with each command's payload in the uplink's thread; must not block.
            on_hint: Called for each new hint, whose payload nobody trusts, in the uplink's thread; must not block.

        """
        self.status = LinkStatus(since=time.monotonic())
        """State of the connection."""
        self.ignored = 0
        """Received messages ignored: wrong topic, device or spool, or malformed."""
        self.listening = False
        """Whether the broker granted the subscriptions to acknowledgements and commands."""
        self.will = will
        """The last will of the next connection; its time is when that one begins."""
        self.twin = ""
        """Who else uses the device's name, for people; empty if nobody was noticed."""
        self._answer = RetainedAnswer(topic(settings.site, settings.device, "answer"))
        self._settings, self._spool = settings, spool
        self._make_status, self._on_command, self._on_hint = make_status, on_command, on_hint
        self._last_hint = b""
        session = Session(
            client_id=client_id("device", settings.site, settings.device),
            expiry_s=_SESSION_S,
            receive_maximum=IN_FLIGHT,
            max_packet_bytes=_MAX_RECEIVED,
        )
        self._connector = Connector(settings.address, session)
        self._outbox = Outbox(spool, delivery=settings.delivery)
        self._client: Client | None = None
        self._max_packet = MAX_BYTES + _ENVELOPE
        self._accepted: bool | None = None
        """Whether the broker accepted the connection; None: no CONNACK yet."""
        self._connected_at = 0.0
        """Time of the accepting CONNACK."""
        self._other_identity: Diagnosis | None = None
        """That the credentials are another device's, if they are."""
        self._known = ""
        """Why the broker does not answer, since that was last looked for."""
        self._ended_by_broker = False
        self._failures = 0
        self._unexplained = 0
        """Accepted connections in a row that ended soon, not because of a message."""
        self._taken_over = 0
        """Connections in a row that ended because another client has the same id."""
        self._broker_certificate: Certificate | None = None
        self._subscription: int | None = None
        """Packet number of the subscription to acknowledgements and commands."""
        self._subscription_error = ""
        self._status_was_accepted = False
        """Whether the broker accepted a status on an earlier connection."""
        self._closing = threading.Event()
        self._packets = PacketLoop()
        spool.on_append = self._packets.wake
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
        self._packets.wake()

    def close(self) -> None:
        """Send what can be sent within two seconds, if there is a connection, and disconnect."""
        self._closing.set()
        self._packets.wake()
        self.thread.join(_CLOSE_S + 3.0)
        if not self.thread.alive:
            self._packets.close()

    @property
    def refused(self) -> int:
        """Messages that the broker refused."""
        return self._outbox.refused

    @property
    def resent(self) -> int:
        """Messages that were sent again."""
        return self._outbox.resent

    def faults(self) -> tuple[str, ...]:
        """Problems of the connection that people should know of, though messages may pass."""
        certificates = [*self._settings.security.certificates(), self._broker_certificate]
        warnings = [certificate.warning(time.time()) for certificate in certificates if certificate is not None]
        refusals = [f"the broker refused a message: {kind}: {why}" for kind, why in self._outbox.refusals.items()]
        return tuple(text for text in (self.twin, *refusals, *warnings) if text)

    # The connection

    def _run(self) -> None:
        while not self._closing.is_set():
            self._serve_connection()
            if self._closing.is_set():
                return
            self._pause(self._pause_s())

    def _pause_s(self) -> float:
        """Note how the connection ended, and return how long to wait for the next one."""
        now = time.monotonic()
        was_accepted, lasted_s = bool(self._connected_at), now - self._connected_at
        self._status_was_accepted |= self._outbox.status_accepted
        blamed = self._outbox.disconnected(now, by_broker=self._ended_by_broker)
        if was_accepted and blamed:
            return _BLAMED_S
        if was_accepted and lasted_s < _STABLE_S:
            self._unexplained += 1
        elif was_accepted:
            self._unexplained = self._taken_over = 0
        if self.twin:
            return random.uniform(*_TWIN_PAUSE_S)
        self._failures = 0 if was_accepted and lasted_s >= _STABLE_S else self._failures + 1
        pause = min(_BACKOFF_S[0] * 2.0 ** min(self._failures - 1, 10), _BACKOFF_S[1]) if self._failures else 0.5
        return pause * random.uniform(0.5, 1.0)

    def _pause(self, seconds: float) -> None:
        """Wait, but not on after the wall clock was set: certificates that were not valid yet may be now."""
        until, offset = time.monotonic() + seconds, time.time() - time.monotonic()
        while (left := until - time.monotonic()) > 0 and not self._closing.is_set():
            self.thread.progress()
            self._closing.wait(min(left, 1.0))
            if abs(time.time() - time.monotonic() - offset) > _CLOCK_JUMP_S:
                self._failures = 0
                return

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
            closed = isinstance(error, ssl.SSLError | TimeoutError | ConnectionResetError)
            known = unreachable(self._settings.address, error) if isinstance(error, OSError) else None
            detail = str(known or (self._diagnosis() if closed else "") or f"the broker cannot be reached ({error})")
            self._set_state(LinkState.DISCONNECTED, detail)
            return
        self._client = client
        started = time.monotonic()
        close_by: float | None = None
        try:
            while (code := self._turn(client)) == MQTTErrorCode.MQTT_ERR_SUCCESS and self._accepted is not False:
                now = time.monotonic()
                self.thread.progress()
                if self._accepted is None:
                    if now - started > _CONNACK_S or self._closing.is_set():
                        return
                    continue
                if problem := self._send(client, now):
                    self._set_state(LinkState.DISCONNECTED, problem)
                    return
                self._refresh_state(now)
                if self._connector.should_try_mqtt5():
                    return
                if self._closing.is_set():
                    close_by = close_by or now + _CLOSE_S
                    if now > close_by or (self._outbox.all_sent and self._answer.is_done):
                        client.disconnect()
                        return
            self._ended_by_broker = code in (MQTTErrorCode.MQTT_ERR_CONN_LOST, MQTTErrorCode.MQTT_ERR_PROTOCOL)
        except (OSError, ValueError) as error:  # of a socket that closed in between
            self._ended_by_broker = True
            self._set_state(LinkState.DISCONNECTED, str(error))
        finally:
            self._drop(client)

    def _turn(self, client: Client) -> MQTTErrorCode:
        return self._packets.turn(client, _CLOSING_TURN_S if self._closing.is_set() else _TURN_S)

    def _reset(self) -> None:
        self._accepted, self._connected_at, self.listening = None, 0.0, False
        self._ended_by_broker, self._subscription_error = False, ""

    def _connect(self) -> Client:
        settings = self._settings
        client = self._connector.make_client()
        client.max_inflight_messages_set(IN_FLIGHT)
        will = Properties(PacketTypes.WILLMESSAGE) if self._connector.client_mqtt5 else None
        if will is not None:
            will.WillDelayInterval = settings.will_delay_s
        status = topic(settings.site, settings.device, "status")
        last = msgspec.structs.replace(self.will, time=time.time())
        client.will_set(status, encode(last), qos=1, retain=True, properties=will)
        settings.security.apply(client)
        self._other_identity = other_identity(settings.device, settings.security)
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
        if self._closing.is_set():
            return
        if self._accepted is None:
            self._connector.not_answered()
            # Without TLS, a broker of before MQTT 5 is the likelier cause: that is tried first.
            if self._settings.security.uses_tls or self._connector.mqtt5:
                self._known = self._diagnosis()
            detail = self._known or NOT_A_BROKER.problem
            self._set_state(LinkState.DISCONNECTED, detail)
        elif self.twin:
            self._set_state(LinkState.DISCONNECTED, self.twin)
        elif self.status.state not in (LinkState.REFUSED, LinkState.DISCONNECTED):
            self._set_state(LinkState.DISCONNECTED, "the connection was lost")

    def _diagnosis(self) -> str:
        """Why the broker did not accept the connection, as far as another one can tell."""
        self.thread.progress()
        if self._closing.is_set():
            return ""
        return str(diagnose(self._settings.address, self._settings.security) or "")

    def _set_state(self, state: LinkState, detail: str = "") -> None:
        same = self.status.state is state
        self.status = LinkStatus(state, detail, self.status.since if same else time.monotonic())

    def _refresh_state(self, now: float) -> None:
        """Set the state of an accepted connection from what is wrong with it now."""
        if self.twin and now - self._connected_at > _TWIN_GONE_S:
            self.twin = ""
        refusals = "; ".join(f"{kind}: {why}" for kind, why in self._outbox.refusals.items())
        if self.twin:
            self._set_state(LinkState.NAME_IN_USE, self.twin)
        elif self._subscription_error:
            self._set_state(LinkState.SUBSCRIPTION_REFUSED, self._subscription_error)
        elif refusals:
            other = f"; {self._other_identity}" if self._other_identity else ""
            self._set_state(LinkState.MESSAGE_REFUSED, f"{refusals}{other}")
        elif self._outbox.unanswered:
            self._set_state(LinkState.NO_COLLECTOR, "messages wait")
        elif self.status.state is not LinkState.CONNECTED:
            self._set_state(LinkState.CONNECTED)

    # Callbacks of paho, in the same thread

    def _on_connect(self, client: Client, userdata: object, flags: Any, reason: Any, properties: Any) -> None:
        if reason.is_failure:
            self._accepted = False
            self._set_state(LinkState.REFUSED, str(refused(reason, self._settings.security)))
            self._connector.switch_if_unsupported(reason)
            return
        now = time.monotonic()
        self._accepted, self._connected_at = True, now
        self._connector.accepted()
        self._known = ""
        self._set_state(LinkState.CONNECTED)
        self._max_packet = getattr(properties, "MaximumPacketSize", MAX_BYTES + _ENVELOPE)
        self._answer.reset()
        self._outbox.connected(receive_maximum=getattr(properties, "ReceiveMaximum", IN_FLIGHT), now=now)
        site, device = self._settings.site, self._settings.device
        if self._unexplained >= _UNEXPLAINED or self.twin:
            # Before the own status: the retained one says who was here meanwhile. Only then, because some brokers hang
            # up on a client that subscribes to what it may not read.
            client.subscribe(topic(site, device, "status"), 1)
        self._note_broker_certificate(client)
        self._spool.append(self._make_status())
        kinds = ["cmd", "ack"] if self._settings.delivery == "collector" else ["cmd"]
        _, self._subscription = client.subscribe([(topic(site, device, kind), 1) for kind in kinds])
        if self._settings.hint and self._unexplained < _UNEXPLAINED:  # the same brokers; polling finds releases, too
            client.subscribe(self._settings.hint, 1)

    def _note_broker_certificate(self, client: Client) -> None:
        connection = client.socket()
        if isinstance(connection, ssl.SSLSocket):
            with suppress(ValueError):
                der = connection.getpeercert(binary_form=True) or b""
                self._broker_certificate = parse_certificate(der, "the broker's certificate")

    def _on_disconnect(self, client: Client, userdata: object, flags: Any, reason: Any, properties: Any) -> None:
        if getattr(reason, "value", 0) == _TAKEN_OVER:
            self._taken_over += 1
            self._unexplained = _UNEXPLAINED
            if self._taken_over > 1:
                self._note_twin("")
        if self._accepted:  # else `_drop` finds out why
            self._set_state(LinkState.DISCONNECTED, disconnect_reason(reason))

    def _on_subscribe(self, client: Client, userdata: object, mid: int, reasons: Any, properties: Any) -> None:
        if mid != self._subscription:
            return
        failed = [str(reason) for reason in reasons if reason.is_failure]
        self.listening, self._subscription_error = not failed, ", ".join(failed)

    def _on_publish(self, client: Client, userdata: object, mid: int, reason: Any, properties: Any) -> None:
        if not self._answer.acknowledge(mid):
            self._outbox.on_puback(mid, reason, time.monotonic())
            return
        self._outbox.refusals.pop("answer", None)
        if reason.is_failure:
            self._outbox.refused += 1
            self._outbox.refusals["answer"] = str(reason)

    def _on_message(self, client: Client, userdata: object, message: Any) -> None:
        site, device = self._settings.site, self._settings.device
        try:
            if len(message.payload) > _MAX_RECEIVED:
                self.ignored += 1
            elif message.topic == topic(site, device, "ack"):
                self._on_ack(message.payload)
            elif message.topic == topic(site, device, "cmd"):
                self._on_command(message.payload)
            elif message.topic == topic(site, device, "status"):
                self._on_status(message.payload)
            elif self._settings.hint and message.topic == self._settings.hint:
                self._on_desired(message.payload)
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
        if ack.device != self._settings.device or not self._outbox.on_ack(ack, time.monotonic()):
            self.ignored += 1

    def _on_desired(self, payload: bytes) -> None:
        """Pass a hint on, unless it is empty or the one of the connection before: it is retained."""
        if payload and payload != self._last_hint:
            self._last_hint = payload
            self._on_hint()

    def _on_status(self, payload: bytes) -> None:
        """Notice another device of this name by its status where this device's own should be."""
        try:
            status = decode(payload, Status)
        except msgspec.DecodeError:
            return
        other_machine = bool(status.machine) and status.machine != self._settings.machine
        other_agent = bool(status.spool) and status.spool not in self._spool.ids
        if self._status_was_accepted and (other_machine or other_agent):
            self._note_twin(status.machine)

    def _note_twin(self, other: str) -> None:
        name = f"{self._settings.site}/{self._settings.device}"
        if other and other == self._settings.machine:
            who = "another agent on this machine"
        elif other:
            who = f"another machine ({other})"
        elif self.twin:
            return
        else:
            who = "another machine"
        self.twin = f"{who} uses the name {name}; give each device a [device] name of its own"

    # Sending

    def _send(self, client: Client, now: float) -> str:
        """Send what may be sent; return why the connection has to be dropped, empty if it need not."""
        self._outbox.others = self._answer.in_flight
        problem = self._outbox.send(now, lambda held: self._publish(client, held))
        if self._answer.is_due(now) and self._outbox.free > 0:
            self._answer.publish(client, now, mqtt5=self._connector.client_mqtt5)
        return problem

    def _publish(self, client: Client, held: Held) -> int | None:
        """Send a message and return its packet number; None for one that is too long for the broker."""
        name = topic(self._settings.site, self._settings.device, held.kind)
        packet = len(held.payload) + len(name.encode()) + _OVERHEAD
        if len(held.payload) > MAX_BYTES or packet > self._max_packet:
            return None
        return int(client.publish(name, held.payload, qos=1, retain=held.kind == "status").mid)
