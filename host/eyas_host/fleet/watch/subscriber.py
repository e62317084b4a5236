"""The subscriber of the live view: receives all messages of a fleet and reconnects by itself."""

from __future__ import annotations

import queue
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from typing import Any
from uuid import uuid4

import msgspec
from paho.mqtt.client import Client

from eyas_device.support.closing import Closing
from eyas_device.telemetry.diagnosis import refused
from eyas_device.telemetry.messages import KINDS
from eyas_device.telemetry.mqtt_client import Connector, LinkState, LinkStatus, Session, disconnect_reason
from eyas_host.fleet.broker.client import BrokerAccess

_CONNACK_S = 5.0
_RECONNECT_S = (1, 15)
_QUEUE_SIZE = 20_000
"""Max. queued messages; more are dropped and counted, which a live view can afford."""


class BrokerMessage(msgspec.Struct, frozen=True):
    """A message as received from the broker."""

    topic: str
    payload: bytes
    retained: bool


class Subscriber(Closing):
    """Receives all messages of a fleet and keeps trying to connect; `status` is the state of the connection.

    Raises `LinkError` for an invalid address or invalid credentials.
    """

    def __init__(self, access: BrokerAccess) -> None:
        self.status = LinkStatus()
        self.dropped = 0
        self.was_connected = False
        """Whether messages could be received at any time."""
        self._access = access
        self._queue: queue.Queue[BrokerMessage] = queue.Queue(_QUEUE_SIZE)
        self._connector = Connector(access.address[:2], Session(client_id=f"eyas-watch-{uuid4().hex[:12]}"))
        self._restart = self._accepted = self._opened = False
        self._pause_s = float(_RECONNECT_S[0])
        self._client = self._start()

    def take(self, timeout: float) -> Iterator[BrokerMessage]:
        """Yield received messages, waiting at most `timeout` seconds for the first."""
        waited = time.monotonic() - self._started
        if self._opened and not (self._accepted or self._restart) and waited > _CONNACK_S:
            self._give_up_attempt()
        if self._restart and waited > self._pause_s:
            self._pause_s = min(2 * self._pause_s, _RECONNECT_S[1])
            self._restart = self._accepted = self._opened = False
            self._stop()
            self._client = self._start()
        with suppress(queue.Empty):
            yield self._queue.get(timeout=timeout)
            for _ in range(_QUEUE_SIZE):
                yield self._queue.get_nowait()

    def close(self) -> None:
        """Disconnect."""
        self._stop()

    def _start(self) -> Client:
        self._started = time.monotonic()
        client = self._connector.make_client()
        self._access.apply(client)
        client.reconnect_delay_set(*_RECONNECT_S)
        client.on_connect = self._on_connect
        client.on_socket_open = self._on_socket_open
        client.on_connect_fail = self._on_connect_fail
        client.on_disconnect = self._on_disconnect
        client.on_subscribe = self._on_subscribe
        client.on_message = self._on_message
        self._connector.connect_async(client)
        client.loop_start()
        return client

    def _stop(self) -> None:
        self._client.disconnect()
        self._client.loop_stop()

    def _on_socket_open(self, client: Client, userdata: object, sock: object) -> None:
        self._opened = True

    def _on_connect(self, client: Client, userdata: object, flags: Any, reason: Any, properties: Any) -> None:
        if reason.is_failure:
            self.status = LinkStatus(LinkState.REFUSED, str(refused(reason, self._access.security)))
            self._restart = self._connector.switch_if_unsupported(reason)
            self._opened = False
            return
        self._connector.accepted()
        self._accepted, self._pause_s = True, float(_RECONNECT_S[0])
        client.subscribe([(f"eyas/+/+/{kind}", 0) for kind in KINDS])

    def _on_connect_fail(self, client: Client, userdata: object) -> None:
        error = sys.exc_info()[1]
        reason = self._access.describe(error) if error else "the broker cannot be reached"
        self.status = LinkStatus(LinkState.DISCONNECTED, f"{reason}; trying again")

    def _on_disconnect(self, client: Client, userdata: object, flags: Any, reason: Any, properties: Any) -> None:
        if self.status.state is LinkState.REFUSED:
            return
        if self._accepted:
            self.status = LinkStatus(LinkState.DISCONNECTED, f"{disconnect_reason(reason)}; trying again")
        else:
            self._give_up_attempt()
        self._accepted = self._opened = False

    def _give_up_attempt(self) -> None:
        """Note an attempt without a CONNACK, and begin again: some MQTT 3.1.1 brokers ignore an MQTT 5 CONNECT."""
        self._connector.not_answered()
        known = self._access.describe("") if self._access.address.tls or self._connector.mqtt5 else ""
        self.status = LinkStatus(LinkState.DISCONNECTED, f"{known or 'no reply'}; trying again")
        self._restart = True

    def _on_subscribe(self, client: Client, userdata: object, mid: int, reasons: Any, properties: Any) -> None:
        failed = [str(reason) for reason in reasons if reason.is_failure]
        self.was_connected |= not failed
        connected = LinkStatus(LinkState.CONNECTED)
        self.status = LinkStatus(LinkState.SUBSCRIPTION_REFUSED, failed[0]) if failed else connected

    def _on_message(self, client: Client, userdata: object, message: Any) -> None:
        try:
            self._queue.put_nowait(BrokerMessage(message.topic, message.payload, bool(message.retain)))
        except queue.Full:
            self.dropped += 1
