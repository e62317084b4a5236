"""Validate messages from the network: of a known kind, complete, in range, and on the sender's own topic.

Anything else is an `InvalidMessage` with a reason. It keeps its identity where that can be read, so that it can be
acknowledged and its sender stops resending it. A message of a newer schema is valid: what of it this version can read
is read, `problem` says what not, and its payload is kept for a version that reads it all.
"""

from __future__ import annotations

import re
from typing import Annotated, Any

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
    Update,
    Window,
)

_READABLE = 4 * MAX_BYTES
"""Max. size of an oversized message that is still parsed for its identity, bytes."""
_MAX_COUNT = 2**53
"""Largest integer that every JSON reader represents exactly."""
_MAX_SEQUENCE = 2**62
"""Largest sequence number; fits every database."""

_Count = Annotated[int, msgspec.Meta(ge=0, le=_MAX_COUNT)]
_Amount = Annotated[float, msgspec.Meta(ge=0, le=1e15)]
_Fraction = Annotated[float, msgspec.Meta(ge=0, le=1)]
_Celsius = Annotated[float, msgspec.Meta(ge=-274, le=1000)]
_Label = Annotated[str, msgspec.Meta(max_length=256)]
_Boot = Annotated[str, msgspec.Meta(max_length=64, pattern=r"^[0-9A-Za-z-]*$")]
_Text = Annotated[str, msgspec.Meta(max_length=4096)]
_Tenths = Annotated[tuple[_Count, ...], msgspec.Meta(min_length=TENTHS, max_length=TENTHS)]
_Vector = Annotated[tuple[Annotated[float, msgspec.Meta(ge=-1e15, le=1e15)], ...], msgspec.Meta(max_length=8)]
_Confidences = Annotated[dict[_Label, _Amount], msgspec.Meta(max_length=1000)]
_Spread = Annotated[tuple[_Amount, ...], msgspec.Meta(max_length=8)]
_Quantiles = Annotated[dict[_Label, _Amount], msgspec.Meta(max_length=32)]
_Bins = Annotated[dict[Annotated[int, msgspec.Meta(ge=0, le=1000)], _Count], msgspec.Meta(max_length=1000)]
_Counts = Annotated[dict[_Label, _Count], msgspec.Meta(max_length=1000)]
_Histograms = Annotated[dict[_Label, _Tenths], msgspec.Meta(max_length=1000)]
_Labels = Annotated[tuple[_Label, ...], msgspec.Meta(max_length=64)]
_Texts = Annotated[tuple[_Text, ...], msgspec.Meta(max_length=64)]
_Top = Annotated[dict[_Label, _Fraction], msgspec.Meta(max_length=32)]

_TOPIC = re.compile(rf"eyas/({NAME})/({NAME})/({'|'.join(KINDS)})", re.ASCII)
_SPOOL = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}", re.ASCII)


# The wire messages with the ranges that the host accepts: values out of range are rejected while decoding.
class _Update(Update, frozen=True, kw_only=True):
    state: _Label = "idle"
    model: _Label = ""
    digest: _Label = ""
    rollout: _Label = ""
    reason: _Text = ""
    since: _Amount = 0.0
    attempts: _Count = 0
    channel: _Label = ""
    group: _Label = ""
    checked: _Amount = 0.0
    clock: _Text = ""


class _Status(Status, frozen=True, kw_only=True):
    uptime_s: _Amount = 0.0
    boot: _Boot = ""
    state: _Label = "lost"
    agent: _Label = ""
    model: _Label = ""
    artefact: _Label = ""
    digest: _Label = ""
    camera: _Label = ""
    reason: _Text = ""
    ood_reason: _Text = ""
    machine: _Label = ""
    faults: _Texts = ()
    update: _Update | None = None
    agent_update: _Update | None = None


class _Sketch(Sketch, frozen=True, kw_only=True):
    n: _Count = 0
    mean: _Vector = ()
    m2: _Spread = ()


class _Window(Window, frozen=True, kw_only=True):
    uptime_s: _Amount = 0.0
    boot: _Boot = ""
    seconds: _Amount = 0.0
    model: _Label = ""
    digest: _Label = ""
    artefact: _Label = ""
    arm: _Label = ""
    merged: Annotated[int, msgspec.Meta(ge=1, le=_MAX_COUNT)] = 1
    frames: _Count = 0
    dropped: _Count = 0
    unreadable: _Count = 0
    uncertain: _Count = 0
    nonfinite: _Count = 0
    counts: _Counts = msgspec.field(default_factory=dict)
    confidence_bins: _Histograms = msgspec.field(default_factory=dict)
    confidence_sum: _Confidences = msgspec.field(default_factory=dict)
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
    ood_quantile: _Fraction | None = None
    ood_images: _Count = 0
    ood_reason: _Text = ""
    temperature_c: _Celsius | None = None
    throttled: _Labels = ()
    lost: _Counts = msgspec.field(default_factory=dict)


class _Event(Event, frozen=True, kw_only=True):
    uptime_s: _Amount = 0.0
    boot: _Boot = ""
    model: _Label = ""
    digest: _Label = ""
    artefact: _Label = ""
    arm: _Label = ""
    label: _Label = ""
    confidence: _Fraction = 0.0
    margin: _Fraction = 0.0
    entropy: _Fraction = 0.0
    top: _Top = msgspec.field(default_factory=dict)
    why: _Label = "sampled"
    command: _Label = ""
    source: _Text = ""


class _Profile(Profile, frozen=True, kw_only=True):
    uptime_s: _Amount = 0.0
    boot: _Boot = ""


class _Result(Result, frozen=True, kw_only=True):
    uptime_s: _Amount = 0.0
    boot: _Boot = ""
    id: _Label = ""
    name: _Label = ""


class _Identity(msgspec.Struct, frozen=True):
    """The identity fields of a header."""

    schema: Any = SCHEMA
    device: str = ""
    spool: str = ""
    sequence: int = -1


_TYPES: dict[str, type[Header]] = {
    "status": _Status,
    "window": _Window,
    "event": _Event,
    "profile": _Profile,
    "cmd/result": _Result,
}
_READERS: dict[str, msgspec.json.Decoder[Any]] = {kind: msgspec.json.Decoder(type_) for kind, type_ in _TYPES.items()}
_IDENTITY = msgspec.json.Decoder(_Identity)


class MessageId(msgspec.Struct, frozen=True):
    """Identity of a message (device, spool, sequence), and the site for its acknowledgement."""

    site: str
    device: str
    spool: str
    sequence: int


class ValidMessage(msgspec.Struct, frozen=True):
    """A message that can be stored."""

    kind: str
    id: MessageId
    """Identity of the message; a last will has an empty spool and sequence -1."""
    message: Header
    payload: str
    """The JSON text as received, with fields unknown to this version."""
    problem: str = ""
    """What of it this version cannot read; empty if it reads all."""

    @property
    def is_will(self) -> bool:
        """Whether it is a last will, sent by the broker for a lost device; it is not stored as a message."""
        return self.id.sequence < 0


class InvalidMessage(msgspec.Struct, frozen=True):
    """A message that is rejected."""

    reason: str
    id: MessageId | None = None
    """Its identity, if it can be read."""


def validate(topic: str, payload: bytes) -> ValidMessage | InvalidMessage:
    """Validate a payload received on a topic. Never raises."""
    match = _TOPIC.fullmatch(topic)
    if match is None:
        return InvalidMessage("not a topic of a device")
    site, device, kind = match.groups()
    if len(payload) > MAX_BYTES:
        return _invalid(f"{len(payload)} bytes; at most {MAX_BYTES} are accepted", site, device, payload)
    problem = ""
    try:
        text = payload.decode("utf-8")
        message, problem = read(kind, payload)
    except UnicodeDecodeError:
        return _invalid("not UTF-8", site, device, payload)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        return _invalid(f"invalid {kind}: {error}"[:300], site, device, payload)
    if message.device != device:
        return InvalidMessage(f"a message of device {message.device[:64]!r} on the topic of {device!r}")
    id_ = MessageId(site, device, message.spool, message.sequence)
    if message.schema < 1:
        return InvalidMessage(f"schema {message.schema}; there are 1 to {SCHEMA}", _valid_id(id_))
    is_will = kind == "status" and isinstance(message, Status) and _is_will(message)
    if not is_will and _valid_id(id_) is None:
        return InvalidMessage("no identity: a spool (UUID) and a sequence number >= 0 are needed")
    if not 0 <= message.time < 1e11:
        return InvalidMessage(f"time {message.time}: seconds since 1970 are needed", _valid_id(id_))
    if "\x00" in text:
        return InvalidMessage("contains a NUL character", _valid_id(id_))
    return ValidMessage(kind, id_, message, text, problem)


def read_again(kind: str, payload: str) -> Header | None:
    """Read a stored message that an earlier version could not read in full; None if this one cannot either."""
    try:
        message, problem = read(kind, payload.encode())
    except (msgspec.MsgspecError, ValueError, RecursionError):
        return None
    return None if problem else message


def read(kind: str, payload: bytes) -> tuple[Header, str]:
    """The message, and what of it this version cannot read. Raises `msgspec.MsgspecError` for an invalid one."""
    try:
        message: Header = _READERS[kind].decode(payload)
    except msgspec.ValidationError:
        schema = _IDENTITY.decode(payload).schema
        if type(schema) is not int or schema <= SCHEMA:
            raise
        return _read_newer(kind, payload)
    problem = f"schema {message.schema}; this version reads {SCHEMA}" if message.schema > SCHEMA else ""
    return message, problem


def _read_newer(kind: str, payload: bytes) -> tuple[Header, str]:
    """Read what can be read of a message of a newer schema, field by field; the header has to be readable."""
    fields = msgspec.json.decode(payload, type=dict[str, msgspec.Raw])
    read: dict[str, Any] = {}
    unread: list[str] = []
    for field in msgspec.structs.fields(_TYPES[kind]):
        if field.name in fields:
            try:
                read[field.name] = msgspec.json.decode(fields[field.name], type=field.type)
            except msgspec.ValidationError:
                if field.name in ("schema", "device", "spool", "sequence", "time"):
                    raise
                unread.append(field.name)
    message = _TYPES[kind](**read)
    return message, f"schema {message.schema}; this version reads {SCHEMA}, and not its {', '.join(unread)}"[:300]


def cleared_status(topic: str, payload: bytes) -> tuple[str, str] | None:
    """Site and device whose retained status is removed by this empty message, as after `eyas expel`; else None."""
    match = _TOPIC.fullmatch(topic)
    return (match[1], match[2]) if match and match[3] == "status" and not payload else None


def _is_will(message: Status) -> bool:
    return message.spool == "" and message.sequence == -1 and message.state == "lost"


def _valid_id(id_: MessageId) -> MessageId | None:
    """The identity, None if spool or sequence is invalid."""
    return id_ if 0 <= id_.sequence <= _MAX_SEQUENCE and _SPOOL.fullmatch(id_.spool) else None


def _invalid(reason: str, site: str, device: str, payload: bytes) -> InvalidMessage:
    """Reject a payload that could not be decoded, with its identity if that can."""
    if len(payload) > _READABLE:
        return InvalidMessage(reason)
    try:
        identity = _IDENTITY.decode(payload)
    except (msgspec.MsgspecError, ValueError, RecursionError):
        return InvalidMessage(reason)
    same = identity.device == device
    return InvalidMessage(
        reason, _valid_id(MessageId(site, device, identity.spool, identity.sequence)) if same else None
    )
