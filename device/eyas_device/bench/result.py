"""The result of a benchmark: one JSON file, validated when it is read."""

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
_MAX_BYTES = 16 << 20

STAGES = ("decode", "prepare", "infer", "postprocess", "total")
"""Stages of a frame in the loop, in order; the last is their total."""

NonNegative = Annotated[float, msgspec.Meta(ge=0)]
Count = Annotated[int, msgspec.Meta(ge=0)]


class BenchError(EyasError, ValueError):
    """Invalid benchmark options, or a file that is not a benchmark result."""


class Quantiles(msgspec.Struct, frozen=True, kw_only=True):
    """Quantiles of durations, milliseconds."""

    count: Count
    p10: NonNegative
    p50: NonNegative
    p90: NonNegative
    p99: NonNegative
    max: NonNegative


class Start(msgspec.Struct, frozen=True, kw_only=True):
    """Start-up of a fresh process, medians over `runs`: milliseconds, and resident memory in 10^6 bytes."""

    runs: Count
    import_ms: NonNegative
    """Import of Python modules, OpenCV and the runtime."""
    load_ms: NonNegative
    """Hashing the bundle and loading the model."""
    first_ms: NonNegative
    """First prediction: preprocessing, inference, softmax."""
    to_first_ms: NonNegative
    """From the start of the process to the first prediction."""
    rss_mb: NonNegative | None = None
    """After a few predictions."""
    peak_rss_mb: NonNegative | None = None


class Result(msgspec.Struct, frozen=True, kw_only=True):
    """Measurements of one artefact on one runtime."""

    runtime: str
    runtime_version: str = ""
    artefact: str
    precision: str
    precision_hint: str = ""
    """Precision that the runtime was asked to compute in, where it has a choice."""
    model: Quantiles | None = None
    """Inference alone, on a prepared golden image."""
    model_per_second: NonNegative | None = None
    loop: dict[str, Quantiles] = {}
    """Stage (see `STAGES`) -> durations of whole frames: decoding, preprocessing, inference, postprocessing."""
    frames_per_second: NonNegative | None = None
    """Throughput of whole frames at full rate."""
    start: Start | None = None
    passed: bool | None = None
    """Whether it passed the golden check; None if not checked."""
    note: str = ""
    """Why something was not measured or did not pass."""


class Interval(msgspec.Struct, frozen=True, kw_only=True):
    """One interval of a sustained run, with the sensor readings at its end."""

    second: NonNegative
    """End of the interval, seconds since the start."""
    frames: Count
    frames_per_second: NonNegative
    p50: NonNegative
    """Milliseconds per whole frame, as the next two."""
    p90: NonNegative
    p99: NonNegative
    temperature_c: float | None = None
    frequency_mhz: NonNegative | None = None
    throttled: tuple[str, ...] | None = None
    """Causes of throttling; None is not measured."""
    watts: NonNegative | None = None


class Sustained(msgspec.Struct, frozen=True, kw_only=True):
    """A sustained run: minutes at full rate."""

    runtime: str
    artefact: str
    intervals: tuple[Interval, ...]
    drop: float | None = None
    """Fraction of the first interval's rate that the last one lost (negative: gained); None with one interval."""


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """Settings of the benchmark."""

    bundle: str
    bundle_version: str
    manifest_sha256: str
    input_size: Count
    """Side of the model's square input, pixels."""
    threads: Count
    mode: Literal["burst", "sustained"]
    seconds: NonNegative
    camera: str
    """Camera specification; empty: the golden images, encoded as JPEG."""
    frame: str
    """Size of the frames in the loop, `WIDTHxHEIGHT`."""


class CpuPressure(msgspec.Struct, frozen=True, kw_only=True):
    """CPU pressure around the measurement."""

    before: Pressure | None = None
    after: Pressure | None = None
    during: NonNegative | None = None
    """Fraction of the measurement in which a process waited for a core, 0..1."""


class Bench(msgspec.Struct, frozen=True, kw_only=True):
    """A complete benchmark result."""

    schema: int = SCHEMA
    time: float = 0.0
    """Start of the benchmark, seconds since 1970."""
    board: Board
    os: System
    versions: dict[str, str] = {}
    pressure: CpuPressure = CpuPressure()
    before: Vitals = Vitals()
    after: Vitals = Vitals()
    power: Power | None = None
    """At the end of the measurement, under load."""
    settings: Settings
    results: tuple[Result, ...] = ()
    sustained: Sustained | None = None
    notes: tuple[str, ...] = ()


def quantiles(milliseconds: Sequence[float]) -> Quantiles | None:
    """Quantiles of durations in milliseconds; None without any."""
    if not milliseconds:
        return None
    values = np.quantile(np.asarray(milliseconds, dtype=np.float64), (0.1, 0.5, 0.9, 0.99, 1.0))
    p10, p50, p90, p99, maximum = (round(float(value), 4) for value in values)
    return Quantiles(count=len(milliseconds), p10=p10, p50=p50, p90=p90, p99=p99, max=maximum)


def encode(tree: msgspec.Struct) -> bytes:
    """Encode a result as indented JSON."""
    return msgspec.json.format(msgspec.json.encode(tree), indent=1) + b"\n"


def write(path: Path, tree: msgspec.Struct) -> None:
    """Write a result atomically. Raises `BenchError` if the file cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and (path.is_symlink() or not path.is_file()):  # such as /dev/stdout
            path.write_bytes(encode(tree))
        else:
            atomic_write(path, encode(tree))
    except OSError as error:
        raise BenchError(f"{path}: cannot be written ({error.strerror})") from None


def read(path: Path) -> Bench:
    """Read a result. Raises `BenchError` if the file is not a result, or has another schema."""
    try:
        if not path.is_file():  # a pipe would block
            raise BenchError(f"{path}: no such file; `eyas-device bench --json FILE` writes one")
        with path.open("rb") as stream:
            data = stream.read(_MAX_BYTES + 1)
    except OSError as error:
        raise BenchError(f"{path}: {error.strerror}") from None
    if len(data) > _MAX_BYTES:
        raise BenchError(f"{path}: more than {_MAX_BYTES >> 20} MiB; not a benchmark result")
    try:
        schema = msgspec.json.decode(data, type=dict[str, msgspec.Raw]).get("schema")
        version = None if schema is None else msgspec.json.decode(schema)
        if version != SCHEMA:
            raise BenchError(f"{path}: schema {version!r}; schema {SCHEMA} is needed: measure again")
        return msgspec.json.decode(data, type=Bench)  # JSON has no NaN or infinity
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise BenchError(f"{path}: not a benchmark result ({error})") from None
