"""Messages between a device and the fleet's host: plain JSON under `eyas/<site>/<device>/<kind>`.

Every message of a device carries device id, spool id and sequence number: its identity for de-duplication. The will is
written by the broker when a device is already gone, so it has none. Every field has a default and unknown fields are
ignored: an older reader understands a newer sender. `docs/telemetry.md` has the same as a table, with sizes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from itertools import zip_longest
from typing import Any, Literal, TypeVar

import msgspec

SCHEMA = 1
TENTHS = 10
"""Bins of every histogram of a share, 0..1."""
MOST_BYTES = 256 << 10
"""A message above it is refused by whoever reads it."""
_FINEST_MS = 0.01
_STEP = math.log(1.05)
_LAST_BIN = 450
_NONE = (0,) * TENTHS


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
    ood: bool | None = None
    """Whether the camera does not see what the model was trained on; None if that cannot be told (yet)."""


class Sketch(msgspec.Struct, frozen=True, kw_only=True):
    """Where the images lie along the principal directions of the training images; sketches can be added.

    Source: Chan, Golub & LeVeque, "Updating Formulae and a Pairwise Algorithm for Computing Sample Variances", 1979.
    """

    n: int = 0
    """Images that were measured."""
    mean: tuple[float, ...] = ()
    """Per direction, up to 8, in units of the training images' standard deviation."""
    m2: tuple[float, ...] = ()
    """Sum of the squared differences from the mean, per direction."""


class Window(Header, frozen=True, kw_only=True):
    """What happened in the last few seconds; its size does not depend on the frame rate."""

    seconds: float = 0.0
    model: str = ""
    artefact: str = ""
    arm: str = ""
    """Of an A/B comparison; empty outside of one."""
    merged: int = 1
    """How many windows this one stands for."""
    frames: int = 0
    dropped: int = 0
    """Frames replaced by a newer one, or too old, before they were looked at."""
    unreadable: int = 0
    """Frames that could not be decoded, or showed nothing."""
    uncertain: int = 0
    """Answers below the bundle's confidence threshold."""
    counts: dict[str, int] = {}
    """Label -> answers."""
    confidence: dict[str, tuple[int, ...]] = {}
    """Label -> answers per tenth of confidence, 0..1."""
    margin: tuple[int, ...] = _NONE
    """Answers per tenth of the best probability minus the second best."""
    entropy: tuple[int, ...] = _NONE
    """Answers per tenth of the probabilities' entropy divided by log(classes)."""
    sketch: Sketch = Sketch()
    latency_ms: dict[str, float] = {}
    """p50, p90, p99 and max of decode + preprocess + infer, milliseconds; from `latency_bins`, the maximum exact."""
    age_ms: dict[str, float] = {}
    """The same of the time from capture to answer."""
    latency_bins: dict[int, int] = {}
    """Bin (see `duration_bin`) -> answers."""
    age_bins: dict[int, int] = {}
    camera: str = ""
    """As in the status."""
    losses: int = 0
    """How often the camera was lost since the start."""
    ood_quantile: float | None = None
    """Part of the validation images that are nearer to the training images than what this camera sees, 0..1."""
    temperature_c: float | None = None
    """Of the processor; None where there is no sensor."""
    throttled: tuple[str, ...] = ()
    """What slows the processor down at this moment, e.g. `under-voltage`."""
    lost: dict[str, int] = {}
    """What the spool gave up since the window before: kind -> messages, `merged` -> windows that others stand for,
    `images` -> images taken out of events, `corrupt` -> files and messages that could not be read."""


class Event(Header, frozen=True, kw_only=True):
    """One image that is worth a look."""

    model: str = ""
    artefact: str = ""
    arm: str = ""
    label: str = ""
    confidence: float = 0.0
    margin: float = 0.0
    """The best probability minus the second best."""
    entropy: float = 0.0
    """Of the probabilities, divided by log(classes), 0..1."""
    top: dict[str, float] = {}
    """The best labels, at most five -> probability."""
    why: Literal["uncertain", "sampled", "ood", "command"] = "sampled"
    source: str = ""
    """Where the frame is from, without passwords."""
    image: str = ""
    """JPEG in base64; empty: none was sent."""
    image_policy: dict[str, Any] = {}
    """What was done to the image, or why there is none, and for how many days it may be kept."""


class Profile(Header, frozen=True, kw_only=True):
    """What a benchmark on the device measured, as `eyas-device bench` writes it."""

    board: dict[str, Any] = {}
    os: dict[str, Any] = {}
    versions: dict[str, str] = {}
    pressure: dict[str, Any] = {}
    results: list[dict[str, Any]] = []


class Ack(msgspec.Struct, frozen=True, kw_only=True):
    """Collector to device: these sequences are in the store, so the device may forget them."""

    schema: int = SCHEMA
    device: str = ""
    spool: str = ""
    ranges: tuple[tuple[int, int], ...] = ()
    """First and last sequence of each, both included."""


"""What a device may be told to do; its configuration says which of them it obeys."""


class Command(msgspec.Struct, frozen=True, kw_only=True):
    """Host to device: do something, before it is too late."""

    schema: int = SCHEMA
    id: str = ""
    """UUID; the result carries it, and a device obeys each only once."""
    name: str = ""
    """One of `eyas_device.config.COMMANDS`."""
    arguments: dict[str, str | float | bool] = {}
    expires: float = 0.0
    """Seconds since 1970: afterwards it is refused."""
    issuer: str = ""
    """Who says so, for people; the broker's access list decides who may."""


class Result(Header, frozen=True, kw_only=True):
    """What became of a command."""

    id: str = ""
    """Of the command."""
    name: str = ""
    ok: bool = False
    detail: str = ""
    """In words."""
    data: dict[str, Any] = {}


class Health(msgspec.Struct, frozen=True, kw_only=True):
    """How the loop, its camera and its board feel at a moment: what status and window say beside the answers."""

    camera: str = ""
    reason: str = ""
    losses: int = 0
    paused: bool = False
    dropped: int = 0
    """Since the start."""
    ood_quantile: float | None = None
    ood: bool | None = None
    temperature_c: float | None = None
    throttled: tuple[str, ...] = ()


KINDS: Mapping[str, type[Header]] = {
    "status": Status,
    "window": Window,
    "event": Event,
    "profile": Profile,
    "cmd/result": Result,
}
"""End of the topic -> what a device sends there."""

Message = TypeVar("Message", bound=msgspec.Struct)


def encode(message: msgspec.Struct) -> bytes:
    """A message as JSON bytes."""
    return msgspec.json.encode(message)


def decode(data: bytes, kind: type[Message]) -> Message:
    """Read a message of a known kind. Raises `msgspec.DecodeError` for bytes that are none."""
    try:
        return msgspec.json.decode(data, type=kind)
    except (UnicodeDecodeError, RecursionError) as error:  # text that is no UTF-8, brackets within brackets
        raise msgspec.DecodeError(f"not JSON: {error}") from None


def topic(site: str, device: str, kind: str) -> str:
    """`eyas/<site>/<device>/<kind>`."""
    return f"eyas/{site}/{device}/{kind}"


def json_schema() -> bytes:
    """The JSON Schema (2020-12) of all messages, as `schema.json` holds it."""
    kinds: tuple[type[msgspec.Struct], ...] = (*KINDS.values(), Ack, Command)
    _, definitions = msgspec.json.schema_components(kinds, ref_template="#/$defs/{name}")
    tree = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": f"Eyas telemetry, schema {SCHEMA}",
        "anyOf": [{"$ref": f"#/$defs/{kind.__name__}"} for kind in kinds],
        "$defs": definitions,
    }
    return msgspec.json.format(msgspec.json.encode(tree, order="sorted"), indent=1) + b"\n"


def duration_bin(milliseconds: float) -> int:
    """The bin of a duration: bin 0 is 0.01 ms and shorter, and each bin is 5 % longer than the one before."""
    if not milliseconds > _FINEST_MS:
        return 0
    return min(round(math.log(min(milliseconds, 1e12) / _FINEST_MS) / _STEP), _LAST_BIN)


def durations(bins: Mapping[int, int], longest: float) -> dict[str, float]:
    """p50, p90, p99 and max, milliseconds, of a histogram of durations; a quantile is right within 2.5 %.

    Empty if nothing was counted.
    """
    total, seen = sum(bins.values()), 0
    if not total:
        return {}
    wanted = [("p50", 0.5), ("p90", 0.9), ("p99", 0.99)]
    found: dict[str, float] = {}
    for number, count in sorted(bins.items()):
        seen += count
        while wanted and seen >= wanted[0][1] * total:
            found[wanted.pop(0)[0]] = round(min(_FINEST_MS * math.exp(_STEP * number), longest), 3)
    return found | {"max": round(longest, 3)}


def merge(a: Window, b: Window) -> Window:
    """Merge two windows into one: counts are added, so the order of merging does not matter.

    Identity, time and momentary state (camera, losses, OOD quantile) come from the window with the higher sequence;
    the temperature is the maximum, `throttled` the union. Raises `ValueError` for windows of different devices,
    models, artefacts or arms.
    """
    for name in ("device", "model", "artefact", "arm"):
        if getattr(a, name) != getattr(b, name):
            raise ValueError(f"windows of {name} {getattr(a, name)!r} and {getattr(b, name)!r} cannot be merged")
    newer = max(a, b, key=lambda window: (window.sequence, window.time, window.spool))
    latency_bins, age_bins = _sum(a.latency_bins, b.latency_bins), _sum(a.age_bins, b.age_bins)
    warm = [window.temperature_c for window in (a, b) if window.temperature_c is not None]
    return msgspec.structs.replace(
        newer,
        merged=a.merged + b.merged,
        seconds=a.seconds + b.seconds,
        frames=a.frames + b.frames,
        dropped=a.dropped + b.dropped,
        unreadable=a.unreadable + b.unreadable,
        uncertain=a.uncertain + b.uncertain,
        counts=_sum(a.counts, b.counts),
        confidence={
            label: _add(a.confidence.get(label, ()), b.confidence.get(label, ()))
            for label in sorted({*a.confidence, *b.confidence})
        },
        margin=_add(a.margin, b.margin),
        entropy=_add(a.entropy, b.entropy),
        sketch=_merge_sketches(a.sketch, b.sketch),
        latency_bins=latency_bins,
        age_bins=age_bins,
        latency_ms=durations(latency_bins, max(a.latency_ms.get("max", 0.0), b.latency_ms.get("max", 0.0))),
        age_ms=durations(age_bins, max(a.age_ms.get("max", 0.0), b.age_ms.get("max", 0.0))),
        temperature_c=max(warm, default=None),
        throttled=tuple(sorted({*a.throttled, *b.throttled})),
        lost=_sum(a.lost, b.lost),
    )


_Key = TypeVar("_Key", bound=Any)


def _sum(a: Mapping[_Key, int], b: Mapping[_Key, int]) -> dict[_Key, int]:
    keys: set[_Key] = {*a, *b}
    return {key: a.get(key, 0) + b.get(key, 0) for key in sorted(keys)}


def _add(a: Iterable[int], b: Iterable[int]) -> tuple[int, ...]:
    return tuple(x + y for x, y in zip_longest(a, b, fillvalue=0))


def _merge_sketches(a: Sketch, b: Sketch) -> Sketch:
    if not (a.n and b.n):
        return a if a.n else b
    n = a.n + b.n
    pairs = tuple(zip(a.mean, b.mean, strict=False))
    return Sketch(
        n=n,
        mean=tuple((a.n * x + b.n * y) / n for x, y in pairs),
        m2=tuple(
            (p + q) + (x - y) * (x - y) * (a.n * b.n / n) for (x, y), p, q in zip(pairs, a.m2, b.m2, strict=False)
        ),
    )
