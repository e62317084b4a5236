"""The complete benchmark of a bundle: measurements, sensors, versions and settings."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
from msgspec.structs import replace

from eyas_device.bench.measure import (
    Candidate,
    burst,
    camera_frames,
    golden_frames,
    load_candidates,
    prepared_image,
    select_candidates,
)
from eyas_device.bench.result import Bench, BenchError, CpuPressure, Interval, Result, Settings, Start
from eyas_device.bench.start import measure_starts
from eyas_device.bench.sustained import INTERVAL_S, sustain
from eyas_device.board import (
    ROOT,
    CommandRunner,
    Power,
    Pressure,
    Vitals,
    read_board,
    read_power,
    read_pressure,
    read_system,
    read_vitals,
)
from eyas_device.bundle import Bundle
from eyas_device.camera import Frame
from eyas_device.runtimes.selection import library_versions, manifest_sha256
from eyas_device.support.processes import run_command

STARTS = 3


@dataclass(frozen=True, kw_only=True)
class BenchOptions:
    """What to measure, and how."""

    bundle: Path
    runtime: str | None = None
    """None: the first that works here; with `everything`, all of them."""
    artefact: str | None = None
    everything: bool = False
    """All artefacts on all runtimes that work here."""
    threads: int = 1
    camera: str = ""
    """Camera specification; empty: the golden images."""
    seconds: float = 20.0
    """Duration per artefact."""
    sustained: bool = False
    starts: int = STARTS
    """Fresh processes per artefact; 0: none."""
    interval_s: float = INTERVAL_S
    """Length of an interval of a sustained run."""


Progress = Callable[[str, float, float], None]
"""Called with the current step, its completed fraction (0..1) and the estimated seconds until the end."""


def bench(
    options: BenchOptions,
    *,
    root: Path = ROOT,
    run: CommandRunner = run_command,
    progress: Progress = lambda text, done, left: None,
    on_interval: Callable[[Interval], None] = lambda interval: None,
) -> Bench:
    """Measure a bundle.

    Args:
        options: What to measure.
        root: Where the board's files are read.
        run: Runs the commands of the board's sensors.
        progress: Called about once per turn.
        on_interval: Called at the end of each interval of a sustained run.

    Raises:
        BundleError, RuntimeUnavailable, CameraError, BenchError: It cannot be measured.

    """
    bundle = Bundle.open(options.bundle)
    selections, notes = select_candidates(bundle, options.runtime, options.artefact, everything=options.everything)
    if options.sustained and len(selections) > 1:
        raise BenchError("a sustained run measures one artefact: name it, or omit --all")
    cv2.setNumThreads(options.threads)
    frames = camera_frames(options.camera, bundle) if options.camera else golden_frames(bundle)
    began, clock = time.time(), time.monotonic()
    before, pressure_before = read_vitals(root, run=run), read_pressure(root)
    busy_s = options.seconds * len(selections)

    def starts_progress(done: float) -> None:
        spent = time.monotonic() - clock
        progress("fresh processes", done, spent * (1 - done) / max(done, 1e-3) + busy_s)

    started = measure_starts(
        bundle, selections, threads=options.threads, rounds=options.starts, progress=starts_progress
    )
    sustained = None
    with load_candidates(bundle, selections, threads=options.threads) as (ready, results):

        def measure_progress(done: float) -> None:
            progress("sustained" if options.sustained else "taking turns", done, busy_s * (1 - done))

        if options.sustained:

            def read_sensors() -> tuple[Vitals, Power | None]:
                return read_vitals(root, run=run), read_power(root, run=run)

            sustained = sustain(
                ready[0],
                frames,
                seconds=options.seconds,
                read_sensors=read_sensors,
                on_interval=on_interval,
                progress=measure_progress,
                interval_s=options.interval_s,
            )
        else:
            burst(ready, prepared_image(bundle), frames, seconds=busy_s, progress=measure_progress)
        after, power, pressure_after = read_vitals(root, run=run), read_power(root, run=run), read_pressure(root)
        _add_measurements(results, ready, started)
    manifest = bundle.manifest
    return Bench(
        time=began,
        board=read_board(root),
        os=read_system(root),
        versions=library_versions(),
        pressure=_pressure(pressure_before, pressure_after, time.monotonic() - clock),
        before=before,
        after=after,
        power=power,
        settings=Settings(
            bundle=manifest.name,
            bundle_version=manifest.version,
            manifest_sha256=manifest_sha256(bundle),
            input_size=manifest.preprocessing.size,
            threads=options.threads,
            mode="sustained" if options.sustained else "burst",
            seconds=options.seconds,
            camera=options.camera,
            frame=_size(frames[0]),
        ),
        results=tuple(results.values()),
        sustained=sustained,
        notes=tuple(notes),
    )


def _add_measurements(
    results: dict[tuple[str, str], Result], ready: Sequence[Candidate], started: dict[tuple[str, str], Start]
) -> None:
    """Merge the measurements into the results of the golden check."""
    for candidate in ready:
        key = (candidate.selection.runtime, candidate.selection.artefact.name)
        checked = results[key]
        results[key] = replace(candidate.result(), passed=checked.passed, note=checked.note, start=started.get(key))


def _pressure(before: Pressure | None, after: Pressure | None, seconds: float) -> CpuPressure:
    during = None
    if before is not None and after is not None:
        during = round(max(0, after.total_us - before.total_us) * 1e-6 / max(seconds, 1e-3), 4)
    return CpuPressure(before=before, after=after, during=during)


def _size(frame: Frame) -> str:
    height, width = frame.pixels().shape[:2]
    return f"{width}x{height}"
