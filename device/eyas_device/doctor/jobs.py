"""Jobs of the doctor that import libraries, run models and open cameras, each in a child process.

`support.processes.run_job` starts `main`, which reads a job's arguments as JSON from standard input and writes
`{"result": ...}` or `{"error": ..., "kind": ...}` to standard output.
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
_VIEW_FRAMES = 12


def libraries() -> dict[str, str]:
    """Import the libraries that the agent needs; returns module -> version."""
    names = ("numpy", "cv2", "msgspec", "paho.mqtt")
    return {name: str(getattr(importlib.import_module(name), "__version__", "")) for name in names}


def runtime(*, name: str, bundle: str, state: str, threads: int) -> dict[str, Any]:
    """Load a runtime and, if a bundle has an artefact for it, run a golden image.

    Returns `artefact` ("" if nothing was run) and `latency_ms`, the median of a few predictions.
    """
    from eyas_device.predict import Classifier
    from eyas_device.runtimes import artefact_runtime, load, open_runtime

    load(name)
    opened = _open_bundle(bundle, state)
    if opened is None or artefact_runtime(name) not in opened.runtimes():
        return {"artefact": "", "latency_ms": None}
    artefact = opened.artefact(artefact_runtime(name))
    frame = opened.golden().frames[0]
    with Classifier(opened, open_runtime(opened, name, artefact.name, threads=threads), artefact) as classifier:
        latencies = sorted(classifier.predict(frame).latency_ms for _ in range(ROUNDS))
        return {"artefact": artefact.name, "latency_ms": latencies[ROUNDS // 2]}


def golden(*, bundle: str, state: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Judge the bundle with the device's `[model]` settings, as the agent does.

    Returns `bundle` (name, version and folder; "" without one), `good` (which model runs, and why) and `notice`.
    """
    import msgspec

    from eyas_device.config import ModelSection
    from eyas_device.runtimes import use_engine_cache
    from eyas_device.updates.judge import prove

    opened = _open_bundle(bundle, state)
    if opened is None:
        return {"bundle": "", "good": "", "notice": ""}
    use_engine_cache(Path(state))
    proof = prove(opened.root, msgspec.convert(settings, ModelSection), Path(state))
    named = f"{opened.manifest.name} {opened.manifest.version} in {opened.root}"
    return {"bundle": named, "good": proof.good, "notice": proof.notice}


def camera(*, settings: dict[str, Any], frames: int, seconds: float) -> dict[str, Any]:
    """Open a camera as configured, but for its view, and capture `frames` frames or for `seconds`: what ends first.

    Returns `live`, `frames` (readable ones), `unreadable`, `fps` (None for less than two frames), `width`, `height`,
    `problems` (refused controls), `black` (no pixel of any frame is above the black level) and `same` (all frames are
    identical, byte for byte).
    Raises `CameraError` without any readable frame.
    """
    import msgspec

    from eyas_device.camera import open_configured
    from eyas_device.config import CameraSection
    from eyas_device.errors import CameraError, ImageError
    from eyas_device.support.redact import redact

    section = msgspec.convert(settings, CameraSection)
    unreadable, brightest, width, height = 0, 0, 0, 0
    checksums: list[int] = []
    times: list[float] = []
    with open_configured(msgspec.structs.replace(section, rotate=0, flip="none", region=())) as source:
        live, problems = source.live, list(getattr(source, "problems", ()))
        deadline = time.monotonic() + seconds
        while len(checksums) + unreadable < frames and time.monotonic() < deadline:
            try:
                if (frame := source.capture()) is None:
                    break
                pixels = frame.pixels()
            except ImageError:
                unreadable += 1
                continue
            height, width = pixels.shape[:2]
            brightest = max(brightest, int(pixels.max()))
            checksums.append(zlib.crc32(frame.image if isinstance(frame.image, bytes) else frame.image.tobytes()))
            times.append(frame.captured)
    if not checksums:
        name = redact(section.source)
        raise CameraError(f"camera {name}: it opened but delivered no readable frame ({unreadable} unreadable)")
    span = times[-1] - times[0]
    return {
        "live": live,
        "frames": len(checksums),
        "unreadable": unreadable,
        "fps": (len(checksums) - 1) / span if span > 0 else None,
        "width": width,
        "height": height,
        "black": brightest <= section.black_level,
        "problems": problems,
        "same": len(checksums) > 1 and len(set(checksums)) == 1,
    }


def view(*, bundle: str, state: str, settings: dict[str, Any], seconds: float) -> dict[str, Any]:
    """Judge whether the images of a camera (its `[camera]` settings) are in distribution.

    Returns `judgement` (a sentence; "" if the bundle has no reference or there were too few frames) and `ood`.
    """
    import msgspec

    from eyas_device.camera import open_configured
    from eyas_device.config import CameraSection
    from eyas_device.errors import ImageError
    from eyas_device.ood import OodJudge

    opened = _open_bundle(bundle, state)
    if opened is None or opened.manifest.reference is None:
        return {"judgement": "", "ood": False}
    detector = OodJudge(opened)
    with open_configured(msgspec.convert(settings, CameraSection)) as source:
        pause = seconds / _VIEW_FRAMES if source.live else 0.0
        deadline = due = time.monotonic()
        deadline += seconds
        count = 0
        while count < _VIEW_FRAMES and time.monotonic() < deadline:
            try:
                if (frame := source.capture()) is None:
                    break
                if time.monotonic() < due:
                    continue  # drain a live camera, so that the frames are from different moments
                detector.measure(frame.pixels(opened.manifest.preprocessing))
            except ImageError:
                continue
            count += 1
            due = time.monotonic() + pause
    judgement = detector.judgement()
    if judgement is None or not judgement.enough:
        return {"judgement": "", "ood": False}
    return {"judgement": str(judgement), "ood": judgement.ood}


def _open_bundle(bundle: str, state: str) -> Bundle | None:
    """Open the named bundle, else the one in the current slot; None without a good slot."""
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
"""Job name -> function."""


def main(arguments: list[str], jobs: Mapping[str, Callable[..., Any]] = JOBS) -> None:
    """Run one job and write its result; other output of its libraries goes to standard error.

    `arguments` are the job's name and the seconds after which the process ends itself, even if its parent is gone.
    """
    job, seconds = arguments
    signal.alarm(int(seconds))
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    with out:
        json.dump(reply(jobs[job], json.load(sys.stdin)), out)


def reply(job: Callable[..., Any], arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Call a job; its `result`, or its `error` and the `kind` of that."""
    try:
        return {"result": job(**arguments)}
    except Exception as error:  # any error is the finding
        return {"error": str(error) or type(error).__name__, "kind": type(error).__name__}
