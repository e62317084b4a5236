"""Messages between a device and the fleet's host: plain JSON under `eyas/<site>/<device>/<kind>`.

Every message of a device carries device id, spool id and sequence number: its identity for deduplication. The last will
has none, because the broker publishes it after the device is gone. Every field has a default and unknown fields are
ignored, so that an older reader understands a newer sender. Enumerations are plain text on the wire: a word of tomorrow
is kept as it is, and `known` reads it as `unknown`. A field that changes its type or meaning needs another `SCHEMA`.
`docs/telemetry.md` has what is promised, with sizes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import zip_longest
from typing import Annotated, Any, Literal, TypeVar, get_args

import msgspec

from eyas_device.support.histogram import LogHistogram

SCHEMA = 1
TENTHS = 10
"""Bins of every histogram over 0..1."""
MAX_BYTES = 256 << 10
"""Maximum size of a message; readers refuse longer ones."""
GROWTH = 1.05
"""Ratio of neighbouring bins of a window's histograms of durations."""
CONFIDENCE_EDGES = (0.5, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.999)
"""Inner edges of a window's confidence bins, about evenly spaced on the logit: most of a good network's answers lie
above 0.9. A confidence on an edge is counted in the bin above it."""
_EMPTY = (0,) * TENTHS


Why = Literal["uncertain", "sampled", "ood", "command", "disagreement"]
"""Why a prediction became an event: confidence in the configured band, random sample, OOD camera, a command, or another
label than the previous model gave, which answered the same frame on probation."""
WHY: tuple[str, ...] = get_args(Why)
State = Literal["online", "offline", "lost"]
STATES: tuple[str, ...] = get_args(State)
UNKNOWN = "unknown"


def known(word: str, words: Iterable[str]) -> str:
    """Read a word of an enumeration: `unknown` if this version does not know it."""
    return word if word in words else UNKNOWN


class Header(msgspec.Struct, frozen=True, kw_only=True):
    """Fields that every message of a device starts with."""

    schema: int = SCHEMA
    """Version of the message schema."""
    device: str = ""
    """Name of the device."""
    spool: str = ""
    """UUID created with the spool; a device that lost its spool has a new one."""
    sequence: int = -1
    """Increases within a spool, by one while the agent runs; -1 in the last will."""
    time: float = 0.0
    """Seconds since 1970, UTC, by the device's clock."""
    uptime_s: float = 0.0
    """Seconds since the board started, by a clock that never jumps; 0 if unknown."""
    boot: str = ""
    """First 8 hex digits of the kernel's id of that start; empty if unknown."""
    synchronised: bool | None = None
    """Whether the device's clock was synchronised when the message was made; None if unknown."""


UpdateState = Literal["idle", "downloading", "installing", "probation", "committed", "rolled back", "refused", "failed"]
"""How far an update is. `refused`: not trusted, or not for this device; `failed`: to be tried again."""
UPDATE_STATES: tuple[str, ...] = get_args(UpdateState)


class Update(msgspec.Struct, frozen=True, kw_only=True):
    """The last update of a device's model, or of its agent, by a signed repository."""

    state: Annotated[str, msgspec.Meta(examples=list(UPDATE_STATES))] = "idle"
    """How far it is."""
    model: str = ""
    """`name version` that is or was to be installed; empty before the first update."""
    digest: str = ""
    """First 12 hex digits of its `identity`."""
    rollout: str = ""
    """Id of the rollout that asked for it; empty without one."""
    reason: str = ""
    """Why it was refused, failed or was rolled back, for people."""
    since: float = 0.0
    """When this state began, seconds since 1970 by the device's clock."""
    attempts: int = 0
    """Attempts so far."""
    channel: str = ""
    """Channel that the device follows."""
    group: str = ""
    """Group of the device in rollouts."""
    checked: float = 0.0
    """When the repository was last reached and found right, seconds since 1970; 0 if never."""
    clock: str = ""
    """Why expiry cannot be judged; empty if the clock can be trusted."""


class Status(Header, frozen=True, kw_only=True):
    """State of a device; retained. `online` at each connection, `offline` at a shutdown, `lost` as the last will."""

    state: Annotated[str, msgspec.Meta(examples=list(STATES))] = "lost"
    """`online`, `offline` (a regular shutdown) or `lost` (the last will, sent by the broker)."""
    agent: str = ""
    """Version of the agent."""
    model: str = ""
    """`name version` of the active bundle; empty while it is loaded, and if none is good."""
    digest: str = ""
    """First 12 hex digits of the sha256 of the active bundle's manifest."""
    artefact: str = ""
    """Active artefact of the bundle."""
    selection: str = ""
    """Why this artefact runs: as configured, the saved selection, the bundle's preference, or another runtime."""
    refused_model: str = ""
    """`name version` of the bundle that should run and was refused on the device."""
    refused_reason: str = ""
    """Why it was refused, or why no model runs, for people."""
    restarts: dict[str, int] = {}
    """Part of the agent (`loop`, `window`, `uplink`, `commands`, `spool`) -> errors after which it started again."""
    camera: str = ""
    """State of the camera: `delivering`, `opening`, `lost`, `frozen`, `black`, `resized`, or `degraded` (many broken
    frames)."""
    reason: str = ""
    """Reason for the camera's state, for people."""
    paused: bool = False
    """Whether the frame loop is paused."""
    ood: bool | None = None
    """Whether the camera is out of distribution; None if that is unknown (yet)."""
    ood_reason: str = ""
    """Why, for people: the statistic of the images that differs from the training images."""
    machine: str = ""
    """12 hex digits that identify the board: two boards with one device name differ here; empty if unknown."""
    certificate_days: float | None = None
    """Days until the device's client certificate expires; None without one."""
    paused_until: float | None = None
    """When a pause ends, seconds since 1970 by the device's clock; None if it is not paused, or without an end."""
    faults: tuple[str, ...] = ()
    """Further problems that people should know of, without passwords."""
    update: Update | None = None
    """The last update; None where none is configured."""
    agent_update: Update | None = None
    """The last update of the agent itself by a signed release; None where there was none."""


class Sketch(msgspec.Struct, frozen=True, kw_only=True):
    """Projections of the images on the principal directions of the training images; sketches can be merged.

    Source: Chan, Golub & LeVeque, "Updating Formulae and a Pairwise Algorithm for Computing Sample Variances", 1979.
    """

    n: int = 0
    """Measured images."""
    mean: tuple[float, ...] = ()
    """Mean per direction, up to 8, in standard deviations of the training images."""
    m2: tuple[float, ...] = ()
    """Sum of squared differences from the mean, per direction."""


class Window(Header, frozen=True, kw_only=True):
    """Aggregate of the predictions of a few seconds; its size does not depend on the frame rate."""

    seconds: float = 0.0
    """Duration, all merged windows together."""
    model: str = ""
    """`name version` of the bundle that made the predictions."""
    digest: str = ""
    """First 12 hex digits of the sha256 of its manifest: tells bundles of one name and version apart."""
    artefact: str = ""
    """Artefact of the bundle."""
    arm: str = ""
    """Arm of a comparison: `candidate` for a signed release on probation; empty without one."""
    merged: int = 1
    """Number of windows that were merged into this one."""
    frames: int = 0
    """Predictions."""
    dropped: int = 0
    """Frames that were skipped: replaced by a newer one, or too old."""
    unreadable: int = 0
    """Frames that could not be decoded or were black."""
    uncertain: int = 0
    """Predictions below the confidence threshold."""
    nonfinite: int = 0
    """Predictions with NaN or infinite probabilities; they are uncertain, with confidence 0."""
    counts: dict[str, int] = {}
    """Label -> predictions."""
    confidence_bins: dict[str, tuple[int, ...]] = {}
    """Label -> predictions per bin of confidence, between the ten bins' inner edges `CONFIDENCE_EDGES`."""
    confidence_sum: dict[str, float] = {}
    """Label -> sum of the calibrated confidences of its predictions."""
    confidence: dict[str, tuple[int, ...]] = {}
    """Label -> predictions per tenth of confidence, 0..1; from agents 0.1.0 only, which send no `confidence_bins`."""
    margin: tuple[int, ...] = _EMPTY
    """Predictions per tenth of the margin (best minus second-best probability)."""
    entropy: tuple[int, ...] = _EMPTY
    """Predictions per tenth of the entropy, normalised by log(classes)."""
    sketch: Sketch = Sketch()
    """Projections of the images, to detect drift."""
    latency_ms: dict[str, float] = {}
    """p50, p90, p99 and max of decode + preprocess + infer, milliseconds; from `latency_bins`, the maximum exact."""
    age_ms: dict[str, float] = {}
    """The same for the time from capture to prediction."""
    latency_bins: dict[int, int] = {}
    """Bin (see `LogHistogram`, growth 1.05) -> predictions."""
    age_bins: dict[int, int] = {}
    """The same for the age."""
    camera: str = ""
    """State of the camera, as in `Status`."""
    losses: int = 0
    """Number of times that the camera was lost since the start."""
    ood_quantile: float | None = None
    """Fraction of the validation images that are nearer to the training images than the camera's images, 0..1."""
    ood_images: int = 0
    """Camera images that `ood_quantile` was measured on."""
    ood_reason: str = ""
    """Why the camera is out of distribution, as in `Status`."""
    temperature_c: float | None = None
    """Processor temperature; None without a sensor."""
    throttled: tuple[str, ...] = ()
    """Current reasons for throttling of the processor, e.g. `under-voltage`."""
    lost: dict[str, int] = {}
    """What the spool evicted since the previous window: kind -> dropped messages, `merged` -> windows merged into
    others, `images` -> images removed from events, `corrupt` -> unreadable files and messages."""


class Event(Header, frozen=True, kw_only=True):
    """A single prediction worth a look, with its image if the privacy rules allow one."""

    model: str = ""
    """`name version` of the bundle that made the prediction."""
    digest: str = ""
    """First 12 hex digits of the sha256 of its manifest."""
    artefact: str = ""
    """Artefact of the bundle."""
    arm: str = ""
    """Arm of a comparison, as in `Window`."""
    label: str = ""
    """Predicted label."""
    confidence: float = 0.0
    """Calibrated confidence, 0..1."""
    margin: float = 0.0
    """Best minus second-best probability."""
    entropy: float = 0.0
    """Entropy of the probabilities, normalised by log(classes), 0..1."""
    top: dict[str, float] = {}
    """Up to five best labels -> probability."""
    why: Annotated[str, msgspec.Meta(examples=list(WHY))] = "sampled"
    """Reason for the event: confidence in the configured band, random sample, OOD camera, a command, or another label
    than the previous model gave."""
    previous_label: str = ""
    """Label that the previous model gave the same frame, of a disagreement; else empty."""
    previous_confidence: float = 0.0
    """Its calibrated confidence, 0..1."""
    command: str = ""
    """Id of the command that asked for it; empty for other reasons."""
    source: str = ""
    """Source of the frame, without passwords."""
    image: str = ""
    """JPEG in base64; empty without an image."""
    image_policy: dict[str, Any] = {}
    """How the image was processed, for how many days it may be kept and whether it may be trained on, or why there is
    none."""


class Profile(Header, frozen=True, kw_only=True):
    """Result of a benchmark on the device, as `eyas-device bench --json` writes it."""

    board: dict[str, Any] = {}
    """Machine: model, processor, cores, memory."""
    os: dict[str, Any] = {}
    """Operating system."""
    versions: dict[str, str] = {}
    """Package -> version."""
    pressure: dict[str, Any] = {}
    """CPU pressure before and after."""
    results: list[dict[str, Any]] = []
    """One entry for each runtime and artefact."""


class Ack(msgspec.Struct, frozen=True, kw_only=True):
    """Collector to device: sequences that are in the store, so that the device may forget them."""

    schema: int = SCHEMA
    """Version of the message schema, that of the acknowledged messages; a device ignores a newer one than its own."""
    device: str = ""
    """Name of the device whose messages are stored."""
    spool: str = ""
    """UUID of its spool."""
    ranges: tuple[tuple[int, int], ...] = ()
    """First and last sequence of each range, inclusive."""


class Command(msgspec.Struct, frozen=True, kw_only=True):
    """Host to device: a command with an expiry time."""

    schema: int = SCHEMA
    """Version of the message schema; a device refuses a newer one than its own."""
    id: str = ""
    """UUID; the result carries it, and a device executes each id only once."""
    name: str = ""
    """One of `eyas_device.config.COMMANDS`."""
    arguments: dict[str, str | float | bool] = {}
    """Argument -> text, number or truth value."""
    expires: float = 0.0
    """Expiry time, seconds since 1970."""
    issuer: str = ""
    """Who issued it, for people; the broker's access list decides who may."""


class Result(Header, frozen=True, kw_only=True):
    """Outcome of a command."""

    id: str = ""
    """Id of the command."""
    name: str = ""
    """Name of the command."""
    ok: bool = False
    """Whether it succeeded."""
    detail: str = ""
    """Outcome or reason, for people."""
    data: dict[str, Any] = {}
    """Output of the command."""


class Health(msgspec.Struct, frozen=True, kw_only=True):
    """Health snapshot of loop, camera and board for status and window."""

    selection: str = ""
    refused_model: str = ""
    refused_reason: str = ""
    restarts: dict[str, int] = {}
    camera: str = ""
    reason: str = ""
    losses: int = 0
    paused: bool = False
    dropped: int = 0
    """Frames dropped since the start."""
    ood_quantile: float | None = None
    ood_images: int = 0
    ood: bool | None = None
    ood_reason: str = ""
    temperature_c: float | None = None
    throttled: tuple[str, ...] = ()
    machine: str = ""
    certificate_days: float | None = None
    paused_until: float | None = None
    faults: tuple[str, ...] = ()
    update: Update | None = None
    agent_update: Update | None = None


KINDS: Mapping[str, type[Header]] = {
    "status": Status,
    "window": Window,
    "event": Event,
    "profile": Profile,
    "cmd/result": Result,
}
"""Message kinds of a device: end of the topic -> message type."""

Message = TypeVar("Message", bound=msgspec.Struct)


def encode(message: msgspec.Struct) -> bytes:
    """Encode a message as JSON."""
    return msgspec.json.encode(message)


def decode(data: bytes, kind: type[Message]) -> Message:
    """Decode a message of a known kind. Raises `msgspec.DecodeError` for anything else."""
    try:
        return msgspec.json.decode(data, type=kind)
    except (UnicodeDecodeError, RecursionError) as error:  # not UTF-8, or nested too deeply
        raise msgspec.DecodeError(f"not JSON: {error}") from None


def topic(site: str, device: str, kind: str) -> str:
    """Return the topic `eyas/<site>/<device>/<kind>`."""
    return f"eyas/{site}/{device}/{kind}"


def hint_topic(site: str, group: str) -> str:
    """Return the topic of retained hints that devices of a group should look for a release."""
    return f"eyas/{site}/group/{group}/desired"


def json_schema() -> bytes:
    """Return the JSON Schema (2020-12) of all messages, the content of `schema.json`."""
    kinds: tuple[type[msgspec.Struct], ...] = (*KINDS.values(), Ack, Command)
    _, definitions = msgspec.json.schema_components(kinds, ref_template="#/$defs/{name}")
    tree = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": f"Eyas telemetry, schema {SCHEMA}",
        "anyOf": [{"$ref": f"#/$defs/{kind.__name__}"} for kind in kinds],
        "$defs": definitions,
    }
    return msgspec.json.format(msgspec.json.encode(tree, order="sorted"), indent=1) + b"\n"


def merge(a: Window, b: Window) -> Window:
    """Merge two windows into one: counts are added, so the order of merging does not matter.

    Identity, time and momentary state (camera, losses, OOD) come from the window with the higher sequence;
    the temperature is the maximum, `throttled` the union. Raises `ValueError` for windows of different devices,
    models (digests too), artefacts or arms.
    """
    for name in ("device", "model", "digest", "artefact", "arm"):
        if getattr(a, name) != getattr(b, name):
            raise ValueError(f"windows of {name} {getattr(a, name)!r} and {getattr(b, name)!r} cannot be merged")
    newer = max(a, b, key=lambda window: (window.sequence, window.time, window.spool))
    latency_bins, age_bins = _sum(a.latency_bins, b.latency_bins), _sum(a.age_bins, b.age_bins)
    temperatures = [window.temperature_c for window in (a, b) if window.temperature_c is not None]
    return msgspec.structs.replace(
        newer,
        merged=a.merged + b.merged,
        seconds=a.seconds + b.seconds,
        frames=a.frames + b.frames,
        dropped=a.dropped + b.dropped,
        unreadable=a.unreadable + b.unreadable,
        uncertain=a.uncertain + b.uncertain,
        nonfinite=a.nonfinite + b.nonfinite,
        counts=_sum(a.counts, b.counts),
        confidence_bins=_add_each(a.confidence_bins, b.confidence_bins),
        confidence_sum={k: round(v, 2) for k, v in _sum(a.confidence_sum, b.confidence_sum).items()},
        confidence=_add_each(a.confidence, b.confidence),
        margin=_add(a.margin, b.margin),
        entropy=_add(a.entropy, b.entropy),
        sketch=_merge_sketches(a.sketch, b.sketch),
        latency_bins=latency_bins,
        age_bins=age_bins,
        latency_ms=_quantiles(latency_bins, a.latency_ms, b.latency_ms),
        age_ms=_quantiles(age_bins, a.age_ms, b.age_ms),
        temperature_c=max(temperatures, default=None),
        throttled=tuple(sorted({*a.throttled, *b.throttled})),
        lost=_sum(a.lost, b.lost),
    )


_Key = TypeVar("_Key", bound=Any)
_Number = TypeVar("_Number", int, float)


def _sum(a: Mapping[_Key, _Number], b: Mapping[_Key, _Number]) -> dict[_Key, _Number]:
    keys: set[_Key] = {*a, *b}
    return {key: a.get(key, 0) + b.get(key, 0) for key in sorted(keys)}


def _add_each(a: Mapping[str, tuple[int, ...]], b: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    return {label: _add(a.get(label, ()), b.get(label, ())) for label in sorted({*a, *b})}


def _add(a: Iterable[int], b: Iterable[int]) -> tuple[int, ...]:
    return tuple(x + y for x, y in zip_longest(a, b, fillvalue=0))


def _quantiles(bins: Mapping[int, int], a: Mapping[str, float], b: Mapping[str, float]) -> dict[str, float]:
    return LogHistogram(GROWTH, bins=bins, max_ms=max(a.get("max", 0.0), b.get("max", 0.0))).summary()


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
