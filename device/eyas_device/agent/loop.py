"""The frame loop: capture, decode, preprocess, infer, notify the listeners.

A finite source (a folder, a video) is processed frame by frame. A live one is captured by a thread of its own into a
latest-frame buffer, where a newer frame replaces one that was not taken yet: a processed frame is never older than one
inference, however fast the camera is, and replaced frames are not even decoded.
"""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress

import msgspec

from eyas_device.agent.latest import Ended
from eyas_device.agent.sources import POLL_S, FiniteSource, LiveSource
from eyas_device.camera import Camera, Frame
from eyas_device.camera.reconnecting import CameraState, ReconnectingCamera
from eyas_device.errors import CameraLost, EyasError, ImageError
from eyas_device.predict import Classifier, Prediction

MAX_ERRORS = 10
"""Unexpected errors without a prediction between them after which the loop of a live camera ends."""
_PAUSE_S = 1.0
"""Pause after an unexpected error."""
_NOTICES, _NOTICE_S = 8, 10.0


class FramePrediction(msgspec.Struct, frozen=True):
    """Prediction for one frame, with its timing, as listeners get it."""

    number: int
    """Number of the frame since the start, from 0; unreadable ones are not counted."""
    source: str
    time: float
    """Time of the capture, seconds since 1970."""
    prediction: Prediction
    latency_ms: float
    """Decoding, preprocessing and inference."""
    decode_ms: float
    age_ms: float
    """From capture to prediction."""
    frame: Frame
    """The frame itself; valid only during the callback."""


class Listener:
    """Frame-loop callbacks, called synchronously between frames; they must not block. All default to no-ops."""

    def on_prediction(self, predicted: FramePrediction) -> None:
        """Called with each prediction."""

    def on_unreadable(self, error: ImageError) -> None:
        """Called for a frame that cannot be decoded or is black; the loop goes on with the next one."""

    def on_camera_state(self, state: CameraState) -> None:
        """Called when the camera's condition or reason changes; while it changes all the time, every ten seconds."""

    def on_model(self, classifier: Classifier) -> None:
        """Called with the first model and with each model that is swapped in."""

    def on_model_error(self, error: Exception) -> None:
        """Called when the model itself fails on a frame that could be decoded; `on_error` follows."""

    def on_error(self, error: Exception) -> None:
        """Called for an unexpected error of the loop, a model or a listener, after which a live loop goes on."""

    def on_tick(self) -> None:
        """Called in each round of the loop, with or without a frame, at least every tenth of a second."""


class Pace(msgspec.Struct, frozen=True, kw_only=True):
    """Frame rate, duty cycle and maximum age of a frame."""

    fps: float | None = None
    """Maximum frames a second; None: no limit."""
    duty: float = 1.0
    """Maximum fraction of the time spent working, above 0 to 1: the loop rests after each frame accordingly."""
    max_age_s: float | None = None
    """Maximum age of a live frame; older ones are dropped."""
    give_up_s: float | None = None
    """Time without any frame after which `CameraLost` is raised; None: never."""


class Loop:
    """Runs the model on the frames of a camera until the source ends or `stop` is called.

    `stop`, `pause` and `resume` never block; any thread and any signal handler may call them. Without a model the loop
    takes no frames until `swap` brings one.
    """

    def __init__(
        self,
        classifier: Classifier | None,
        camera: Camera,
        listeners: Sequence[Listener] = (),
        *,
        pace: Pace | None = None,
    ) -> None:
        self.classifier = classifier
        self._dropped = 0
        """Frames that were too old, and those that sources of earlier runs replaced."""
        self.errors = 0
        """Unexpected errors after which the loop went on."""
        self.pace = pace or Pace()
        """May be replaced while the loop runs."""
        self._camera = camera
        self.listeners = list(listeners)
        """Called in this order; may be extended before `run`."""
        self.on_replaced: Callable[[Classifier], None] = lambda classifier: classifier.close()
        """Called with a model that another one has replaced; by default it is closed."""
        # Plain flags: setting a threading.Event in a signal handler can deadlock with a wait on it.
        self._stopping = False
        self._paused = False
        self._swapping = threading.Lock()
        """Protects `_next` and `_ended`."""
        self._next: deque[Classifier] = deque()
        self._ended = False
        self._source: LiveSource | FiniteSource | None = None
        self._camera_state: CameraState | None = None
        self._notices = _Notices()
        self._errors_since = 0

    def stop(self) -> None:
        """Finish the current frame and return from `run`."""
        self._stopping = True

    def pause(self) -> None:
        """Process no frames until `resume`; the camera stays open."""
        self._paused = True

    def resume(self) -> None:
        """Continue after `pause`."""
        self._paused = False

    @property
    def dropped(self) -> int:
        """Live frames so far that were replaced by a newer one or too old."""
        source = self._source
        return self._dropped + (source.dropped if source is not None else 0)

    @property
    def paused(self) -> bool:
        """Whether the loop is paused."""
        return self._paused

    @property
    def ended(self) -> bool:
        """Whether `run` has returned; `swap` is useless then."""
        return self._ended

    def swap(self, classifier: Classifier) -> bool:
        """Use `classifier` from the next frame on; the loop closes the previous one, or what `on_replaced` does.

        False if the loop has ended: `classifier` is closed then. Not for signal handlers.
        """
        with self._swapping:
            if not self._ended:
                self._next.append(classifier)
                return True
        classifier.close()
        return False

    def run(self, *, frames: int | None = None) -> None:
        """Run until the source ends, `frames` were predicted, or `stop` is called; unreadable frames are skipped.

        With a live camera, unexpected errors are passed to `Listener.on_error` and the loop goes on, until
        `MAX_ERRORS` of them came without a prediction in between.

        Raises:
            CameraError: A finite source stopped delivering.
            CameraLost: A live source delivered nothing for `pace.give_up_s`.

        """
        with self._swapping:
            self._ended = False
        if self.classifier is not None:
            for listener in self.listeners:
                listener.on_model(self.classifier)
        source = LiveSource(self._camera) if self._camera.live else FiniteSource(self._camera)
        with source:
            self._source = source
            try:
                self._run(source, frames)
            finally:
                self._source, self._dropped = None, self.dropped
                self._notify_camera_state()
                with self._swapping:
                    self._ended = True
                    while self._next:  # came too late
                        self._next.popleft().close()

    def _run(self, source: LiveSource | FiniteSource, frames: int | None) -> None:
        turn = _Turn(frames)
        self._schedule(source, turn)
        while not self._stopping and not turn.ended:
            try:
                self._turn(source, turn)
            except EyasError:
                raise
            except Exception as error:
                self._on_error(error, live=source.live)

    def _turn(self, source: LiveSource | FiniteSource, turn: _Turn) -> None:
        """One turn of the loop, with or without a frame."""
        self._between_frames()
        if self._paused or self.classifier is None:
            self._rest(source, turn)
            return
        if turn.resting:  # a waiting frame is as old as the pause
            turn.resting, turn.due = False, time.monotonic()
            source.discard()
            self._schedule(source, turn)
        if (left := turn.due - time.monotonic()) > 0:
            time.sleep(min(left, POLL_S))
            return
        try:
            frame = source.take()
        except ImageError as error:
            turn.last = now = time.monotonic()
            self._notify_unreadable(error)
            turn.due = self._due(turn.due, now)
            self._schedule(source, turn)
            return
        now = time.monotonic()
        if isinstance(frame, Ended):
            turn.ended = True
            return
        if frame is None:
            self._check_silence(now - max(turn.last, turn.due))
            return
        turn.last = now
        if self.pace.max_age_s is not None and source.live and now - frame.captured > self.pace.max_age_s:
            self._dropped += 1
            self._schedule(source, turn)
            return
        if self._predict(self.classifier, frame, turn.number):
            self._errors_since = 0
            turn.count()
        turn.due = self._due(turn.due, now)
        self._schedule(source, turn)

    def _schedule(self, source: LiveSource | FiniteSource, turn: _Turn) -> None:
        """Ask for the next frame: with a pace one when it is due, else all of them."""
        paced = self.pace.fps is not None or self.pace.duty < 1
        source.schedule(turn.due if paced else None)

    def _rest(self, source: LiveSource | FiniteSource, turn: _Turn) -> None:
        """Wait without a model, or paused."""
        turn.last = time.monotonic()
        if not turn.resting:
            turn.resting = True
            source.schedule(math.inf)
        time.sleep(POLL_S)

    def _on_error(self, error: Exception, *, live: bool) -> None:
        """Go on after an unexpected error, or raise it."""
        self._errors_since += 1
        if not live or self._errors_since >= MAX_ERRORS:
            raise error
        self.errors += 1
        for listener in self.listeners:
            with suppress(Exception):
                listener.on_error(error)
        until = time.monotonic() + _PAUSE_S
        while not self._stopping and time.monotonic() < until:
            time.sleep(POLL_S)

    def _due(self, due: float, started: float) -> float:
        """Time at which the next frame may be taken, after the frame rate's interval and the duty cycle's rest."""
        now = time.monotonic()
        if self.pace.fps is not None:
            due = max(due, started - POLL_S) + 1.0 / self.pace.fps
        rest = (now - started) * (1.0 / self.pace.duty - 1.0)
        return max(due, now + rest) if rest > 0 else due

    def _predict(self, classifier: Classifier, frame: Frame, number: int) -> bool:
        started = time.perf_counter()
        try:
            pixels = frame.pixels(classifier.spec)
            decoded = time.perf_counter()
            prediction = classifier.predict(pixels)
        except ImageError as error:
            self._tell_camera(good=False)
            self._notify_unreadable(error)
            return False
        except Exception as error:
            for listener in self.listeners:
                listener.on_model_error(error)
            raise
        self._tell_camera(good=True)
        predicted = FramePrediction(
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
            listener.on_prediction(predicted)
        return True

    def _between_frames(self) -> None:
        while self._next:
            with self._swapping:
                previous, classifier = self.classifier, self._next.popleft()
                self.classifier = classifier
            if previous is not None:
                self.on_replaced(previous)
            for listener in self.listeners:
                listener.on_model(classifier)
        self._notify_camera_state()
        for listener in self.listeners:
            listener.on_tick()

    def _tell_camera(self, *, good: bool) -> None:
        """Tell a reconnecting camera whether its frame could be decoded."""
        if isinstance(self._camera, ReconnectingCamera):
            self._camera.decoded(good)

    def _notify_camera_state(self) -> None:
        state: CameraState | None = getattr(self._camera, "state", None)
        before = self._camera_state
        if state is None or state is before:
            return
        if before is None or (state.condition, state.reason) != (before.condition, before.reason):
            if state.condition != "closed" and not self._notices.allow(time.monotonic()):
                return
            for listener in self.listeners:
                listener.on_camera_state(state)
        self._camera_state = state

    def _notify_unreadable(self, error: ImageError) -> None:
        for listener in self.listeners:
            listener.on_unreadable(error)

    def _check_silence(self, silence: float) -> None:
        if self.pace.give_up_s is not None and silence > self.pace.give_up_s:
            state: CameraState | None = getattr(self._camera, "state", None)
            why = f": {state.reason}" if state is not None and state.reason else ""
            raise CameraLost(f"camera: no frame for {silence:.0f} s{why}")


class _Notices:
    """Bounds the notifications of a camera that keeps changing: `_NOTICES` at once, then one every `_NOTICE_S`."""

    def __init__(self) -> None:
        self._left, self._since = float(_NOTICES), time.monotonic()

    def allow(self, now: float) -> bool:
        """Whether one more notification is allowed now."""
        self._left = min(_NOTICES, self._left + (now - self._since) / _NOTICE_S)
        self._since = now
        if self._left < 1:
            return False
        self._left -= 1
        return True


class _Turn:
    """What one turn of the loop leaves to the next."""

    def __init__(self, frames: int | None) -> None:
        self.number = 0
        """Number of the next prediction."""
        self.ended = False
        self.resting = False
        """Whether the loop is paused or without a model."""
        self.due = self.last = time.monotonic()
        """When the next frame may be taken, and when something was last taken."""
        self._frames = frames

    def count(self) -> None:
        """Count a prediction; the last of the requested frames ends the loop."""
        self.number += 1
        self.ended = self.number == self._frames
