"""The collector: stores what devices send, and acknowledges only what is stored.

Two threads. One owns the connection: it gathers received messages, and acknowledges committed ones, to the broker one
by one and to the devices as ranges of sequence numbers. The other (`Writer`) validates and commits in batches. Several
collectors divide a fleet's messages by a shared subscription. A killed collector loses nothing: uncommitted messages
were not acknowledged and are sent again, and duplicates are stored once.
"""

from __future__ import annotations

import random
import select
import signal
import socket
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

from paho.mqtt.client import Client

from eyas_device.errors import LinkError
from eyas_device.support.closing import Closing
from eyas_device.support.redact import redact
from eyas_device.telemetry.diagnosis import refused
from eyas_device.telemetry.messages import KINDS, Ack, encode, topic
from eyas_device.telemetry.mqtt_client import Connector, LinkState, LinkStatus, Session, disconnect_reason
from eyas_host.fleet.broker.client import BrokerAccess, end_session
from eyas_host.fleet.collect.group import Group, check_names
from eyas_host.fleet.collect.settings import CollectorReport, CollectorSettings
from eyas_host.fleet.collect.writer import Committed, Received, Writer
from eyas_host.fleet.drift.notify import Notifier
from eyas_host.fleet.drift.service import DriftService
from eyas_host.fleet.store.database import Store
from eyas_host.fleet.store.ranges import as_ranges
from eyas_host.fleet.store.validate import MessageId

_SESSION_TAKEN_OVER = 0x8E
"""MQTT 5 reason code: another client with the same id connected."""
_SESSION_S = 600
"""How long the broker queues messages for an absent collector; devices resend what it drops after that."""
_CONNACK_S = 5.0
_LINGER_S = 0.01
"""Minimum time to gather messages before they go to the writer, unless there are many."""
_TICK_S = 0.2
_RETRY_S = (0.25, 30.0)
_STABLE_S = 60.0
"""A connection that lasted this long was stable and resets the backoff."""
_ACK_COUNT = 4
"""Pending sequence numbers of a spool after which they are acknowledged although more messages wait."""
_ACK_DELAY_S = 5.0
"""Max. delay of an acknowledgement while messages keep arriving; devices resend after 30 s."""
_UNSTABLE = 3
"""Unstable connections in a row after which a second collector of the same name is suspected."""
_MAX_INFLIGHT = 500
"""Max. in-flight acknowledgements to devices."""
_STOP_S = 15.0
"""Time limit to commit and acknowledge the remaining messages after `stop`."""
_LEAVE_S, _QUIET_S = 5.0, 0.3
"""Time limit to receive what the broker has queued for this collector after `stop`, and the silence that ends it."""


class Collector(Closing):
    """Collects until `stop`, which may be called from any thread and from signal handlers."""

    def __init__(
        self,
        store: Store,
        access: BrokerAccess,
        settings: CollectorSettings | None = None,
        on_report: Callable[[CollectorReport], None] = lambda report: None,
    ) -> None:
        """Prepare; `run` connects. Raises `LinkError` for an invalid address, name or group, or invalid credentials."""
        settings = settings or CollectorSettings()
        self._group = Group(settings.group, settings.name, store.id)
        self.status = LinkStatus()
        self._access, self._settings, self._on_report = access, settings, on_report
        self._opened = False
        """Whether the last attempt reached a listening server."""
        self._max_uncommitted = settings.receive_maximum
        self._batch = min(max(1, settings.receive_maximum // 2), settings.batch)
        session = Session(
            client_id=self._group.client_id,
            expiry_s=_SESSION_S,
            receive_maximum=settings.receive_maximum,
            manual_ack=True,
        )
        self._connector = Connector(access.address[:2], session)
        self._client = self._make_client()
        self._stopping = False
        self._left = False
        """Whether the broker has ended this collector's subscriptions."""
        self._connected = False
        self._was_connected = False
        self._attempt_at = time.monotonic()
        """Time of the last connection attempt."""
        self._unstable = 0
        """Unstable connections in a row."""
        self._epoch = 0
        """Number of the connection: packet identifiers of an earlier one belong to other messages now."""
        self._gathered: list[Received] = []
        self._uncommitted = self._received = 0
        self._pending_acks: OrderedDict[tuple[str, str, str], tuple[float, list[int]]] = OrderedDict()
        """(site, device, spool) -> since when, and the sequence numbers to acknowledge."""
        self._inflight, self._max_inflight = 0, _MAX_INFLIGHT
        self._committed: deque[Committed] = deque()
        self._wake_read, self._wake_write = socket.socketpair()
        self._wake_read.setblocking(False)
        self._writer = Writer(store, self._on_commit, batch=settings.batch)
        self._failure: Exception | None = None
        self._reported = (time.monotonic(), 0)

    def stop(self) -> None:
        """Commit and acknowledge the remaining messages, then return from `run`."""
        self._stopping = True

    def run(self) -> None:
        """Collect until `stop`.

        Raises `LinkError` if another collector of the same name takes the session over, `StoreError` if the store's
        tables are damaged.
        """
        while not self._stopping and self._failure is None:
            self._failure = self._writer.failure
            if self._client.socket() is None:
                self._connect()
                self._attempt_at = time.monotonic()
            else:
                self._step(_TICK_S)
                self._check_connack()
            if self._client.socket() is None:
                self._reset()
        self._finish()
        if self._failure is not None:
            raise self._failure

    def close(self) -> None:
        """End the writer; uncommitted messages were not acknowledged and are sent again.

        A collector that an error ended leaves its group, too; what the broker had sent it stays in the session for one
        that starts again.
        """
        self._writer.close()
        in_order = self._left
        if self._connected and not in_order:
            with suppress(OSError, ValueError):
                self._leave_at_once()
        if self._client.socket() is not None:
            end_session(self._client, mqtt5=in_order and self._connector.client_mqtt5)
            self._client.loop_write()
        self._wake_read.close()
        self._wake_write.close()

    def report(self) -> CollectorReport:
        """Report the current progress."""
        now, stored = time.monotonic(), self._writer.stored
        since, before = self._reported
        self._reported = (now, stored)
        return CollectorReport(
            time=round(time.time(), 3),
            state=self.status.state.name.lower(),
            detail=self.status.detail,
            store_error=self._writer.error,
            warning=self._group.warning,
            messages=stored,
            duplicates=self._writer.duplicates,
            quarantined=self._writer.quarantined,
            per_second=round((stored - before) / max(now - since, 1e-3), 1),
            waiting=self._uncommitted,
            lag_s=round(self._writer.take_lag(), 3),
        )

    def _make_client(self) -> Client:
        client = self._connector.make_client()
        self._access.apply(client)
        client.max_inflight_messages_set(_MAX_INFLIGHT)
        client.on_connect = self._on_connect
        client.on_subscribe = self._on_subscribe
        client.on_disconnect = self._on_disconnect
        client.on_message = self._on_message
        client.on_publish = self._on_publish
        client.on_unsubscribe = self._on_unsubscribe
        # With this hook, packets wait for loop_write: a batch of acknowledgements is one write.
        client.on_socket_register_write = lambda *_: None
        return client

    def _connect(self) -> None:
        self._epoch += 1
        self._was_connected = self._opened = False
        try:
            self._connector.connect(self._client)
            self._opened = True
        except (OSError, ValueError) as error:
            self._set_state(LinkState.DISCONNECTED, f"{self._access.describe(error)}; trying again")

    def _set_state(self, state: LinkState, detail: str = "") -> None:
        self.status = LinkStatus(state, detail)

    def _check_connack(self) -> None:
        """End a connection without a CONNACK: some MQTT 3.1.1 brokers ignore an MQTT 5 CONNECT."""
        if (
            not self._was_connected
            and time.monotonic() - self._attempt_at > _CONNACK_S
            and (sock := self._client.socket())
        ):
            sock.close()
            self._client = self._make_client()  # without a socket: `run` resets and connects again

    def _reset(self) -> None:
        """Drop the state of the lost connection and back off; unacknowledged messages are sent again."""
        self._connected = False
        self._pending_acks.clear()
        self._flush()
        if self._opened and not self._was_connected and self.status.state is not LinkState.REFUSED:
            self._connector.not_answered()
            version = "5" if self._connector.mqtt5 else "3.1.1"
            tls = self._access.address.tls
            known = self._access.describe("") if tls or self._connector.mqtt5 else ""
            self._set_state(LinkState.DISCONNECTED, f"{known or 'no reply'}; trying MQTT {version}")
        # A new client has no half-read packet and no acknowledgement of the lost connection.
        self._client = self._make_client()
        self._unstable = 0 if time.monotonic() - self._attempt_at > _STABLE_S else self._unstable + 1
        if self._was_connected and self._unstable > _UNSTABLE:
            name = self._settings.name
            self._set_state(
                LinkState.DISCONNECTED,
                f"lost repeatedly; does another collector have the name {name!r} in this group? (--name)",
            )
        low, high = _RETRY_S
        self._wait(min(low * 2 ** min(self._unstable, 10), high) * random.uniform(0.5, 1.0))

    def _wait(self, seconds: float) -> None:
        """Wait, acknowledging commits meanwhile."""
        end = time.monotonic() + seconds
        while not self._stopping and self._writer.failure is None and (left := end - time.monotonic()) > 0:
            select.select([self._wake_read], [], [], min(left, _TICK_S))
            self._acknowledge()
            self._report_if_due()

    def _step(self, timeout: float) -> None:
        """Read and write what is ready, waiting at most `timeout` seconds."""
        client = self._client
        sock = client.socket()
        if sock is None:
            return
        room = self._has_room
        pending = bool(room and getattr(sock, "pending", None) and sock.pending())  # decrypted by TLS already
        if self._gathered:
            timeout = min(timeout, _LINGER_S)
        readers = [self._wake_read, sock] if room else [self._wake_read]
        writers = [sock] if client.want_write() else []
        ready, writable, _ = select.select(readers, writers, [], 0 if pending else timeout)
        if sock in ready or pending:
            self._read()
        if self._gathered and time.monotonic() - self._gathered[0].at >= _LINGER_S:
            self._flush()
        self._acknowledge()
        if client.want_write() or writable:
            client.loop_write()
        client.loop_misc()
        self._report_if_due()

    def _read(self) -> None:
        """Read packets until there are none or a batch is full."""
        for _ in range(self._max_uncommitted):
            before = self._uncommitted
            self._client.loop_read()
            if len(self._gathered) >= self._batch:
                self._flush()
            if self._uncommitted == before or not self._has_room:
                return

    @property
    def _has_room(self) -> bool:
        """Whether more may be read; TCP holds back what a broker sends beyond the receive maximum (mosquitto 2.0)."""
        return self._uncommitted < self._max_uncommitted

    def _flush(self) -> None:
        if self._gathered:
            self._writer.put(self._gathered)
            self._gathered = []

    def _on_commit(self, committed: Committed) -> None:
        """Called by the writer's thread."""
        self._committed.append(committed)
        self._wake_write.send(b"\0")

    def _acknowledge(self) -> None:
        """Acknowledge committed messages: to the broker at once, to devices in ranges."""
        with suppress(BlockingIOError):
            self._wake_read.recv(4096)
        now = time.monotonic()
        mids: list[int] = []
        while self._committed:
            committed = self._committed.popleft()
            self._uncommitted -= committed.count
            if self._connected and committed.epoch == self._epoch:
                mids += committed.mids
                for message_id in committed.ids:
                    self._queue_ack(message_id, now)
        if not self._connected:
            return
        idle = self._uncommitted == 0
        while self._pending_acks and self._inflight < self._max_inflight:
            if not idle and now - next(iter(self._pending_acks.values()))[0] < _ACK_DELAY_S:
                break
            self._send_ack(*self._pending_acks.popitem(last=False))
        # The broker comes last: a collector killed in between receives the messages again and acknowledges them then.
        for mid in mids:
            self._client.ack(mid, 1)

    def _queue_ack(self, message_id: MessageId, now: float) -> None:
        key = (message_id.site, message_id.device, message_id.spool)
        pending = self._pending_acks.get(key)
        if pending is None:
            self._pending_acks[key] = (now, [message_id.sequence])
        else:
            pending[1].append(message_id.sequence)
            if len(pending[1]) >= _ACK_COUNT and self._inflight < self._max_inflight:
                self._send_ack(key, self._pending_acks.pop(key))

    def _send_ack(self, key: tuple[str, str, str], pending: tuple[float, Iterable[int]]) -> None:
        site, device, spool = key
        ack = Ack(device=device, spool=spool, ranges=tuple(as_ranges(pending[1])))
        self._inflight += 1
        self._client.publish(topic(site, device, "ack"), encode(ack), qos=1)

    def _finish(self) -> None:
        """After `stop`, leave the group, and commit and acknowledge the remaining messages."""
        self._leave()
        self._flush()
        self._writer.finish()
        end = time.monotonic() + _STOP_S
        while (self._uncommitted or self._pending_acks or self._client.want_write()) and time.monotonic() < end:
            if self._writer.failure is not None:
                self._failure = self._writer.failure
                break
            if self._client.socket() is None:
                self._pending_acks.clear()
                if not self._uncommitted:
                    break
                self._wait_for_writer()
                continue
            select.select([self._wake_read], [], [], 0.02)
            self._acknowledge()
            self._client.loop_write()
        self._on_report(self.report())

    def _leave(self) -> None:
        """Unsubscribe, so that the broker keeps no share for this collector, and receive what it has queued for it."""
        if not self._connected or self._failure is not None:
            return
        self._unsubscribe()
        end, quiet, received = time.monotonic() + _LEAVE_S, time.monotonic(), self._received
        while (now := time.monotonic()) < end and self._client.socket() is not None and self._writer.failure is None:
            self._step(0.05)
            if self._received != received or not self._left:
                quiet, received = now, self._received
            elif now - quiet > _QUIET_S:
                break

    def _leave_at_once(self) -> None:
        """Unsubscribe without storing what arrives meanwhile: the broker keeps that for the session."""
        self._unsubscribe()
        end = time.monotonic() + _LEAVE_S
        while not self._left and (sock := self._client.socket()) is not None and (left := end - time.monotonic()) > 0:
            self._client.loop_write()
            if select.select([sock], [], [], min(left, _TICK_S))[0] or getattr(sock, "pending", int)():
                self._client.loop_read()

    def _unsubscribe(self) -> None:
        self._client.unsubscribe([*self._subscriptions(), self._group.topic])

    def _subscriptions(self) -> list[str]:
        prefix = f"$share/{self._settings.group}/" if self._connector.client_mqtt5 else ""
        return [f"{prefix}eyas/+/+/{kind}" for kind in KINDS]

    def _wait_for_writer(self) -> None:
        select.select([self._wake_read], [], [], _TICK_S)
        self._acknowledge()

    def _report_if_due(self) -> None:
        if time.monotonic() - self._reported[0] >= self._settings.report_s:
            self._on_report(self.report())

    def _on_connect(self, client: Client, userdata: object, flags: Any, reason: Any, properties: Any) -> None:
        if reason.is_failure:
            detail = str(refused(reason, self._access.security))
            if self._connector.switch_if_unsupported(reason):
                detail = "no MQTT 5; trying 3.1.1, without shared subscriptions"
            self._set_state(LinkState.REFUSED, detail)
            return
        self._connected = self._was_connected = True  # queued messages arrive before SUBACK
        self._connector.accepted()
        self._inflight = 0
        self._max_inflight = min(_MAX_INFLIGHT, getattr(properties, "ReceiveMaximum", _MAX_INFLIGHT))
        mqtt5 = self._connector.client_mqtt5
        client.subscribe([(name, _options(mqtt5)) for name in (*self._subscriptions(), self._group.topic)])

    def _on_subscribe(self, client: Client, userdata: object, mid: int, reasons: Any, properties: Any) -> None:
        failed = [str(reason) for reason in reasons if reason.is_failure]
        if failed:
            self._set_state(LinkState.SUBSCRIPTION_REFUSED, failed[0])
        else:
            self._set_state(LinkState.CONNECTED)
        self._tell_group(self._group.greeting)

    def _on_unsubscribe(self, client: Client, userdata: object, mid: int, reasons: Any, properties: Any) -> None:
        self._left = True

    def _tell_group(self, message: bytes) -> None:
        self._inflight += 1
        self._client.publish(self._group.topic, message, qos=0)

    def _on_disconnect(self, client: Client, userdata: object, flags: Any, reason: Any, properties: Any) -> None:
        self._connected = False
        if getattr(reason, "value", 0) == _SESSION_TAKEN_OVER:
            self._failure = LinkError(
                f"another collector of the group {self._settings.group!r} is called {self._settings.name!r}: "
                "each needs its own --name"
            )
        elif self.status.state is not LinkState.REFUSED:
            self._set_state(LinkState.DISCONNECTED, f"{disconnect_reason(reason)}; trying again")

    def _on_publish(self, client: Client, userdata: object, mid: int, reason: Any, properties: Any) -> None:
        self._inflight -= 1
        if reason.is_failure:
            self._set_state(LinkState.MESSAGE_REFUSED, str(reason))

    def _on_message(self, client: Client, userdata: object, message: Any) -> None:
        if message.topic == self._group.topic:
            if message.qos:
                client.ack(message.mid, 1)
            if (answer := self._group.on_message(message.payload)) is not None:
                self._tell_group(answer)
            return
        self._received += 1
        if message.qos == 0 and not self._has_room:
            return  # QoS 0 may be dropped
        self._uncommitted += 1
        mid = message.mid if message.qos else 0
        self._gathered.append(Received(self._epoch, mid, message.topic, message.payload, time.monotonic()))


def collect(
    store_url: str,
    access: BrokerAccess,
    settings: CollectorSettings | None = None,
    on_report: Callable[[CollectorReport], None] = lambda report: None,
    on_start: Callable[[str], None] = lambda text: None,
) -> None:
    """Collect until SIGTERM or SIGINT; see `Collector`. `on_start` receives from where and into what, and alarms.

    Raises `StoreError`, `LinkError` and `DriftError`.
    """
    settings = settings or CollectorSettings()
    check_names(settings.group, settings.name)
    where = redact(store_url)
    notifier = Notifier(access, settings.webhook, settings.page_url)
    page = Path(settings.page) if settings.page else None
    with (
        Store(store_url) as store,
        DriftService(store_url, settings.drift_s, notifier, on_start, page=page) if settings.drift_s else nullcontext(),
        Collector(store, access, settings, on_report) as collector,
    ):
        before = {kind: signal.signal(kind, lambda *_: collector.stop()) for kind in (signal.SIGTERM, signal.SIGINT)}
        try:
            on_start(f"collecting from {access.address} into {where}, as {settings.name} of the group {settings.group}")
            collector.run()
        finally:
            for kind, handler in before.items():
                signal.signal(kind, handler)


def _options(mqtt5: bool) -> Any:
    from paho.mqtt.subscribeoptions import SubscribeOptions

    return SubscribeOptions(qos=1) if mqtt5 else 1
