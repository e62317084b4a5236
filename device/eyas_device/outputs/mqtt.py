"""MQTT: the answer as a retained message below the device's own topic; the uplink sends the newest one."""

from __future__ import annotations

from typing import Protocol

import msgspec

from eyas_device.outputs.answer import Answer


class Publish(Protocol):
    """Publishes a retained payload in place of the one before; never blocks."""

    def __call__(self, payload: bytes, *, expires: bool = True) -> None:
        """`expires`: the broker drops it if it is not published again for minutes."""


class Topic:
    """Hands answers to the uplink, which publishes the newest at a change and at each connection."""

    max_attempts: int | None = None

    def __init__(self, publish: Publish) -> None:
        self._publish = publish

    def deliver(self, answer: Answer) -> None:
        """Let the uplink publish an answer in place of the one before."""
        self._publish(msgspec.json.encode(answer), expires=answer.state != "offline")

    def close(self) -> None:
        """The connection belongs to the telemetry."""
