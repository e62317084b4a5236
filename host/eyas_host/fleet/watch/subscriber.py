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
from eyas_device.telemetry.messages import KINDS
from eyas_device.telemetry.mqtt_client import Connector, LinkState, LinkStatus, Session
from eyas_host.fleet.broker.client import BrokerAccess, describe_error

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
        self._access = access
        self._queue: queue.Queue[BrokerMessage] = queue.Queue(_QUEUE_SIZE)
        self._connector = Connector(access.address[:2], Session(client_id=f"eyas-watch-{uuid4().hex[:12]}"))
        self._restart = False
        self._client = self._start()

    def take(self, timeout: float) -> Iterator[BrokerMessage]:
        """Yield received messages, waiting at most `timeout` seconds for the first."""
        connecting = self.status.state is LinkState.CONNECTING
        if connecting and time.monotonic() - self._started > _CONNACK_S:
            self._connector.switch_version()
            self._restart = True
        if self._restart:
            self._restart, self.status = False, LinkStatus()
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

    def _on_connect(self, client: Client, userdata: object, flags: Any, reason: Any, properties: Any) -> None:
        if reason.is_failure:
            self.status = LinkStatus(LinkState.REFUSED, str(reason))
            self._restart = self._connector.switch_if_unsupported(reason)
            return
        client.subscribe([(f"eyas/+/+/{kind}", 0) for kind in KINDS])

    def _on_connect_fail(self, client: Client, userdata: object) -> None:
        error = sys.exc_info()[1]
        reason = describe_error(error) if error else "the broker cannot be reached"
        self.status = LinkStatus(LinkState.DISCONNECTED, f"{reason}; trying again")

    def _on_disconnect(self, client: Client, userdata: object, flags: Any, reason: Any, properties: Any) -> None:
        if self.status.state is not LinkState.REFUSED:
            self.status = LinkStatus(LinkState.DISCONNECTED, f"{reason}; trying again")

    def _on_subscribe(self, client: Client, userdata: object, mid: int, reasons: Any, properties: Any) -> None:
        refused = [str(reason) for reason in reasons if reason.is_failure]
        connected = LinkStatus(LinkState.CONNECTED)
        self.status = LinkStatus(LinkState.SUBSCRIPTION_REFUSED, refused[0]) if refused else connected

    def _on_message(self, client: Client, userdata: object, message: Any) -> None:
        try:
            self._queue.put_nowait(BrokerMessage(message.topic, message.payload, bool(message.retain)))
        except queue.Full:
            self.dropped += 1
