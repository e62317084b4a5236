"""The result of a benchmark: one JSON file, validated again when it is read."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import msgspec
import numpy as np

from eyas_device.board import Board, Power, Pressure, System, Vitals
from eyas_device.errors import EyasError
from eyas_device.support.files import atomic_write

SCHEMA = 1
_MOST_BYTES = 16 << 20

STAGES = ("decode", "prepare", "infer", "postprocess", "total")
"""Of a frame in the loop, in order; the last is all of them together."""

Figure = Annotated[float, msgspec.Meta(ge=0)]
Count = Annotated[int, msgspec.Meta(ge=0)]


class BenchError(EyasError, ValueError):
    """A benchmark cannot be run as asked, or a file of its figures is none."""


class Quantiles(msgspec.Struct, frozen=True, kw_only=True):
    """Durations, milliseconds."""

    count: Count
    p10: Figure
    p50: Figure
    p90: Figure
    p99: Figure
    max: Figure


class Start(msgspec.Struct, frozen=True, kw_only=True):
    """A fresh process, medians over `runs`; milliseconds, and resident memory in 10^6 bytes."""

    runs: Count
    import_ms: Figure
    """Python modules, OpenCV and the runtime."""
    load_ms: Figure
    """Hashing the bundle and loading the model."""
    first_ms: Figure
    """The first answer: preprocessing, inference, softmax."""
    to_first_ms: Figure
    """From the start of the process to the first answer."""
    rss_mb: Figure | None = None
    """After a few answers."""
    peak_rss_mb: Figure | None = None


class Result(msgspec.Struct, frozen=True, kw_only=True):
    """One artefact on one runtime."""

    runtime: str
    runtime_version: str = ""
    artefact: str
    precision: str
    precision_hint: str = ""
    """What the runtime was told to compute in, where it can be told."""
    model: Quantiles | None = None
    """Inference alone, on a prepared golden image."""
    model_per_second: Figure | None = None
    loop: dict[str, Quantiles] = {}
    """Stage (see `STAGES`) -> durations of frames that are decoded, prepared, inferred and turned into an answer."""
    frames_per_second: Figure | None = None
    """Through all stages, as many as it can."""
    start: Start | None = None
    passed: bool | None = None
    """Whether the golden images gave the recorded answers; None where that was not checked."""
    note: str = ""
    """Why something was not measured or did not pass."""


class Interval(msgspec.Struct, frozen=True, kw_only=True):
    """Some seconds of a sustained run, and how the board felt at their end."""

    second: Figure
    """Since the start, at its end."""
    frames: Count
    frames_per_second: Figure
    p50: Figure
    """Milliseconds of the whole frame, as the next two."""
    p90: Figure
    p99: Figure
    temperature_c: float | None = None
    frequency_mhz: Figure | None = None
    throttled: tuple[str, ...] | None = None
    """What slowed the processor down; None is not measured."""
    watts: Figure | None = None


class Sustained(msgspec.Struct, frozen=True, kw_only=True):
    """Minutes at full rate."""

    runtime: str
    artefact: str
    intervals: tuple[Interval, ...]
    drop: float | None = None
    """Part of the first interval's rate that the last one lost (negative: gained); None with one interval."""


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """What was asked for."""

    bundle: str
    bundle_version: str
    manifest_sha256: str
    input_size: Count
    """Side of the model's square input, pixels."""
    threads: Count
    mode: Literal["burst", "sustained"]
    seconds: Figure
    camera: str
    """Its specification; empty: the golden images, encoded as JPEG."""
    frame: str
    """Size of the frames in the loop, `WIDTHxHEIGHT`."""


class Waited(msgspec.Struct, frozen=True, kw_only=True):
    """Pressure on the processor around the measurement."""

    before: Pressure | None = None
    after: Pressure | None = None
    during: Figure | None = None
    """Part of the time of the measurement in which some process waited for a core, 0..1."""


class Bench(msgspec.Struct, frozen=True, kw_only=True):
    """All of it."""

    schema: int = SCHEMA
    time: float = 0.0
    """When it began, seconds since 1970."""
    board: Board
    os: System
    versions: dict[str, str] = {}
    pressure: Waited = Waited()
    before: Vitals = Vitals()
    after: Vitals = Vitals()
    power: Power | None = None
    """At the end of the measurement, under load."""
    settings: Settings
    results: tuple[Result, ...] = ()
    sustained: Sustained | None = None
    notes: tuple[str, ...] = ()


def quantiles(milliseconds: Sequence[float]) -> Quantiles | None:
    """Of durations; None without any."""
    if not milliseconds:
        return None
    parts = np.quantile(np.asarray(milliseconds, dtype=np.float64), (0.1, 0.5, 0.9, 0.99, 1.0))
    p10, p50, p90, p99, most = (round(float(part), 4) for part in parts)
    return Quantiles(count=len(milliseconds), p10=p10, p50=p50, p90=p90, p99=p99, max=most)


def encode(tree: msgspec.Struct) -> bytes:
    """A result as JSON text."""
    return msgspec.json.format(msgspec.json.encode(tree), indent=1) + b"\n"


def write(path: Path, tree: msgspec.Struct) -> None:
    """Write a result. Raises `BenchError` if the file cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and (path.is_symlink() or not path.is_file()):  # such as /dev/stdout
            path.write_bytes(encode(tree))
        else:
            atomic_write(path, encode(tree))
    except OSError as error:
        raise BenchError(f"{path}: cannot be written ({error.strerror})") from None


def read(path: Path) -> Bench:
    """Read a result back. Raises `BenchError` naming what is wrong if it is none, or one of another schema."""
    try:
        if not path.is_file():  # a pipe would block
            raise BenchError(f"{path}: there is no such file; `eyas-device bench --json FILE` writes one")
        with path.open("rb") as stream:
            data = stream.read(_MOST_BYTES + 1)
    except OSError as error:
        raise BenchError(f"{path}: {error.strerror}") from None
    if len(data) > _MOST_BYTES:
        raise BenchError(f"{path}: more than {_MOST_BYTES >> 20} MiB; that is no benchmark's result")
    try:
        schema = msgspec.json.decode(data, type=dict[str, msgspec.Raw]).get("schema")
        version = None if schema is None else msgspec.json.decode(schema)
        if version != SCHEMA:
            raise BenchError(f"{path}: schema {version!r}; schema {SCHEMA} is needed: measure again")
        return msgspec.json.decode(data, type=Bench)  # JSON has no figures that are not finite
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise BenchError(f"{path}: not a benchmark's result ({error})") from None
