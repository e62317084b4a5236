"""The frame loop: capture, decode, prepare, infer, tell.

A finite source (a folder, a video) is answered frame by frame, none left out. A live one is captured by a thread of its
own into a slot with one place, where a newer frame replaces one that nobody looked at: the frame that is answered is
never older than one inference, however fast the camera is, and what was replaced was not even decoded.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Sequence
from types import TracebackType

import msgspec

from eyas_device.agent.latest import Ended, LatestFrame
from eyas_device.camera import Camera, Frame
from eyas_device.camera.reconnecting import CameraState
from eyas_device.errors import CameraError, CameraLost, ImageError
from eyas_device.predict import Classifier, Prediction

_NAP_S = 0.05
_JOIN_S = 10.0


class FramePrediction(msgspec.Struct, frozen=True):
    """One frame's answer, as listeners get it."""

    number: int
    """Of the frame since the start, from 0; unreadable ones are not counted."""
    source: str
    time: float
    """When the frame was captured, seconds since 1970."""
    prediction: Prediction
    latency_ms: float
    """Decoding, preprocessing and inference."""
    decode_ms: float
    age_ms: float
    """From capture to answer."""
    frame: Frame
    """What was looked at; not to be kept."""


class Listener:
    """Somebody who is told what happens, between two frames: it must not wait for anything. Says nothing by default."""

    def answered(self, answer: FramePrediction) -> None:
        """A frame was answered."""

    def unreadable(self, reason: ImageError) -> None:
        """A frame could not be decoded or shows nothing; the loop goes on with the next one."""

    def changed(self, camera: CameraState) -> None:
        """The camera is in another state than before."""

    def swapped(self, classifier: Classifier) -> None:
        """Another model answers from the next frame on; also told of the first one."""

    def turned(self) -> None:
        """The loop went round, with or without a frame, at least every tenth of a second: it is alive."""


class Pace(msgspec.Struct, frozen=True, kw_only=True):
    """How often to look, and how old a frame may be."""

    fps: float | None = None
    """At most so many frames a second; None: as many as it can."""
    duty: float = 1.0
    """Largest part of the time spent working, above 0 to 1: after each frame the loop rests for the remainder."""
    max_age_s: float | None = None
    """A live frame older than this when its turn comes is dropped."""
    give_up_s: float | None = None
    """Without any frame for so long, `CameraLost` is raised; None: never."""


class Loop:
    """Answers the frames of a camera until it ends or is told to stop.

    `stop`, `pause`, `resume` and `swap` may be called from any thread and from signal handlers: they wait for nothing.
    """

    def __init__(
        self, classifier: Classifier, camera: Camera, listeners: Sequence[Listener] = (), *, pace: Pace | None = None
    ) -> None:
        self.classifier = classifier
        self.dropped = 0
        """Live frames that were replaced or too old before they were looked at."""
        self._camera = camera
        self.listeners = list(listeners)
        """Told in this order; may be added to before `run`."""
        self._pace = pace or Pace()
        # Plain flags: setting a threading.Event in a signal handler can deadlock with a wait on it.
        self._stopping = False
        self._pausing = False
        self._next: deque[Classifier] = deque()
        self._seen: CameraState | None = None

    def stop(self) -> None:
        """Finish the frame in hand and return from `run`."""
        self._stopping = True

    def pause(self) -> None:
        """Answer nothing until `resume`; the camera stays open."""
        self._pausing = True

    def resume(self) -> None:
        """Go on after `pause`."""
        self._pausing = False

    @property
    def paused(self) -> bool:
        """Whether it was told to pause."""
        return self._pausing

    def swap(self, classifier: Classifier) -> None:
        """Let `classifier` answer from the next frame on; the loop closes the one before."""
        self._next.append(classifier)

    def run(self, *, frames: int | None = None) -> None:
        """Answer until the source ends, `frames` were answered, or `stop` was called.

        Frames that cannot be decoded are told to the listeners and skipped. Raises `CameraError` if a finite source
        stops delivering, and `CameraLost` if a live one gave nothing for `pace.give_up_s`.
        """
        for listener in self.listeners:
            listener.swapped(self.classifier)
        source = _Live(self._camera) if self._camera.live else _Finite(self._camera)
        with source:
            try:
                self._turn(source, frames)
            finally:
                self.dropped += source.dropped
                self._told_of_camera()
                while self._next:  # came too late
                    self._next.popleft().close()

    def _turn(self, source: _Live | _Finite, frames: int | None) -> None:
        number = 0
        due = last = time.monotonic()
        while not self._stopping and (frames is None or number < frames):
            self._between_frames()
            if self._pausing:
                time.sleep(_NAP_S)
                last = time.monotonic()
                continue
            if (left := due - time.monotonic()) > 0:
                time.sleep(min(left, _NAP_S))
                continue
            try:
                frame = source.take()
            except ImageError as error:
                last = time.monotonic()
                self._tell_unreadable(error)
                continue
            now = time.monotonic()
            if isinstance(frame, Ended):
                return
            if frame is None:
                self._give_up(now - last)
                continue
            last = now
            if self._pace.max_age_s is not None and source.live and now - frame.captured > self._pace.max_age_s:
                self.dropped += 1
                continue
            if self._answer(frame, number):
                number += 1
            due = self._due(due, now)

    def _due(self, due: float, started: float) -> float:
        """When the next frame may be taken: after the frame rate's interval, and after the duty cycle's rest."""
        now = time.monotonic()
        if self._pace.fps is not None:
            due = max(due, started - _NAP_S) + 1.0 / self._pace.fps
        rest = (now - started) * (1.0 / self._pace.duty - 1.0)
        return max(due, now + rest) if rest > 0 else due

    def _answer(self, frame: Frame, number: int) -> bool:
        started = time.perf_counter()
        try:
            pixels = frame.pixels(self.classifier.spec)
            decoded = time.perf_counter()
            prediction = self.classifier.predict(pixels)
        except ImageError as error:
            self._tell_unreadable(error)
            return False
        answer = FramePrediction(
            number=number,
            source=frame.source,
            time=frame.time,
            prediction=prediction,
            latency_ms=1000 * (time.perf_counter() - started),
            decode_ms=1000 * (decoded - started),
            age_ms=1000 * (time.monotonic() - frame.captured),
            frame=frame,
        )
        for listener in self.listeners:
            listener.answered(answer)
        return True

    def _between_frames(self) -> None:
        while self._next:
            before, self.classifier = self.classifier, self._next.popleft()
            before.close()
            for listener in self.listeners:
                listener.swapped(self.classifier)
        self._told_of_camera()
        for listener in self.listeners:
            listener.turned()

    def _told_of_camera(self) -> None:
        state: CameraState | None = getattr(self._camera, "state", None)
        if state is not None and (self._seen is None or state.condition != self._seen.condition):
            self._seen = state
            for listener in self.listeners:
                listener.changed(state)

    def _tell_unreadable(self, error: ImageError) -> None:
        for listener in self.listeners:
            listener.unreadable(error)

    def _give_up(self, silence: float) -> None:
        if self._pace.give_up_s is not None and silence > self._pace.give_up_s:
            state: CameraState | None = getattr(self._camera, "state", None)
            why = f": {state.reason}" if state is not None and state.reason else ""
            raise CameraLost(f"camera: no frame for {silence:.0f} s{why}")


class _Finite:
    """A source that waits for us: each frame is taken when its turn comes."""

    live = False
    dropped = 0

    def __init__(self, camera: Camera) -> None:
        self._camera = camera

    def __enter__(self) -> _Finite:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def take(self) -> Frame | Ended | None:
        """The next frame. Raises `ImageError` for one that is unusable and `CameraError` if the source fails."""
        frame = self._camera.capture()
        return Ended() if frame is None else frame


class _Live:
    """A thread that captures into the slot; what it raises is raised where frames are taken."""

    live = True

    def __init__(self, camera: Camera) -> None:
        self._camera = camera
        self._slot: LatestFrame = LatestFrame()
        self._leaving = False
        self._thread = threading.Thread(target=self._capture, name="capture", daemon=True)

    @property
    def dropped(self) -> int:
        """Frames that a newer one replaced."""
        return self._slot.replaced

    def __enter__(self) -> _Live:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._leaving = True
        self._camera.close()  # wakes a waiting capture
        self._thread.join(_JOIN_S)

    def take(self) -> Frame | Ended | None:
        """The newest frame, None if there is none soon. Raises what `Camera.capture` raised."""
        item = self._slot.take(_NAP_S)
        if isinstance(item, Exception):
            raise item
        return item

    def _capture(self) -> None:
        while not self._leaving:
            try:
                frame = self._camera.capture()
            except ImageError as error:
                self._slot.put(error)
            except CameraError as error:
                self._slot.put(error)
                return
            except Exception as error:  # a defect must end the loop, not leave it waiting for frames for ever
                self._slot.put(CameraError(f"camera: {type(error).__name__}: {error}"))
                raise
            else:
                if frame is None:
                    self._slot.put(Ended())
                    return
                self._slot.put(frame)
