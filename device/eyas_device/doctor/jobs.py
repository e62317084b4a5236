"""The doctor's jobs that import libraries, run models and open cameras; each runs in a process of its own.

`run_job` starts `main`, which reads a job's arguments as JSON from standard input and writes `{"result": ...}` or
`{"error": ..., "kind": ...}` to standard output. Arguments and results are plain JSON.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import sys
import time
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from eyas_device.bundle import Bundle

ROUNDS = 5
_VIEWS = 12


def libraries() -> dict[str, str]:
    """Import what the agent needs: module -> version."""
    names = ("numpy", "cv2", "msgspec", "paho.mqtt")
    return {name: str(getattr(importlib.import_module(name), "__version__", "")) for name in names}


def runtime(*, name: str, bundle: str, state: str, threads: int) -> dict[str, Any]:
    """Load a runtime and, if there is a bundle with something for it, answer a golden image with it.

    Returns `artefact` ("" if nothing was run) and `latency_ms`, the median of a few answers.
    """
    from eyas_device.predict import Classifier
    from eyas_device.runtimes import load, open_runtime, runs

    load(name)
    opened = _bundle(bundle, state)
    if opened is None or runs(name) not in opened.manifest.use:
        return {"artefact": "", "latency_ms": None}
    artefact = opened.artefact(runs(name))
    frame = opened.golden().frames[0]
    with Classifier(opened, open_runtime(opened, name, artefact.name, threads=threads), artefact) as classifier:
        answers = [classifier.predict(frame) for _ in range(ROUNDS)]
        latencies = sorted(answer.latency_ms for answer in answers)
        return {"artefact": artefact.name, "latency_ms": latencies[ROUNDS // 2]}


def golden(*, bundle: str, state: str, threads: int) -> dict[str, Any]:
    """The golden check. Returns `bundle` (name, version and folder; "" without one) and `checked`, one row an artefact:
    `artefact`, `status`, `max_dp`, `latency_ms` and `note`.
    """
    from eyas_device.updates.golden import check

    opened = _bundle(bundle, state)
    if opened is None:
        return {"bundle": "", "checked": []}
    rows = [
        {key: getattr(row, key) for key in ("artefact", "status", "max_dp", "latency_ms", "note")}
        for row in check(opened, threads=threads)
    ]
    return {"bundle": f"{opened.manifest.name} {opened.manifest.version} in {opened.root}", "checked": rows}


def camera(*, spec: str, timeout_s: float, frames: int, seconds: float, black_level: float) -> dict[str, Any]:
    """Open a source and take up to `frames` frames or `seconds`, whichever is first.

    Returns `live`, `frames` (readable ones), `unreadable`, `fps` (None below two), `width`, `height`, `black` (no
    pixel of any frame is above `black_level`) and `same` (all frames are the same, byte for byte). Raises `CameraError`
    without any readable frame.
    """
    from eyas_device.camera import open_camera
    from eyas_device.errors import CameraError, ImageError

    unreadable, brightest, width, height = 0, 0, 0, 0
    sums: list[int] = []
    times: list[float] = []
    with open_camera(spec, timeout_s=timeout_s) as source:
        live = source.live
        deadline = time.monotonic() + seconds
        while len(sums) + unreadable < frames and time.monotonic() < deadline:
            try:
                if (frame := source.capture()) is None:
                    break
                pixels = frame.pixels()
            except ImageError:
                unreadable += 1
                continue
            height, width = pixels.shape[:2]
            brightest = max(brightest, int(pixels.max()))
            sums.append(zlib.crc32(frame.image if isinstance(frame.image, bytes) else frame.image.tobytes()))
            times.append(frame.captured)
    if not sums:
        raise CameraError(f"camera {spec}: it opened but delivered no image ({unreadable} unreadable)")
    span = times[-1] - times[0]
    return {
        "live": live,
        "frames": len(sums),
        "unreadable": unreadable,
        "fps": (len(sums) - 1) / span if span > 0 else None,
        "width": width,
        "height": height,
        "black": brightest <= black_level,
        "same": len(sums) > 1 and len(set(sums)) == 1,
    }


def view(*, bundle: str, state: str, spec: str, timeout_s: float, seconds: float) -> dict[str, Any]:
    """Whether the camera sees what the model was trained on.

    Returns `judged` (in words; "" if the bundle or the camera cannot say) and `ood`.
    """
    from eyas_device.camera import open_camera
    from eyas_device.errors import ImageError
    from eyas_device.ood import OodJudge

    opened = _bundle(bundle, state)
    if opened is None or opened.manifest.reference is None:
        return {"judged": "", "ood": False}
    detector = OodJudge(opened)
    with open_camera(spec, timeout_s=timeout_s) as source:
        pause = seconds / _VIEWS if source.live else 0.0
        deadline = due = time.monotonic()
        deadline += seconds
        looked = 0
        while looked < _VIEWS and time.monotonic() < deadline:
            try:
                if (frame := source.capture()) is None:
                    break
                if time.monotonic() < due:
                    continue  # a live camera is emptied, so that the next look is at another moment
                detector.measure(frame.pixels(opened.manifest.preprocessing))
            except ImageError:
                continue
            looked += 1
            due = time.monotonic() + pause
    judged = detector.judgement()
    if judged is None or not judged.enough:
        return {"judged": "", "ood": False}
    return {"judged": str(judged), "ood": judged.ood}


def _bundle(bundle: str, state: str) -> Bundle | None:
    """The bundle that is named, else the one in the current slot, None without a good slot. Verified."""
    from eyas_device.bundle import Bundle
    from eyas_device.updates.slots import Slots

    root = Path(bundle) if bundle else Slots(Path(state)).current()
    return None if root is None else Bundle.open(root)


JOBS: dict[str, Callable[..., Any]] = {
    "libraries": libraries,
    "runtime": runtime,
    "golden": golden,
    "camera": camera,
    "view": view,
}
"""Name -> function."""


def main(arguments: list[str], jobs: Mapping[str, Callable[..., Any]] = JOBS) -> None:
    """Run one of the jobs and write its result; what its libraries print goes to standard error.

    `arguments` are the job's name and the seconds after which the process ends itself, also when the one that started
    it is gone.
    """
    job, seconds = arguments
    signal.alarm(int(seconds))
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    try:
        answer: dict[str, Any] = {"result": jobs[job](**json.load(sys.stdin))}
    except Exception as error:  # whatever it is, it is the finding
        answer = {"error": str(error) or type(error).__name__, "kind": type(error).__name__}
    with out:
        json.dump(answer, out)
