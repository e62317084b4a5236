"""The frame loop: capture, decode, prepare, infer, tell. One frame after the other, none left out."""

from __future__ import annotations

import signal
import time
from collections.abc import Sequence
from types import FrameType, TracebackType
from typing import Protocol

import msgspec

from eyas_device.camera import Camera
from eyas_device.errors import PictureError
from eyas_device.predict import Classifier, Prediction

_NAP_S = 0.05


class Answer(msgspec.Struct, frozen=True):
    """One frame's answer, as listeners get it."""

    number: int
    """Of the frame since the start, from 0; unreadable ones are not counted."""
    source: str
    time: float
    """When the frame was captured, seconds since 1970."""
    prediction: Prediction
    latency_ms: float
    """Decoding, preprocessing and inference."""


class Listener(Protocol):
    """Somebody who is told of every frame, between two frames: it must not wait for anything."""

    def answered(self, answer: Answer) -> None:
        """A frame was answered."""

    def unreadable(self, reason: PictureError) -> None:
        """A frame could not be decoded; the loop goes on with the next one."""


class Stop:
    """SIGINT and SIGTERM, inside of its `with` block, ask the loop to finish its frame and return.

    A second signal of the same kind acts as if this were not here. Main thread only.
    """

    def __init__(self) -> None:
        # A plain flag: setting a threading.Event in a signal handler can deadlock with a wait on it.
        self._requested = False
        self._before: dict[int, signal.Handlers | None] = {}

    def requested(self) -> bool:
        """Whether a signal arrived."""
        return self._requested

    def __enter__(self) -> Stop:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._on_signal)  # type: ignore[assignment]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._requested = True
        signal.signal(number, self._before[number])


def run(
    classifier: Classifier,
    camera: Camera,
    listeners: Sequence[Listener] = (),
    *,
    frames: int | None = None,
    fps: float | None = None,
    stop: Stop | None = None,
) -> None:
    """Answer for every frame of `camera` until it ends, `frames` were answered, or `stop` was requested.

    `fps` is the highest rate, frames per second; without it, as fast as it goes. Frames that cannot be decoded are told
    to the listeners and skipped. Raises `CameraError` if the source stops delivering.
    """
    stop = stop or Stop()
    number = 0
    due = time.monotonic()
    while not stop.requested() and (frames is None or number < frames):
        if fps is not None:
            due = _wait(due, stop) + 1.0 / fps
            if stop.requested():
                return
        try:
            frame = camera.capture()
            if frame is None:
                return
            started = time.perf_counter()
            prediction = classifier.predict(frame.pixels())
        except PictureError as error:
            for listener in listeners:
                listener.unreadable(error)
            continue
        latency_ms = 1000 * (time.perf_counter() - started)
        answer = Answer(number, frame.source, frame.time, prediction, latency_ms)
        number += 1
        for listener in listeners:
            listener.answered(answer)


def _wait(due: float, stop: Stop) -> float:
    """Sleep until `due`, in naps, so that a request to stop is seen soon; the time from which the next frame counts."""
    while (left := due - time.monotonic()) > 0 and not stop.requested():
        time.sleep(min(left, _NAP_S))
    return max(due, time.monotonic() - _NAP_S)
