"""Messages between a device and the fleet's host: plain JSON under `eyas/<site>/<device>/<kind>`.

Every message carries device id, spool id and sequence number: its identity for de-duplication. The will is written by
the broker when a device is already gone, so it has none. Every field has a default and unknown fields are ignored: an
older reader understands a newer sender.
"""

from __future__ import annotations

from typing import Literal, TypeVar

import msgspec

SCHEMA = 1


class Header(msgspec.Struct, frozen=True, kw_only=True):
    """What every message starts with."""

    schema: int = SCHEMA
    device: str = ""
    spool: str = ""
    """UUID born with the spool; a new one after the device lost its memory."""
    sequence: int = -1
    """Counts up by one within a spool; -1 in the will."""
    time: float = 0.0
    """Seconds since 1970, UTC, by the device's clock."""


class Status(Header, frozen=True, kw_only=True):
    """Retained: the device's birth, its farewell, and (as the will) its loss."""

    state: Literal["online", "offline", "lost"] = "lost"
    agent: str = ""
    model: str = ""
    """`name version` of the bundle that answers."""
    artefact: str = ""


class Window(Header, frozen=True, kw_only=True):
    """What happened in the last few seconds; its size does not depend on the frame rate."""

    seconds: float = 0.0
    model: str = ""
    artefact: str = ""
    frames: int = 0
    dropped: int = 0
    """Frames replaced by a newer one before they were looked at."""
    unsure: int = 0
    """Answers below the bundle's confidence threshold."""
    counts: dict[str, int] = {}
    """Label -> answers."""
    confidence: dict[str, tuple[int, ...]] = {}
    """Label -> answers per tenth of confidence, 0..1."""
    latency_ms: dict[str, float] = {}
    """p50, p90, p99 and max of decode + preprocess + infer, milliseconds."""


Message = TypeVar("Message", bound=Header)


def encode(message: Header) -> bytes:
    """A message as JSON bytes."""
    return msgspec.json.encode(message)


def decode(data: bytes, kind: type[Message]) -> Message:
    """Read a message of a known kind. Raises `msgspec.DecodeError` for bytes that are none."""
    return msgspec.json.decode(data, type=kind)


def topic(site: str, device: str, kind: str) -> str:
    """`eyas/<site>/<device>/<kind>`."""
    return f"eyas/{site}/{device}/{kind}"
