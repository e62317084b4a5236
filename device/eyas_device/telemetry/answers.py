"""The retained answer of a device: newest wins, QoS 1, published at a change, at each connection and once a minute.

It does not go through the spool: an answer of an hour ago is worth nothing. After a broken connection the broker would
keep the last one for ever, so with MQTT 5 it expires, and a later subscriber gets none in place of a stale one.
"""

from __future__ import annotations

from paho.mqtt.client import Client
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

REPEAT_S = 60.0
"""An answer is published again after this time, so that it does not expire."""
EXPIRY_S = 180
"""MQTT 5: the broker drops an answer that was not published again for this time."""
_PUBACK_S = 30.0


class RetainedAnswer:
    """The newest answer and how far it has got. `payload` may be set by any thread, all else belongs to the uplink."""

    def __init__(self, topic: str) -> None:
        self.payload = b""
        """JSON; empty: there is none."""
        self.expires = True
        """Whether the broker drops it when it is not published again."""
        self._topic = topic
        self._sent: bytes | None = None
        self._sent_at = 0.0
        self._mid: int | None = None

    @property
    def in_flight(self) -> bool:
        """Whether the broker has not acknowledged the last publication yet."""
        return self._mid is not None

    @property
    def is_done(self) -> bool:
        """Whether the broker has acknowledged the newest answer, or there is none."""
        return not self.in_flight and (not self.payload or self._sent is self.payload)

    def reset(self) -> None:
        """Publish again on a new connection."""
        self._sent = self._mid = None

    def is_due(self, now: float) -> bool:
        """Whether to publish at `now`, monotonic seconds."""
        if self._mid is not None and now - self._sent_at < _PUBACK_S:
            return False
        repeated = self.expires and now - self._sent_at >= REPEAT_S
        return bool(self.payload) and (self._sent is not self.payload or repeated)

    def publish(self, client: Client, now: float, *, mqtt5: bool) -> None:
        """Publish the newest answer."""
        self._sent, self._sent_at = self.payload, now
        properties = None
        if mqtt5 and self.expires:
            properties = Properties(PacketTypes.PUBLISH)
            properties.MessageExpiryInterval = EXPIRY_S
        self._mid = client.publish(self._topic, self._sent, qos=1, retain=True, properties=properties).mid

    def acknowledge(self, mid: int) -> bool:
        """Take the broker's acknowledgement of a packet; whether it was the answer's."""
        if mid != self._mid:
            return False
        self._mid = None
        return True
