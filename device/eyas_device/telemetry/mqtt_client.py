"""MQTT clients of device and host: session options, the state of a connection, and the fallback to MQTT 3.1.1."""

from __future__ import annotations

import base64
import enum
import hashlib
import re
import time
from typing import Any

import msgspec
from paho.mqtt.client import CallbackAPIVersion, Client, MQTTProtocolVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

_UNSPECIFIED = 0x80
_UNSUPPORTED_VERSION = (0x01, 0x84)
"""CONNACK reason codes of MQTT 3.1.1 and 5 for a protocol version that the broker does not speak."""


class LinkState(enum.Enum):
    """State of a connection to a broker; each value is also its text for people."""

    CONNECTING = "connecting"
    CONNECTED = "connected"
    NO_COLLECTOR = "connected, but no collector acknowledges"
    MESSAGE_REFUSED = "connected, but the broker refused a message"
    SUBSCRIPTION_REFUSED = "connected, but the broker refused a subscription"
    NAME_IN_USE = "connected, but the name is used twice"
    REFUSED = "refused by the broker"
    DISCONNECTED = "not connected"


class LinkStatus(msgspec.Struct, frozen=True):
    """State of a connection, with a detail for people."""

    state: LinkState = LinkState.CONNECTING
    detail: str = ""
    since: float = 0.0
    """Start of the state, monotonic seconds; 0 if that was not noted."""

    def __str__(self) -> str:
        return f"{self.state.value}: {self.detail}" if self.detail else self.state.value


def disconnect_reason(reason: Any) -> str:
    """Why an accepted connection ended: paho reports one without a DISCONNECT as an unspecified error."""
    return "the connection was lost" if getattr(reason, "value", 0) == _UNSPECIFIED else str(reason)


class Session(msgspec.Struct, frozen=True, kw_only=True):
    """What a client asks the broker for."""

    client_id: str
    keepalive_s: int = 30
    expiry_s: int = 0
    """How long the broker keeps the session of a client that is away; 0: a new session for each connection."""
    receive_maximum: int | None = None
    """Messages of QoS 1 that the broker may have in flight to this client (MQTT 5 only)."""
    max_packet_bytes: int | None = None
    """Largest packet that the broker may send (MQTT 5 only)."""
    manual_ack: bool = False
    """Whether the application acknowledges each message itself."""


_ID_LENGTH = 23
"""Every broker takes client ids of this length (MQTT 3.1.1, 3.1.3.1)."""
_HASH_LENGTH = 8
_RETRY_MQTT5_S = 3600.0


def client_id(kind: str, *names: str) -> str:
    """A client id that no other kind or names have: something readable and 40 bits of a hash, at most 23 characters.

    Joined names alone would not do: site `hall-2` with device `cam` and site `hall` with device `2-cam`.
    """
    digest = hashlib.sha256("\0".join((kind, *names)).encode("utf-8", "surrogatepass")).digest()
    code = base64.b32encode(digest).decode("ascii").lower()[:_HASH_LENGTH]
    readable = re.sub(r"[^A-Za-z0-9.-]", "", names[-1])[: _ID_LENGTH - len(f"eyas--{code}")]
    return f"eyas-{readable}-{code}"


class Connector:
    """Creates and connects clients of one broker and session: MQTT 5 first, 3.1.1 for brokers that know nothing newer.

    The owner of a connection calls `accepted` with an accepting CONNACK, `switch_if_unsupported` with a refusing one,
    and `not_answered` after a connection that ended without any. MQTT 3.1.1 is for the next connection only, and after
    silence only if the broker never accepted MQTT 5: a lost packet must not cost the reason codes of MQTT 5.
    """

    def __init__(self, address: tuple[str, int], session: Session) -> None:
        self.mqtt5 = True
        """Whether the next client speaks MQTT 5."""
        self.client_mqtt5 = True
        """Whether the client that was made last does."""
        self._address, self._session = address, session
        self._speaks_mqtt5 = self._refuses_mqtt5 = False
        self._accepted_at = 0.0

    def make_client(self) -> Client:
        """Create a client that is not connected yet and has no credentials."""
        self.client_mqtt5 = self.mqtt5
        return Client(
            CallbackAPIVersion.VERSION2,
            client_id=self._session.client_id,
            protocol=MQTTProtocolVersion.MQTTv5 if self.mqtt5 else MQTTProtocolVersion.MQTTv311,
            clean_session=None if self.mqtt5 else not self._session.expiry_s,
            manual_ack=self._session.manual_ack,
        )

    def connect(self, client: Client) -> None:
        """Open the connection and send CONNECT. Raises `OSError` or `ValueError` if that fails."""
        client.connect(*self._address, keepalive=self._session.keepalive_s, **self._options())

    def connect_async(self, client: Client) -> None:
        """Let the client's own thread (`loop_start`) open the connection."""
        client.connect_async(*self._address, keepalive=self._session.keepalive_s, **self._options())

    def accepted(self) -> None:
        """Note that the broker accepted the connection; the one after it begins with MQTT 5 again."""
        self._speaks_mqtt5 |= self.client_mqtt5
        self._accepted_at = time.monotonic()
        self.mqtt5 = True

    def switch_if_unsupported(self, reason: Any) -> bool:
        """Speak MQTT 3.1.1 next if a CONNACK refuses MQTT 5; return whether that is so."""
        if int(getattr(reason, "value", reason)) not in _UNSUPPORTED_VERSION or not self.client_mqtt5:
            self.mqtt5 = True
            return False
        self._refuses_mqtt5, self.mqtt5 = True, False
        return True

    def not_answered(self) -> None:
        """Speak the other version next: some brokers older than MQTT 5 ignore its CONNECT or hang up."""
        self.mqtt5 = self._speaks_mqtt5 or not self.client_mqtt5

    def should_try_mqtt5(self) -> bool:
        """Whether to connect again, because the broker never said that it does not know MQTT 5."""
        old_enough = time.monotonic() - self._accepted_at > _RETRY_MQTT5_S
        return not self.client_mqtt5 and not self._refuses_mqtt5 and old_enough

    def _options(self) -> dict[str, Any]:
        session = self._session
        if not (self.client_mqtt5 and session.expiry_s):
            return {}
        properties = Properties(PacketTypes.CONNECT)
        properties.SessionExpiryInterval = session.expiry_s
        if session.receive_maximum is not None:
            properties.ReceiveMaximum = session.receive_maximum
        if session.max_packet_bytes is not None:
            properties.MaximumPacketSize = session.max_packet_bytes
        return {"clean_start": False, "properties": properties}
