"""Interleaved measurement of artefacts: the model alone on a prepared image, and whole frames stage by stage.

Artefacts take turns of 50 ms instead of being measured one after the other, so that a processor that heats up or gets
busy slows down all of them alike. The first call of each turn finds another model's data in the caches and is not
counted.
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
from eyas_device.runtimes import RUNTIMES, Logits, Runtime, Selection, artefact_runtime, choose, load, open_runtime
from eyas_device.support.closing import Closing
from eyas_device.updates.golden import check_contents, compare_to_golden

Progress = Callable[[float], None]
"""Called with the completed fraction, 0..1."""

_TURN_S = 0.05
_MIN_CALLS = 3
_CAMERA_FRAMES = 32
_CAMERA_TRIES = 200
_JPEG_QUALITY = 90


class TimedRuntime(Closing):
    """Runtime wrapper that times each inference, including the writing of the image."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self.name, self.version = runtime.name, runtime.version
        self.wall_ms = 0.0

    def infer(self, pixels: Pixels) -> Logits:
        return self._runtime.infer(pixels)

    def infer_in_place(self, write: Callable[[Pixels], object]) -> Logits:
        started = perf_counter()
        logits = self._runtime.infer_in_place(write)
        self.wall_ms = 1000 * (perf_counter() - started)
        return logits

    def close(self) -> None:
        self._runtime.close()


class Candidate(Closing):
    """One loaded artefact on one runtime, with its measurements."""

    def __init__(self, bundle: Bundle, selection: Selection, *, threads: int) -> None:
        self.selection = selection
        runtime = open_runtime(bundle, selection.runtime, selection.artefact.name, threads=threads)
        self.precision_hint: str = getattr(runtime, "precision_hint", "")
        self._timed = TimedRuntime(runtime)
        self.classifier = Classifier(bundle, self._timed, selection.artefact)
        self._model = array("d")
        self._loop = {stage: array("d") for stage in STAGES}

    def time_model(self, pixels: Pixels, *, record: bool) -> None:
        """Run the model alone on one prepared image."""
        started = perf_counter()
        self._timed.infer(pixels)
        if record:
            self._model.append(1000 * (perf_counter() - started))

    def time_frame(self, frame: Frame, *, record: bool) -> float:
        """Run one frame through all stages, as the frame loop does; returns milliseconds. May raise `ImageError`."""
        started = perf_counter()
        pixels = frame.pixels(self.classifier.spec)
        decoded = perf_counter()
        prediction = self.classifier.predict(pixels)
        ended = perf_counter()
        total = 1000 * (ended - started)
        if record:
            wall, prepared = self._timed.wall_ms, prediction.prepare_ms
            durations = (1000 * (decoded - started), prepared, wall - prepared, 1000 * (ended - decoded) - wall, total)
            for stage, milliseconds in zip(STAGES, durations, strict=True):
                self._loop[stage].append(max(0.0, milliseconds))
        return total

    def result(self) -> Result:
        """The measurements so far."""
        loop = {stage: durations for stage in STAGES if (durations := quantiles(self._loop[stage])) is not None}
        artefact = self.selection.artefact
        return Result(
            runtime=self.selection.runtime,
            runtime_version=self._timed.version,
            artefact=artefact.name,
            precision=artefact.precision,
            precision_hint=self.precision_hint,
            model=quantiles(self._model),
            model_per_second=_rate(self._model),
            loop=loop,
            frames_per_second=_rate(self._loop["total"]),
        )

    def close(self) -> None:
        self.classifier.close()


def select_candidates(
    bundle: Bundle, runtime: str | None, artefact: str | None, *, everything: bool
) -> tuple[list[Selection], list[str]]:
    """Select what to measure; also returns why runtimes were left out.

    Without `everything`, the selection of `eyas_device.runtimes.choose`. With it, all artefacts on all runtimes that
    work here (or only on `runtime`). Raises `BundleError` or `RuntimeUnavailable` if nothing is left.
    """
    if not everything:
        return [choose(bundle, runtime, artefact)], []
    selections: list[Selection] = []
    missing: list[str] = []
    for name in RUNTIMES if runtime is None else (runtime,):
        artefacts = [a for a in bundle.manifest.artefacts if a.known and a.runtime == artefact_runtime(name)]
        try:
            if artefacts:
                load(name)
        except RuntimeUnavailable as error:
            missing.append(str(error))
            continue
        selections += [Selection(name, a) for a in artefacts]
    if not selections:
        reason = "; ".join(missing) or f"no artefact for runtime {runtime}"
        raise RuntimeUnavailable(f"{bundle.root}: nothing can be measured: {reason}")
    return selections, missing


@contextmanager
def load_candidates(
    bundle: Bundle, selections: Sequence[Selection], *, threads: int
) -> Iterator[tuple[list[Candidate], dict[tuple[str, str], Result]]]:
    """Load the selections and run their golden check; yields the candidates and a result for each selection.

    One that does not load is left out, with the reason in its result. Raises `BenchError` if none loads, and what
    `check_contents` raises.
    """
    golden = check_contents(bundle)
    ready: list[Candidate] = []
    results: dict[tuple[str, str], Result] = {}
    with ExitStack() as stack:
        for selection in selections:
            key = (selection.runtime, selection.artefact.name)
            blank = Result(runtime=key[0], artefact=key[1], precision=selection.artefact.precision)
            try:
                candidate = stack.enter_context(Candidate(bundle, selection, threads=threads))
                checked = compare_to_golden(candidate.classifier, golden)
            except EyasError as error:
                if len(selections) == 1:
                    raise
                results[key] = replace(blank, note=str(error))
                continue
            ready.append(candidate)
            results[key] = replace(blank, passed=checked.status == "ok", note=checked.note)
        if not ready:
            raise BenchError(f"{bundle.root}: no artefact can be loaded: {next(iter(results.values())).note}")
        yield ready, results


def golden_frames(bundle: Bundle) -> list[Frame]:
    """The golden images as JPEG frames, as a camera would deliver them."""
    options = [cv2.IMWRITE_JPEG_QUALITY, _JPEG_QUALITY]
    encoded = [cv2.imencode(".jpg", image, options)[1].tobytes() for image in bundle.golden().frames]
    return [Frame(image=data, time=0.0, source=f"golden#{number}") for number, data in enumerate(encoded)]


def camera_frames(spec: str, bundle: Bundle) -> list[Frame]:
    """Record frames of a camera, so that waiting for it is not measured; undecodable frames are left out.

    Raises `CameraError` if it does not open or stops, and `BenchError` without any decodable frame.
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
            frames.append(Frame(image=image, time=frame.time, source=frame.source, view=frame.view))
            if len(frames) == _CAMERA_FRAMES:
                break
    if not frames:
        raise BenchError(f"camera {spec}: no frame that can be decoded")
    return frames


def burst(
    ready: Sequence[Candidate], pixels: Pixels, frames: Sequence[Frame], *, seconds: float, progress: Progress
) -> None:
    """Let all candidates take turns for `seconds` in total: the model alone on `pixels`, then whole frames."""
    source = cycle(frames)
    started = perf_counter()
    while True:
        for candidate in ready:
            _turn(lambda record, c=candidate: c.time_model(pixels, record=record))  # type: ignore[misc]
            _turn(lambda record, c=candidate: c.time_frame(next(source), record=record))  # type: ignore[misc]
        done = (perf_counter() - started) / seconds
        progress(min(done, 1.0))
        if done >= 1:
            return


def prepared_image(bundle: Bundle) -> Pixels:
    """The first golden image as model input."""
    return prepare(bundle.golden().frames[0], bundle.manifest.preprocessing)


def _turn(call: Callable[[bool], object]) -> None:
    call(False)
    ends = perf_counter() + _TURN_S
    calls = 0
    while calls < _MIN_CALLS or perf_counter() < ends:
        call(True)
        calls += 1


def _rate(milliseconds: array[float]) -> float | None:
    """Calls per second, back to back."""
    return round(1000 * len(milliseconds) / sum(milliseconds), 2) if milliseconds else None
