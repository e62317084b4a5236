"""Start-up of a fresh process: time from import to the first prediction, and memory.

The process calls `main` with bundle, runtime, artefact, threads and the time at which it was spawned; it prints JSON.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from time import monotonic
from typing import TYPE_CHECKING

from eyas_device.support.opencv import silence_opencv
from eyas_device.support.processes import module_command, run_command

if TYPE_CHECKING:
    from eyas_device.bench.result import Start
    from eyas_device.bundle import Bundle
    from eyas_device.runtimes import Selection

_TIMEOUT_S = 180.0
_PREDICTIONS = 20
_FIELDS = ("import_ms", "load_ms", "first_ms", "to_first_ms", "rss_mb", "peak_rss_mb")


def measure_starts(
    bundle: Bundle, selections: Sequence[Selection], *, threads: int, rounds: int, progress: Callable[[float], None]
) -> dict[tuple[str, str], Start]:
    """Medians over `rounds` fresh processes per selection, interleaved; a selection that fails has no entry."""
    from statistics import median

    from eyas_device.bench.result import Start

    rows: dict[tuple[str, str], list[dict[str, float | None]]] = {}
    for number in range(rounds):
        for index, selection in enumerate(selections):
            key = (selection.runtime, selection.artefact.name)
            row = _measure_start(str(bundle.root.absolute()), *key, str(threads))
            if row is not None:
                rows.setdefault(key, []).append(row)
            progress((number * len(selections) + index + 1) / (rounds * len(selections)))
    medians = {}
    for key, measured in rows.items():
        known = {f: [v for row in measured if (v := row[f]) is not None] for f in _FIELDS}
        quantiles = {f: round(median(values), 2) for f, values in known.items() if values}
        medians[key] = Start(runs=len(measured), **quantiles)
    return medians


def _measure_start(*arguments: str) -> dict[str, float | None] | None:
    """Measurements of one process; None if it failed or took longer than three minutes."""
    import msgspec

    output = run_command(module_command(__name__, *arguments, repr(monotonic())), _TIMEOUT_S)
    try:
        row = msgspec.json.decode(output or "", type=dict[str, float | None])
    except msgspec.DecodeError:
        return None
    return row if set(row) == set(_FIELDS) else None


def main(arguments: list[str]) -> None:
    """Import, load, predict; print the measurements."""
    began = monotonic()
    root, runtime, artefact, threads, spawned = arguments
    silence_opencv()
    import cv2
    import msgspec
    import numpy as np

    from eyas_device.board import read_memory
    from eyas_device.predict import Classifier
    from eyas_device.runtimes import load

    cv2.setNumThreads(int(threads))
    load(runtime)
    imported = monotonic()
    with Classifier.open(root, runtime, artefact, threads=int(threads)) as classifier:
        ready = monotonic()
        frame = np.full((480, 640, 3), 128, dtype=np.uint8)
        classifier.predict(frame)
        predicted = monotonic()
        for _ in range(_PREDICTIONS):
            classifier.predict(frame)
        memory = read_memory()
    measurements = {
        "import_ms": 1000 * (imported - began),
        "load_ms": 1000 * (ready - imported),
        "first_ms": 1000 * (predicted - ready),
        "to_first_ms": 1000 * (predicted - float(spawned)),
        "rss_mb": memory.rss_mb if memory else None,
        "peak_rss_mb": memory.peak_rss_mb if memory else None,
    }
    print(msgspec.json.encode(measurements).decode())
