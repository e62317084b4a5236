"""The whole benchmark of a bundle: what is measured in which order, and what stands around the figures."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import cv2
from msgspec.structs import replace

from eyas_device.bench.measure import (
    Candidate,
    burst,
    camera_frames,
    candidates,
    golden_frames,
    loaded,
    prepared_image,
)
from eyas_device.bench.result import Bench, BenchError, Interval, Result, Settings, Start, Waited
from eyas_device.bench.start import starts
from eyas_device.bench.sustained import INTERVAL_S, sustain
from eyas_device.board import (
    ROOT,
    Power,
    Pressure,
    Runner,
    Vitals,
    read_board,
    read_power,
    read_pressure,
    read_system,
    read_vitals,
)
from eyas_device.bundle import Bundle
from eyas_device.camera import Frame
from eyas_device.runtimes.selection import manifest_sha256
from eyas_device.support.processes import run_command

STARTS = 3
_PACKAGES = (
    "eyas",
    "ai-edge-litert",
    "tflite-runtime",
    "tensorflow",
    "openvino",
    "onnxruntime",
    "onnxruntime-gpu",
    "numpy",
    "opencv-python-headless",
    "opencv-python",
    "msgspec",
)


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What to measure, and how."""

    bundle: Path
    runtime: str | None = None
    """None: the first that works here, or all of them with `everything`."""
    artefact: str | None = None
    everything: bool = False
    """All artefacts on all runtimes that work here."""
    threads: int = 1
    camera: str = ""
    """Empty: the golden images."""
    seconds: float = 20.0
    """Of measuring, for each artefact."""
    sustained: bool = False
    starts: int = STARTS
    """Fresh processes for each artefact; 0 leaves that out."""
    interval_s: float = INTERVAL_S
    """Of a sustained run."""


Progress = Callable[[str, float, float], None]
"""Told at what it works, how much of that is done (0..1), and about how many seconds the rest of all takes."""


def bench(
    wanted: Wanted,
    *,
    root: Path = ROOT,
    run: Runner = run_command,
    progress: Progress = lambda text, done, left: None,
    told: Callable[[Interval], None] = lambda interval: None,
) -> Bench:
    """Measure. `root` and `run` are where the board's sensors are read; `told` hears of each sustained interval.

    Raises `BundleError`, `RuntimeUnavailable`, `CameraError` or `BenchError` if it cannot be done.
    """
    bundle = Bundle.open(wanted.bundle)
    chosen, notes = candidates(bundle, wanted.runtime, wanted.artefact, everything=wanted.everything)
    if wanted.sustained and len(chosen) > 1:
        raise BenchError("a sustained run takes one artefact: name it, or leave out --all")
    cv2.setNumThreads(wanted.threads)
    frames = camera_frames(wanted.camera, bundle) if wanted.camera else golden_frames(bundle)
    began, clock = time.time(), time.monotonic()
    before, pressed = read_vitals(root, run=run), read_pressure(root)
    busy_s = wanted.seconds * len(chosen)

    def starting(done: float) -> None:
        spent = time.monotonic() - clock
        progress("fresh processes", done, spent * (1 - done) / max(done, 1e-3) + busy_s)

    started = starts(bundle, chosen, threads=wanted.threads, rounds=wanted.starts, progress=starting)
    sustained = None
    with loaded(bundle, chosen, threads=wanted.threads) as (ready, results):

        def measuring(done: float) -> None:
            progress("sustained" if wanted.sustained else "taking turns", done, busy_s * (1 - done))

        if wanted.sustained:

            def feel() -> tuple[Vitals, Power | None]:
                return read_vitals(root, run=run), read_power(root, run=run)

            sustained = sustain(
                ready[0],
                frames,
                seconds=wanted.seconds,
                feel=feel,
                told=told,
                progress=measuring,
                interval_s=wanted.interval_s,
            )
        else:
            burst(ready, prepared_image(bundle), frames, seconds=busy_s, progress=measuring)
        after, power, pressure = read_vitals(root, run=run), read_power(root, run=run), read_pressure(root)
        _fill(results, ready, started)
    manifest = bundle.manifest
    return Bench(
        time=began,
        board=read_board(root),
        os=read_system(root),
        versions=_versions(),
        pressure=_waited(pressed, pressure, time.monotonic() - clock),
        before=before,
        after=after,
        power=power,
        settings=Settings(
            bundle=manifest.name,
            bundle_version=manifest.version,
            manifest_sha256=manifest_sha256(bundle),
            input_size=manifest.preprocessing.size,
            threads=wanted.threads,
            mode="sustained" if wanted.sustained else "burst",
            seconds=wanted.seconds,
            camera=wanted.camera,
            frame=_size(frames[0]),
        ),
        results=tuple(results.values()),
        sustained=sustained,
        notes=tuple(notes),
    )


def _fill(
    results: dict[tuple[str, str], Result], ready: Sequence[Candidate], started: dict[tuple[str, str], Start]
) -> None:
    """Put what was measured beside what the golden check said."""
    for candidate in ready:
        key = (candidate.chosen.runtime, candidate.chosen.artefact.name)
        checked = results[key]
        results[key] = replace(candidate.result(), passed=checked.passed, note=checked.note, start=started.get(key))


def _waited(before: Pressure | None, after: Pressure | None, seconds: float) -> Waited:
    during = None
    if before is not None and after is not None:
        during = round(max(0, after.total_us - before.total_us) * 1e-6 / max(seconds, 1e-3), 4)
    return Waited(before=before, after=after, during=during)


def _versions() -> dict[str, str]:
    """Of the installed packages that figures depend on."""
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def _size(frame: Frame) -> str:
    height, width = frame.pixels().shape[:2]
    return f"{width}x{height}"
