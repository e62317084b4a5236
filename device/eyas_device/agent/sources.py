"""Where the frame loop takes its frames from: a finite source frame by frame, a live one through a capture thread."""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from statistics import median
from types import TracebackType

from eyas_device.agent.latest import Ended, LatestFrame
from eyas_device.camera import Camera, Frame
from eyas_device.errors import CameraError, ImageError

POLL_S = 0.05
"""Longest wait for a frame, seconds."""
_JOIN_S = 10.0
_PAUSE_S = 1.0
_MAX_LEAD_S = 0.5
_RECENT = 5
_CHECK_S = 5.0
"""A camera is captured at least this often, wanted or not, so that its loss is noticed."""


class FiniteSource:
    """Source that waits: each frame is captured when the loop takes it."""

    live = False
    dropped = 0

    def __init__(self, camera: Camera) -> None:
        self._camera = camera

    def __enter__(self) -> FiniteSource:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def take(self) -> Frame | Ended | None:
        """Capture the next frame. Raises `ImageError` for an unusable one and `CameraError` if the source fails."""
        frame = self._camera.capture()
        return Ended() if frame is None else frame

    def schedule(self, due: float | None) -> None:
        """A no-op: nothing is captured before it is taken."""

    def discard(self) -> None:
        """A no-op: nothing waits."""


class LiveSource:
    """Source with a capture thread and a latest-frame buffer; `take` raises what the thread raised.

    Without a schedule the thread captures all the time. With one it captures a single frame shortly before that is due,
    if the camera itself drops the frames that nobody captures (`on_demand`); the other cameras are captured all the
    time, because what they sent would wait in the socket and become old.
    """

    live = True

    def __init__(self, camera: Camera) -> None:
        self._camera = camera
        self._latest = LatestFrame()
        self._stopping = False
        self._scheduled = threading.Condition()
        """Protects the next two."""
        self._due: float | None = 0.0
        self._wanted = True
        self._lead_s = 0.0
        """How long a capture usually takes: it begins so long before the frame is due."""
        self._thread = threading.Thread(target=self._capture, name="capture", daemon=True)

    @property
    def dropped(self) -> int:
        """Frames that were replaced by a newer one."""
        return self._latest.replaced

    def __enter__(self) -> LiveSource:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stopping = True
        self._camera.close()  # wakes a waiting capture
        with self._scheduled:
            self._scheduled.notify()
        self._thread.join(_JOIN_S)

    def take(self) -> Frame | Ended | None:
        """Take the newest frame, None if there is none soon. Raises what `Camera.capture` raised."""
        item = self._latest.take(POLL_S)
        if isinstance(item, Exception):
            raise item
        return item

    def discard(self) -> None:
        """Drop a waiting frame."""
        self._latest.discard()

    def schedule(self, due: float | None) -> None:
        """One frame is wanted at `due`, monotonic seconds; None: all frames are."""
        with self._scheduled:
            self._due, self._wanted = due, True
            self._scheduled.notify()

    def _capture(self) -> None:
        durations: deque[float] = deque(maxlen=_RECENT)
        while not self._stopping:
            wanted = self._wait_until_wanted()
            started = time.monotonic()
            try:
                frame = self._camera.capture()
            except ImageError as error:
                if wanted:
                    self._latest.put(error)
            except CameraError as error:
                self._latest.put(error)
                return
            except Exception as error:  # `take` raises it: the loop counts it and decides whether to go on
                self._latest.put(error)
                time.sleep(_PAUSE_S)
            else:
                if frame is None:
                    self._latest.put(Ended())
                    return
                if wanted:
                    self._latest.put(frame)
            durations.append(time.monotonic() - started)
            self._lead_s = min(_MAX_LEAD_S, median(durations))

    def _wait_until_wanted(self) -> bool:
        """Wait until a frame is wanted, or the camera is looked at; whether the frame is wanted."""
        latest = time.monotonic() + _CHECK_S
        with self._scheduled:
            while not self._stopping and self._paced:
                begin = min(latest, self._begin) if self._wanted else latest
                if (left := begin - time.monotonic()) <= 0:
                    break
                self._scheduled.wait(left)
            if not self._paced:
                return True
            wanted = self._wanted and time.monotonic() >= self._begin
            if wanted:
                self._wanted = False
                self._latest.discard()  # captured while the camera was reopened: it is older
            return wanted

    @property
    def _paced(self) -> bool:
        """Whether single frames are wanted, and the camera drops the others."""
        return self._due is not None and bool(getattr(self._camera, "on_demand", False))

    @property
    def _begin(self) -> float:
        """When to begin to capture the wanted frame, monotonic seconds."""
        return math.inf if self._due is None else self._due - self._lead_s
