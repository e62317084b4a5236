"""The host's access to a broker: address, credentials, and descriptions of connection errors."""

from __future__ import annotations

import os
import ssl
from pathlib import Path

import msgspec
from paho.mqtt.client import Client
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

from eyas_device.errors import LinkError
from eyas_device.support.names import BrokerAddress, parse_broker
from eyas_device.telemetry.diagnosis import diagnose, unreachable
from eyas_device.telemetry.mqtt_client import Connector
from eyas_device.telemetry.tls import Security, read_password
from eyas_host.support.errors import BrokerUnreachable

PASSWORD = "EYAS_MQTT_PASSWORD"
"""Environment variable with the password: other users can read command lines."""


class BrokerAccess(msgspec.Struct, frozen=True, kw_only=True):
    """Address of a broker and credentials for it."""

    broker: str = "127.0.0.1"
    """HOST, HOST:PORT, mqtt://HOST or mqtts://HOST; the default port is 8883 with TLS, 1883 without."""
    tls: bool = False
    """Encrypt and trust the system's certificate authorities, if `ca` names no other."""
    ca: Path | None = None
    """Certificate authority of the broker's certificate; turns TLS on."""
    certificate: Path | None = None
    key: Path | None = None
    user: str = ""
    password_file: Path | None = None
    """File whose first line is the password."""
    insecure: bool = False
    """Allow a password without TLS."""

    @property
    def address(self) -> BrokerAddress:
        """Address of the broker, and whether TLS is on. Raises `LinkError` for an impossible one."""
        try:
            return parse_broker(self.broker, tls=self.tls or bool(self.ca or self.certificate))
        except ValueError as error:
            raise LinkError(f"--broker {error}") from None

    @property
    def security(self) -> Security:
        """TLS and login, as a device would use them."""
        files = {"ca": self.ca, "certificate": self.certificate, "key": self.key}
        return Security(tls=self.address.tls, user=self.user, **{name: str(path or "") for name, path in files.items()})

    def check(self) -> None:
        """Raise `LinkError` for an impossible address and for files that are unreadable or do not belong together."""
        if bool(self.certificate) != bool(self.key):
            raise LinkError("--certificate, --key: both are needed, or none")
        if self.user and not self.address.tls and not self.insecure:
            raise LinkError(
                f"--user {self.user}: not without TLS, the network can read the password: set --ca (or --tls for a "
                "public certificate), or accept that with --insecure"
            )
        self.security.context()

    def apply(self, client: Client) -> None:
        """Set TLS and login of a client that has not connected yet.

        Raises `LinkError` as `check` does.
        """
        self.check()
        self.security.apply(client)
        if self.user:
            path = self.password_file
            client.username_pw_set(self.user, read_password(path, private=False) if path else os.environ.get(PASSWORD))

    def start(self, connector: Connector, client: Client) -> None:
        """Connect a client and serve it in a thread of its own. Raises `BrokerUnreachable` where nothing listens."""
        try:
            connector.connect(client)
        except (OSError, ValueError) as error:
            raise BrokerUnreachable(f"broker {self.broker}: {self.describe(error)}") from None
        client.loop_start()

    def describe(self, error: BaseException | str) -> str:
        """Describe why a connection failed or ended before the broker accepted it, with the fix if one is known.

        Connects again to find out; takes a few seconds at most.
        """
        if isinstance(error, OSError) and (known := unreachable(self.address[:2], error)):
            return str(known)
        silent = isinstance(error, str | ssl.SSLError | TimeoutError | ConnectionResetError)
        found = diagnose(self.address[:2], self.security) if silent else None
        return str(found or (error if isinstance(error, str) else _in_words(error)))


def end_session(client: Client, *, mqtt5: bool) -> None:
    """Disconnect so that the broker keeps nothing of the session: no subscription and no queued message."""
    properties = Properties(PacketTypes.DISCONNECT) if mqtt5 else None
    if properties is not None:
        properties.SessionExpiryInterval = 0
    client.disconnect(properties=properties)


def _in_words(error: BaseException) -> str:
    """Describe why a connection failed, with the fix if one is known."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"the broker's certificate is not trusted: {error.verify_message}; check --ca and the broker's name"
    if isinstance(error, ssl.SSLError):
        return f"TLS failed: {error.reason or error}; is the certificate trusted there and still valid?"
    return str(getattr(error, "strerror", None) or error) or type(error).__name__
