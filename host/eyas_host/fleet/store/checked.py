"""What a collector takes from the network: a message of a known kind, whole, in range, and on its sender's own topic.

Everything else is `Poison`, with the reason. Poison that still says who it is keeps its identity, so that its sender
can be told to stop sending it.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, TypeAlias

import msgspec

from eyas_device.support.names import NAME
from eyas_device.telemetry.messages import (
    KINDS,
    MAX_BYTES,
    SCHEMA,
    TENTHS,
    Event,
    Header,
    Profile,
    Result,
    Sketch,
    Status,
    Window,
)

_READABLE = 4 * MAX_BYTES
"""Bytes up to which a message that is too large is still searched for its identity."""
_MOST = 2**53
"""Largest count: what every JSON reader takes as a whole number."""
_LAST = 2**62
"""Largest sequence number: what every database takes."""

_Count = Annotated[int, msgspec.Meta(ge=0, le=_MOST)]
_Amount = Annotated[float, msgspec.Meta(ge=0, le=1e15)]
_Part = Annotated[float, msgspec.Meta(ge=0, le=1)]
_Celsius = Annotated[float, msgspec.Meta(ge=-274, le=1000)]
_Label = Annotated[str, msgspec.Meta(max_length=256)]
_Text = Annotated[str, msgspec.Meta(max_length=4096)]
_Tenths = Annotated[tuple[_Count, ...], msgspec.Meta(min_length=TENTHS, max_length=TENTHS)]
_Vector = Annotated[tuple[Annotated[float, msgspec.Meta(ge=-1e15, le=1e15)], ...], msgspec.Meta(max_length=8)]
_Spread = Annotated[tuple[_Amount, ...], msgspec.Meta(max_length=8)]
_Quantiles = Annotated[dict[_Label, _Amount], msgspec.Meta(max_length=32)]
_Bins = Annotated[dict[Annotated[int, msgspec.Meta(ge=0, le=1000)], _Count], msgspec.Meta(max_length=1000)]
_Counts = Annotated[dict[_Label, _Count], msgspec.Meta(max_length=1000)]
_Histograms = Annotated[dict[_Label, _Tenths], msgspec.Meta(max_length=1000)]
_Labels = Annotated[tuple[_Label, ...], msgspec.Meta(max_length=64)]
_Top = Annotated[dict[_Label, _Part], msgspec.Meta(max_length=32)]

_TOPIC = re.compile(rf"eyas/({NAME})/({NAME})/({'|'.join(KINDS)})", re.ASCII)
_SPOOL = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}", re.ASCII)


# The contract's messages with the ranges that a host takes: what is out of range is refused while it is being read.
class _Status(Status, frozen=True, kw_only=True):
    agent: _Label = ""
    model: _Label = ""
    artefact: _Label = ""
    camera: _Label = ""
    reason: _Text = ""


class _Sketch(Sketch, frozen=True, kw_only=True):
    n: _Count = 0
    mean: _Vector = ()
    m2: _Spread = ()


class _Window(Window, frozen=True, kw_only=True):
    seconds: _Amount = 0.0
    model: _Label = ""
    artefact: _Label = ""
    arm: _Label = ""
    merged: Annotated[int, msgspec.Meta(ge=1, le=_MOST)] = 1
    frames: _Count = 0
    dropped: _Count = 0
    unreadable: _Count = 0
    uncertain: _Count = 0
    counts: _Counts = msgspec.field(default_factory=dict)
    confidence: _Histograms = msgspec.field(default_factory=dict)
    margin: _Tenths = (0,) * TENTHS
    entropy: _Tenths = (0,) * TENTHS
    sketch: _Sketch = _Sketch()
    latency_ms: _Quantiles = msgspec.field(default_factory=dict)
    age_ms: _Quantiles = msgspec.field(default_factory=dict)
    latency_bins: _Bins = msgspec.field(default_factory=dict)
    age_bins: _Bins = msgspec.field(default_factory=dict)
    camera: _Label = ""
    losses: _Count = 0
    ood_quantile: _Part | None = None
    temperature_c: _Celsius | None = None
    throttled: _Labels = ()
    lost: _Counts = msgspec.field(default_factory=dict)


class _Event(Event, frozen=True, kw_only=True):
    model: _Label = ""
    artefact: _Label = ""
    arm: _Label = ""
    label: _Label = ""
    confidence: _Part = 0.0
    margin: _Part = 0.0
    entropy: _Part = 0.0
    top: _Top = msgspec.field(default_factory=dict)
    source: _Text = ""


class _Result(Result, frozen=True, kw_only=True):
    id: _Label = ""
    name: _Label = ""


class _Identity(msgspec.Struct, frozen=True):
    """What the header says, read by itself."""

    device: str = ""
    spool: str = ""
    sequence: int = -1


_READERS: dict[str, msgspec.json.Decoder[Any]] = {
    "status": msgspec.json.Decoder(_Status),
    "window": msgspec.json.Decoder(_Window),
    "event": msgspec.json.Decoder(_Event),
    "profile": msgspec.json.Decoder(Profile),
    "cmd/result": msgspec.json.Decoder(_Result),
}
_IDENTITY = msgspec.json.Decoder(_Identity)


class Address(msgspec.Struct, frozen=True):
    """Identity of a message of record, and the site that its acknowledgement goes to."""

    site: str
    device: str
    spool: str
    sequence: int


class Checked(msgspec.Struct, frozen=True):
    """A message that can be stored."""

    kind: str
    address: Address
    """Of a will, spool is empty and sequence is -1."""
    message: Header
    payload: str
    """The JSON text as it came: fields that this version does not know are kept."""

    @property
    def is_will(self) -> bool:
        """Whether the broker sent it in the name of a device that was gone: no message of record."""
        return self.address.sequence < 0


class Poison(msgspec.Struct, frozen=True):
    """Something that is no message."""

    reason: str
    address: Address | None = None
    """Who sent it, if that can be told."""


Verdict: TypeAlias = Checked | Poison


def check(topic: str, payload: bytes) -> Verdict:
    """Judge what came on a topic. Raises nothing, whatever it is."""
    match = _TOPIC.fullmatch(topic)
    if match is None:
        return Poison("a topic that no device sends on")
    site, device, kind = match.groups()
    if len(payload) > MAX_BYTES:
        return _poison(f"{len(payload)} bytes; at most {MAX_BYTES} are taken", site, device, payload)
    try:
        text = payload.decode("utf-8")
        message: Header = _READERS[kind].decode(payload)
    except UnicodeDecodeError:
        return _poison("not UTF-8", site, device, payload)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        return _poison(f"no {kind}: {error}"[:300], site, device, payload)
    if message.device != device:
        return Poison(f"a message of device {message.device[:64]!r} on the topic of {device!r}")
    address = Address(site, device, message.spool, message.sequence)
    if message.schema != SCHEMA:
        return Poison(f"schema {message.schema}; this version reads {SCHEMA}", _known(address))
    is_will = kind == "status" and isinstance(message, Status) and _is_will(message)
    if not is_will and _known(address) is None:
        return Poison("no identity: a spool (UUID) and a sequence number from 0 are needed")
    if not 0 <= message.time < 1e11:
        return Poison(f"time {message.time}: seconds since 1970 are needed", _known(address))
    if "\x00" in text:
        return Poison("a NUL character", _known(address))
    return Checked(kind, address, message, text)


def _is_will(message: Status) -> bool:
    return message.spool == "" and message.sequence == -1 and message.state == "lost"


def _known(address: Address) -> Address | None:
    """The address, if it can be the identity of a message of record."""
    return address if 0 <= address.sequence <= _LAST and _SPOOL.fullmatch(address.spool) else None


def _poison(reason: str, site: str, device: str, payload: bytes) -> Poison:
    """Poison whose identity has to be searched for in the bytes."""
    if len(payload) > _READABLE:
        return Poison(reason)
    try:
        found = _IDENTITY.decode(payload)
    except (msgspec.MsgspecError, ValueError, RecursionError):
        return Poison(reason)
    same = found.device == device
    return Poison(reason, _known(Address(site, device, found.spool, found.sequence)) if same else None)
