"""Artefacts taking turns: the model alone on a prepared image, and the whole frame stage by stage.

What is compared is measured in turns of a twentieth of a second, never one after the other: a processor that grows hot
or busy then slows down all of them alike. The first call of each turn finds another model's data in the caches and is
not counted.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import cycle
from time import perf_counter

import cv2
from msgspec.structs import replace

from eyas_device.bench.result import STAGES, BenchError, Result, quantiles
from eyas_device.bundle import Bundle
from eyas_device.camera import Frame, open_camera
from eyas_device.errors import EyasError, ImageError, RuntimeUnavailable
from eyas_device.predict import Classifier
from eyas_device.preprocess import Pixels, prepare
from eyas_device.runtimes import RUNTIMES, Logits, Runtime, Selection, choose, load, open_runtime, runs
from eyas_device.support.closing import Closing
from eyas_device.updates.golden import compare

Progress = Callable[[float], None]
"""Told how much is done, 0..1."""

_TURN_S = 0.05
_LEAST_CALLS = 3
_CAMERA_FRAMES = 32
_CAMERA_TRIES = 200
_JPEG_QUALITY = 90


class Timed(Closing):
    """A runtime that says how long its last answer took, the writing of the image included."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self.name, self.version = runtime.name, runtime.version
        self.wall_ms = 0.0

    def infer(self, pixels: Pixels) -> Logits:
        """As the runtime's own."""
        return self._runtime.infer(pixels)

    def infer_written(self, write: Callable[[Pixels], object]) -> Logits:
        """As the runtime's own, timed."""
        started = perf_counter()
        logits = self._runtime.infer_written(write)
        self.wall_ms = 1000 * (perf_counter() - started)
        return logits

    def close(self) -> None:
        """Free the model."""
        self._runtime.close()


class Candidate(Closing):
    """One artefact on one runtime, loaded, and what was measured of it."""

    def __init__(self, bundle: Bundle, chosen: Selection, *, threads: int) -> None:
        self.chosen = chosen
        runtime = open_runtime(bundle, chosen.runtime, chosen.artefact.name, threads=threads)
        self.hint: str = getattr(runtime, "precision_hint", "")
        self._timed = Timed(runtime)
        self.classifier = Classifier(bundle, self._timed, chosen.artefact)
        self._model = array("d")
        self._loop = {stage: array("d") for stage in STAGES}

    def infer(self, pixels: Pixels, *, keep: bool) -> None:
        """The model alone on one prepared image."""
        started = perf_counter()
        self._timed.infer(pixels)
        if keep:
            self._model.append(1000 * (perf_counter() - started))

    def answer(self, frame: Frame, *, keep: bool) -> float:
        """One frame through all stages, as the frame loop does it; returns milliseconds. May raise `ImageError`."""
        started = perf_counter()
        pixels = frame.pixels(self.classifier.spec)
        decoded = perf_counter()
        prediction = self.classifier.predict(pixels)
        ended = perf_counter()
        total = 1000 * (ended - started)
        if keep:
            wall, prepared = self._timed.wall_ms, prediction.prepare_ms
            parts = (1000 * (decoded - started), prepared, wall - prepared, 1000 * (ended - decoded) - wall, total)
            for stage, milliseconds in zip(STAGES, parts, strict=True):
                self._loop[stage].append(max(0.0, milliseconds))
        return total

    def result(self) -> Result:
        """What was measured so far."""
        loop = {stage: found for stage in STAGES if (found := quantiles(self._loop[stage])) is not None}
        artefact = self.chosen.artefact
        return Result(
            runtime=self.chosen.runtime,
            runtime_version=self._timed.version,
            artefact=artefact.name,
            precision=artefact.precision,
            precision_hint=self.hint,
            model=quantiles(self._model),
            model_per_second=_rate(self._model),
            loop=loop,
            frames_per_second=_rate(self._loop["total"]),
        )

    def close(self) -> None:
        """Free the model."""
        self.classifier.close()


def candidates(
    bundle: Bundle, runtime: str | None, artefact: str | None, *, everything: bool
) -> tuple[list[Selection], list[str]]:
    """What to measure, and what was left out and why.

    Without `everything`, the one that `eyas_device.runtimes.choose` takes. With it, all artefacts on all runtimes that
    work here (or on `runtime` alone). Raises `BundleError` or `RuntimeUnavailable` if nothing is left.
    """
    if not everything:
        return [choose(bundle, runtime, artefact)], []
    wanted: list[Selection] = []
    missing: list[str] = []
    for name in RUNTIMES if runtime is None else (runtime,):
        artefacts = [a for a in bundle.manifest.artefacts if a.runtime == runs(name)]
        try:
            if artefacts:
                load(name)
        except RuntimeUnavailable as error:
            missing.append(str(error))
            continue
        wanted += [Selection(name, a) for a in artefacts]
    if not wanted:
        reason = "; ".join(missing) or f"no artefact for runtime {runtime}"
        raise RuntimeUnavailable(f"{bundle.root}: nothing can be measured: {reason}")
    return wanted, missing


@contextmanager
def loaded(
    bundle: Bundle, wanted: Sequence[Selection], *, threads: int
) -> Iterator[tuple[list[Candidate], dict[tuple[str, str], Result]]]:
    """Candidates that are loaded and have answered the golden images, and a result for each of `wanted`.

    One that does not load is left out, and its result says why; if none loads, its error is raised.
    """
    golden = bundle.golden()
    ready: list[Candidate] = []
    results: dict[tuple[str, str], Result] = {}
    with ExitStack() as stack:
        for chosen in wanted:
            key = (chosen.runtime, chosen.artefact.name)
            blank = Result(runtime=key[0], artefact=key[1], precision=chosen.artefact.precision)
            try:
                candidate = stack.enter_context(Candidate(bundle, chosen, threads=threads))
                checked = compare(candidate.classifier, golden)
            except EyasError as error:
                if len(wanted) == 1:
                    raise
                results[key] = replace(blank, note=str(error))
                continue
            ready.append(candidate)
            results[key] = replace(blank, passed=checked.status == "ok", note=checked.note)
        if not ready:
            raise BenchError(f"{bundle.root}: no artefact can be loaded: {next(iter(results.values())).note}")
        yield ready, results


def golden_frames(bundle: Bundle) -> list[Frame]:
    """The golden images as a camera would deliver them: JPEG."""
    options = [cv2.IMWRITE_JPEG_QUALITY, _JPEG_QUALITY]
    encoded = [cv2.imencode(".jpg", image, options)[1].tobytes() for image in bundle.golden().frames]
    return [Frame(image=data, time=0.0, source=f"golden#{number}") for number, data in enumerate(encoded)]


def camera_frames(spec: str, bundle: Bundle) -> list[Frame]:
    """Frames of a camera, recorded first so that waiting for it is not measured; those that do not decode are left out.

    Raises `CameraError` if it does not open or stops, and `BenchError` if it delivers nothing that can be decoded.
    """
    frames: list[Frame] = []
    with open_camera(spec) as camera:
        for _ in range(_CAMERA_TRIES):
            try:
                frame = camera.capture()
                if frame is None:
                    break
                frame.pixels(bundle.manifest.preprocessing)
            except ImageError:
                continue
            image = frame.image if isinstance(frame.image, bytes) else frame.image.copy()
            frames.append(Frame(image=image, time=frame.time, source=frame.source))
            if len(frames) == _CAMERA_FRAMES:
                break
    if not frames:
        raise BenchError(f"camera {spec}: no frame that can be decoded")
    return frames


def burst(
    ready: Sequence[Candidate], pixels: Pixels, frames: Sequence[Frame], *, seconds: float, progress: Progress
) -> None:
    """Let all candidates take turns for `seconds` in all: each the model alone on `pixels`, then whole frames."""
    source = cycle(frames)
    started = perf_counter()
    while True:
        for candidate in ready:
            _turn(lambda keep, c=candidate: c.infer(pixels, keep=keep))  # type: ignore[misc]
            _turn(lambda keep, c=candidate: c.answer(next(source), keep=keep))  # type: ignore[misc]
        done = (perf_counter() - started) / seconds
        progress(min(done, 1.0))
        if done >= 1:
            return


def prepared_image(bundle: Bundle) -> Pixels:
    """The first golden image as the model takes it."""
    return prepare(bundle.golden().frames[0], bundle.manifest.preprocessing)


def _turn(call: Callable[[bool], object]) -> None:
    call(False)
    ends = perf_counter() + _TURN_S
    made = 0
    while made < _LEAST_CALLS or perf_counter() < ends:
        call(True)
        made += 1


def _rate(milliseconds: array[float]) -> float | None:
    """Calls a second if one follows the other."""
    return round(1000 * len(milliseconds) / sum(milliseconds), 2) if milliseconds else None
