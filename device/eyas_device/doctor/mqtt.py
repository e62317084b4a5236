"""Whether a listening broker accepts this device: a connection beside the service's, which keeps its session."""

from __future__ import annotations

import queue
import ssl
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import msgspec
from paho.mqtt.client import Client
from paho.mqtt.reasoncodes import ReasonCode

from eyas_device.board.identity import machine
from eyas_device.config import Config
from eyas_device.doctor.finding import Finding, green, red, yellow
from eyas_device.support.names import BrokerAddress
from eyas_device.telemetry.certificates import Certificate, date, parse_certificate
from eyas_device.telemetry.diagnosis import NOT_A_BROKER, diagnose, invalid, other_identity, refused
from eyas_device.telemetry.messages import Status, decode, topic
from eyas_device.telemetry.mqtt_client import Connector, Session
from eyas_device.telemetry.tls import Security

_CONNACK_S = 10.0
_RETAINED_S = 1.0
"""How long a broker may take to send the retained status."""
_PUBACK_S = 5.0
_PROBE = "doctor"
"""Last level of a topic below the device's name to which nobody subscribes."""
_DELIVERY = {
    "collector": "messages are kept here until a collector has stored them",
    "broker": "messages are kept here until the broker has them, which may then lose them (telemetry.delivery)",
}


class _Reply(msgspec.Struct):
    """What the broker answered."""

    reason: ReasonCode | None = None
    """Reason code of its CONNACK; None without one."""
    certificate: Certificate | None = None
    refusal: str = ""
    """Why it refuses messages of the device; empty if it takes them, or was not asked."""
    status: Status | None = None
    """Retained status of a device of this name."""


def examine(config: Config, address: BrokerAddress) -> Finding:
    """Connect with MQTT 5, else 3.1.1. Raises `LinkError` for credentials that cannot be used."""
    section, security = config.telemetry, Security.from_config(config.telemetry)
    for found in map(invalid, security.certificates()):
        if found is not None:
            return red(f"{address}: {found.problem}", found.fix)
    user = section.user or ("this certificate" if section.certificate else "anybody")
    session = Session(client_id=f"eyas-doctor-{uuid.uuid4().hex[:8]}", keepalive_s=int(_CONNACK_S))
    connector = Connector((address.host, address.port), session)
    reply = _connect(config, security, connector)
    old = reply.reason is not None and reply.reason.is_failure and connector.switch_if_unsupported(reply.reason)
    if old:
        reply = _connect(config, security, connector)
    if reply.reason is None:
        known = diagnose((address.host, address.port), security) or NOT_A_BROKER
        return red(f"{address}: {known.problem}", known.fix)
    if reply.reason.is_failure:
        known = refused(reply.reason, security)
        return red(f"{address}: {known.problem}", known.fix)
    if reply.refusal:
        other = other_identity(config.device.name, security)
        assert other is not None
        return red(f"{address}: accepts {user}, but no messages ({reply.refusal}): {other.problem}", other.fix)
    for text, fix in _warnings(config, security, reply):
        return yellow(f"{address}: accepts {user}, but {text}", fix)
    if old:
        return yellow(f"{address}: accepts {user} with MQTT 3.1.1 only", "a broker with MQTT 5 reports why it refuses")
    return green(f"{address}: accepts {user}; {_DELIVERY[section.delivery]}")


def _warnings(config: Config, security: Security, reply: _Reply) -> Iterator[tuple[str, str]]:
    """What is wrong although the broker accepts the device, with the fix."""
    status, name = reply.status, f"{config.device.site}/{config.device.name}"
    if status is not None:
        twin = next((fault for fault in status.faults if f"uses the name {name}" in fault), "")
        if twin:
            yield twin, "give each device a [device] name of its own"
        elif status.machine and machine() and status.machine != machine():
            yield (
                f"the last status of {name}, of {date(status.time)}, came from another machine ({status.machine})",
                "if this board does not replace that one, give each a [device] name of its own",
            )
    now = time.time()
    for certificate in (*security.certificates(), reply.certificate):
        if certificate is not None and (text := certificate.warning(now)):
            yield text, "eyas enroll makes a new one for a device; eyas broker renews its own at a start"
    if config.telemetry.exposed:
        keys = ", ".join(config.telemetry.exposed)
        yield f"without TLS the network can read or send {keys}", "set telemetry.ca, or tls = true"


def _connect(config: Config, security: Security, connector: Connector) -> _Reply:
    client = connector.make_client()
    security.apply(client)
    done, retained = threading.Event(), threading.Event()
    reply = _Reply()
    own_topic = topic(config.device.site, config.device.name, "status")

    def on_connect(client: Client, userdata: object, flags: object, reason: ReasonCode, properties: object) -> None:
        connection = client.socket()
        if isinstance(connection, ssl.SSLSocket):
            with suppress(ValueError):
                der = connection.getpeercert(binary_form=True) or b""
                reply.certificate = parse_certificate(der, "the broker's certificate")
        reply.reason = reason
        done.set()

    def on_message(client: Client, userdata: object, message: Any) -> None:
        with suppress(msgspec.DecodeError):
            reply.status = decode(message.payload, Status)
            retained.set()

    def on_end(*_: object) -> None:
        done.set()
        retained.set()

    client.on_connect, client.on_message = on_connect, on_message
    client.on_disconnect = client.on_connect_fail = on_end
    connector.connect_async(client)
    client.loop_start()
    done.wait(_CONNACK_S)
    if reply.reason is not None and not reply.reason.is_failure:
        client.subscribe(own_topic, 1)
        retained.wait(_RETAINED_S)
        if connector.client_mqtt5 and other_identity(config.device.name, security) is not None:
            reply.refusal = _refusal(client, topic(config.device.site, config.device.name, _PROBE))
    client.disconnect()
    client.loop_stop()
    return reply


def _refusal(client: Client, probe: str) -> str:
    """Why the broker refuses a message below the device's name; empty if it does not."""
    answers: queue.SimpleQueue[Any] = queue.SimpleQueue()
    client.on_publish = lambda client, userdata, mid, reason, properties: answers.put(reason)
    client.publish(probe, b"", qos=1)
    with suppress(queue.Empty):
        reason = answers.get(timeout=_PUBACK_S)
        return str(reason) if reason.is_failure else ""
    return ""
