"""Forget a device that is gone: remove what a broker retains of it. It needs no certificate of the device."""

from __future__ import annotations

import queue
import time
from typing import Any
from uuid import uuid4

from paho.mqtt.client import Client

from eyas_device.errors import LinkError
from eyas_device.support.names import check_name
from eyas_device.telemetry.mqtt_client import Connector, Session
from eyas_host.fleet.broker.client import BrokerAccess
from eyas_host.support.errors import BrokerUnreachable

RETAINED = ("status", "answer", "drift")
"""What devices retain."""
_WAIT_S, _QUIET_S = 15.0, 0.5


def forget(access: BrokerAccess, device: str) -> list[str]:
    """Remove the retained messages of a device at all its sites and return their topics; collectors notice it.

    Raises:
        LinkError: An invalid name, address or credentials.
        BrokerUnreachable: The broker cannot be reached or refuses.

    """
    try:
        check_name(device)
    except ValueError as error:
        raise LinkError(f"device {error}") from None
    events: queue.Queue[tuple[str, Any]] = queue.Queue()
    client = _connect(access, device, events)
    removed: list[str] = []
    try:
        end, quiet = time.monotonic() + _WAIT_S, _WAIT_S
        pending: set[int] = set()
        while True:
            try:
                kind, value = events.get(timeout=min(quiet, max(0.0, end - time.monotonic())))
            except queue.Empty:
                if quiet == _QUIET_S and not pending:
                    return sorted(removed)
                raise BrokerUnreachable(f"broker {access.broker}: no reply") from None
            if kind == "failed":
                raise BrokerUnreachable(f"broker {access.broker}: {value}")
            if kind == "subscribed":
                quiet = _QUIET_S
            elif kind == "retained":
                removed.append(value)
                pending.add(client.publish(value, b"", qos=1, retain=True).mid)
            elif kind == "published":
                pending.discard(value)
    finally:
        client.disconnect()
        client.loop_stop()


def _connect(access: BrokerAccess, device: str, events: queue.Queue[tuple[str, Any]]) -> Client:
    connector = Connector(access.address[:2], Session(client_id=f"eyas-forget-{uuid4().hex[:12]}"))
    client = connector.make_client()
    access.apply(client)

    def on_connect(client: Client, userdata: object, flags: Any, reason: Any, properties: Any) -> None:
        if reason.is_failure:
            events.put(("failed", str(reason)))
        else:
            client.subscribe([(f"eyas/+/{device}/{kind}", 1) for kind in RETAINED])

    def on_subscribe(client: Client, userdata: object, mid: int, reasons: Any, properties: Any) -> None:
        refused = [str(reason) for reason in reasons if reason.is_failure]
        events.put(("failed", refused[0]) if refused else ("subscribed", None))

    def on_message(client: Client, userdata: object, message: Any) -> None:
        if message.retain and message.payload:
            events.put(("retained", message.topic))

    def on_publish(client: Client, userdata: object, mid: int, reason: Any, properties: Any) -> None:
        events.put(("failed", str(reason)) if reason.is_failure else ("published", mid))

    client.on_connect, client.on_subscribe = on_connect, on_subscribe
    client.on_message, client.on_publish = on_message, on_publish
    access.start(connector, client)
    return client
