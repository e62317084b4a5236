"""The collectors of a group tell each other which store they write to.

They share a fleet's messages, so two that write to different stores each store a part of them, and nobody notices. They
meet on the topic `eyas/collectors/GROUP/ack`, which the access list of a broker lets hosts write.
"""

from __future__ import annotations

import msgspec

from eyas_device.errors import LinkError
from eyas_device.support.names import COLLECTORS, check_name
from eyas_device.telemetry.messages import decode, encode, topic
from eyas_device.telemetry.mqtt_client import client_id

_MAX_OTHERS, _MAX_ID = 100, 200


def check_names(group: str, name: str) -> None:
    """Raise `LinkError` for a name that is not allowed in a topic or a client id."""
    for option, value in (("--group", group), ("--name", name)):
        try:
            check_name(value)
        except ValueError as error:
            raise LinkError(f"{option} {error}") from None


class Presence(msgspec.Struct, frozen=True, kw_only=True):
    """What a collector tells the others of its group."""

    collector: str = ""
    """Its client id."""
    store: str = ""
    """Id of the database that it stores in."""
    answer: bool = False
    """Whether it answers another one; answers are not answered."""


class Group:
    """The other collectors of a group, as far as their store is another one."""

    def __init__(self, group: str, name: str, store: str) -> None:
        """Raises `LinkError` as `check_names`."""
        check_names(group, name)
        self.client_id = client_id("collector", group, name)
        self._label = f"eyas-collect-{group}-{name}"
        self.topic = topic(COLLECTORS, group, "ack")
        self._presence = Presence(collector=self._label, store=store)
        self._others: set[str] = set()

    @property
    def greeting(self) -> bytes:
        """The message of a collector that has connected."""
        return encode(self._presence)

    @property
    def warning(self) -> str:
        """Which collectors store elsewhere; empty if none does."""
        names = ", ".join(sorted(self._others))
        does = "stores" if len(self._others) == 1 else "store"
        advice = "each store gets only a share of the messages: give them one --store, or each its own --group"
        return f"{names} of the same group {does} elsewhere: {advice}" if names else ""

    def on_message(self, payload: bytes) -> bytes | None:
        """Note another collector's store; return the answer to it, if it needs one."""
        try:
            other = decode(payload, Presence)
        except msgspec.DecodeError:
            return None
        name = "".join(c if c.isprintable() else "?" for c in other.collector[:_MAX_ID])
        if name in ("", self._label) or not other.store:
            return None
        self._others.discard(name)
        if other.store != self._presence.store and len(self._others) < _MAX_OTHERS:
            self._others.add(name)
        return None if other.answer else encode(msgspec.structs.replace(self._presence, answer=True))
