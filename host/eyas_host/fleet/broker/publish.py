"""Publish some retained messages over one connection, and wait until the broker has them."""

from __future__ import annotations

import queue
import time
from collections.abc import Mapping
from typing import Any
from uuid import uuid4

from paho.mqtt.client import Client

from eyas_device.telemetry.mqtt_client import Connector, Session
from eyas_host.fleet.broker.client import BrokerAccess
from eyas_host.support.errors import BrokerUnreachable

_WAIT_S = 15.0


def publish_retained(access: BrokerAccess, messages: Mapping[str, bytes], *, name: str) -> None:
    """Publish retained messages: topic -> payload; `name` is the beginning of the client id.

    Raises:
        BrokerUnreachable: The broker cannot be reached, or refuses.
        LinkError: An impossible address or credentials.

    """
    if not messages:
        return
    events: queue.Queue[tuple[str, Any]] = queue.Queue()
    client = _connect(access, events, name)
    try:
        end = time.monotonic() + _WAIT_S
        pending: set[int] = set()
        waiting = True
        while waiting or pending:
            try:
                kind, value = events.get(timeout=max(0.0, end - time.monotonic()))
            except queue.Empty:
                raise BrokerUnreachable(f"broker {access.broker}: no reply") from None
            if kind == "failed":
                raise BrokerUnreachable(f"broker {access.broker}: {value}")
            if kind == "connected" and waiting:
                waiting = False
                pending |= {client.publish(topic, data, qos=1, retain=True).mid for topic, data in messages.items()}
            pending -= {value} if kind == "published" else set()
    finally:
        client.disconnect()
        client.loop_stop()


def _connect(access: BrokerAccess, events: queue.Queue[tuple[str, Any]], name: str) -> Client:
    connector = Connector(access.address[:2], Session(client_id=f"{name}-{uuid4().hex[:10]}"))
    client = connector.make_client()
    access.apply(client)

    def on_connect(client: Client, userdata: object, flags: Any, reason: Any, properties: Any) -> None:
        events.put(("failed", str(reason)) if reason.is_failure else ("connected", None))

    def on_publish(client: Client, userdata: object, mid: int, reason: Any, properties: Any) -> None:
        events.put(("failed", str(reason)) if reason.is_failure else ("published", mid))

    client.on_connect, client.on_publish = on_connect, on_publish
    access.start(connector, client)
    return client
