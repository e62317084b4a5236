"""How the host reaches a broker: address, credentials, and what went wrong in words."""

from __future__ import annotations

import os
import ssl
from pathlib import Path
from typing import Any

import msgspec
from paho.mqtt.client import CallbackAPIVersion, Client, MQTTProtocolVersion

from eyas_device.errors import LinkError
from eyas_device.support.names import parse_broker

PORT, TLS_PORT = 1883, 8883
PASSWORD = "EYAS_MQTT_PASSWORD"
"""Environment variable that is read where a user name is given without a file: command lines are seen by others."""
OLD_PROTOCOL = 0x84
"""Reason code of a broker that does not speak MQTT 5."""
TAKEN_OVER = 0x8E
"""Reason code of a session that another client with the same name took over."""


class Access(msgspec.Struct, frozen=True, kw_only=True):
    """Which broker, and as whom."""

    broker: str = "127.0.0.1"
    """HOST or HOST:PORT."""
    ca: Path | None = None
    """Certificate of the authority that signed the broker's: its presence turns TLS on."""
    cert: Path | None = None
    key: Path | None = None
    user: str = ""
    password_file: Path | None = None
    """The password is its first line."""

    @property
    def address(self) -> tuple[str, int]:
        """Host and port; without a port, that of TLS or of plain MQTT. Raises `LinkError` for a mistaken one."""
        try:
            host, port = parse_broker(self.broker)
        except ValueError as error:
            raise LinkError(f"--broker {error}") from None
        return host, TLS_PORT if self.ca and ":" not in self.broker else port


def make_client(access: Access, name: str, *, mqtt5: bool = True, manual_ack: bool = False) -> Client:
    """A client that knows its credentials and is not connected yet.

    Raises `LinkError` for files that cannot be read or do not fit each other.
    """
    client = Client(
        CallbackAPIVersion.VERSION2,
        client_id=name,
        protocol=MQTTProtocolVersion.MQTTv5 if mqtt5 else MQTTProtocolVersion.MQTTv311,
        clean_session=None if mqtt5 else not manual_ack,
        manual_ack=manual_ack,
    )
    if access.user:
        client.username_pw_set(access.user, _password(access))
    if (access.cert or access.key) and not (access.ca and access.cert and access.key):
        raise LinkError("a client certificate needs three files: --ca, --cert and --key")
    if access.ca:
        client.tls_set_context(_tls(access))
    return client


def why(error: BaseException) -> str:
    """Why a connection failed, with the fix where one is known."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"the broker's certificate is not trusted: {error.verify_message}; see --ca and the broker's name"
    if isinstance(error, ssl.SSLError):
        return f"TLS failed: {error.reason or error}; see that the certificate is known there and has not expired"
    if isinstance(error, ConnectionRefusedError):
        return "nobody listens there"
    if isinstance(error, TimeoutError):
        return "no answer"
    return str(getattr(error, "strerror", None) or error) or type(error).__name__


def is_old(reason: Any) -> bool:
    """Whether a refusal means that the broker speaks MQTT 3.1.1 only."""
    return int(getattr(reason, "value", reason)) in (1, OLD_PROTOCOL)


def _password(access: Access) -> str | None:
    if access.password_file is None:
        return os.environ.get(PASSWORD)
    try:
        lines = access.password_file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise LinkError(f"{access.password_file}: the password cannot be read ({why(error)})") from None
    return lines[0] if lines else ""


def _tls(access: Access) -> ssl.SSLContext:
    try:
        context = ssl.create_default_context(cafile=str(access.ca))
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        if access.cert and access.key:
            context.load_cert_chain(access.cert, access.key)
    except (OSError, ssl.SSLError) as error:
        files = ", ".join(str(file) for file in (access.ca, access.cert, access.key) if file)
        raise LinkError(f"{files}: no credentials ({why(error)}); `eyas enroll NAME` makes them") from None
    return context
