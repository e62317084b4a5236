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
    camera: str = ""
    """`delivering`, or what is wrong: opening, lost, frozen, black, resized."""
    reason: str = ""
    """Of the camera's state, in words."""
    paused: bool = False
    unfamiliar: bool | None = None
    """Whether the camera does not see what the model was trained on; None if that cannot be told (yet)."""


class Window(Header, frozen=True, kw_only=True):
    """What happened in the last few seconds; its size does not depend on the frame rate."""

    seconds: float = 0.0
    model: str = ""
    artefact: str = ""
    frames: int = 0
    dropped: int = 0
    """Frames replaced by a newer one, or too old, before they were looked at."""
    unreadable: int = 0
    """Frames that could not be decoded, or showed nothing."""
    unsure: int = 0
    """Answers below the bundle's confidence threshold."""
    counts: dict[str, int] = {}
    """Label -> answers."""
    confidence: dict[str, tuple[int, ...]] = {}
    """Label -> answers per tenth of confidence, 0..1."""
    latency_ms: dict[str, float] = {}
    """p50, p90, p99 and max of decode + preprocess + infer, milliseconds."""
    age_ms: dict[str, float] = {}
    """The same of the time from capture to answer."""
    camera: str = ""
    """As in the status."""
    losses: int = 0
    """How often the camera was lost since the start."""
    beyond: float | None = None
    """Part of the validation pictures that are nearer to the training pictures than what this camera sees, 0..1."""
    temperature_c: float | None = None
    """Of the processor; None where there is no sensor."""
    throttled: tuple[str, ...] = ()
    """What slows the processor down at this moment, e.g. `under-voltage`."""


class Vitals(msgspec.Struct, frozen=True, kw_only=True):
    """How the loop, its camera and its board feel at a moment: what status and window say beside the answers."""

    camera: str = ""
    reason: str = ""
    losses: int = 0
    paused: bool = False
    dropped: int = 0
    """Since the start."""
    beyond: float | None = None
    unfamiliar: bool | None = None
    temperature_c: float | None = None
    throttled: tuple[str, ...] = ()


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
