"""The host's access to a broker: address, credentials, and descriptions of connection errors."""

from __future__ import annotations

import os
import ssl
from pathlib import Path

import msgspec
from paho.mqtt.client import Client

from eyas_device.errors import LinkError
from eyas_device.support.names import BrokerAddress, parse_broker

PASSWORD = "EYAS_MQTT_PASSWORD"
"""Environment variable with the password: other users can read command lines."""


class BrokerAccess(msgspec.Struct, frozen=True, kw_only=True):
    """Address of a broker and credentials for it."""

    broker: str = "127.0.0.1"
    """HOST, HOST:PORT, mqtt://HOST or mqtts://HOST; the default port is 8883 with TLS, 1883 without."""
    ca: Path | None = None
    """Certificate authority of the broker's certificate; turns TLS on."""
    cert: Path | None = None
    key: Path | None = None
    user: str = ""
    password_file: Path | None = None
    """File whose first line is the password."""

    @property
    def address(self) -> BrokerAddress:
        """Address of the broker, and whether TLS is on. Raises `LinkError` for an impossible one."""
        try:
            return parse_broker(self.broker, tls=self.ca is not None)
        except ValueError as error:
            raise LinkError(f"--broker {error}") from None

    def apply(self, client: Client) -> None:
        """Set TLS and login of a client that has not connected yet.

        Raises `LinkError` for files that are unreadable or do not belong together.
        """
        if self.user:
            client.username_pw_set(self.user, _password(self))
        if (self.cert or self.key) and not (self.ca and self.cert and self.key):
            raise LinkError("a client certificate needs three files: --ca, --cert and --key")
        if self.address.tls:
            client.tls_set_context(_tls(self))


def describe_error(error: BaseException) -> str:
    """Describe why a connection failed, with the fix if one is known."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"the broker's certificate is not trusted: {error.verify_message}; check --ca and the broker's name"
    if isinstance(error, ssl.SSLError):
        return f"TLS failed: {error.reason or error}; is the certificate trusted there and still valid?"
    if isinstance(error, ConnectionRefusedError):
        return "connection refused; is the broker running?"
    if isinstance(error, TimeoutError):
        return "timed out"
    return str(getattr(error, "strerror", None) or error) or type(error).__name__


def _password(access: BrokerAccess) -> str | None:
    if access.password_file is None:
        return os.environ.get(PASSWORD)
    try:
        lines = access.password_file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise LinkError(f"{access.password_file}: the password cannot be read ({describe_error(error)})") from None
    return lines[0] if lines else ""


def _tls(access: BrokerAccess) -> ssl.SSLContext:
    try:
        context = ssl.create_default_context(cafile=str(access.ca) if access.ca else None)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        if access.cert and access.key:
            context.load_cert_chain(access.cert, access.key)
    except (OSError, ssl.SSLError) as error:
        files = ", ".join(str(file) for file in (access.ca, access.cert, access.key) if file)
        raise LinkError(f"{files}: unusable ({describe_error(error)}); see `eyas enroll --help`") from None
    return context
