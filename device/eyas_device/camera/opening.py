"""Opening a source in a thread of its own, and waiting for its first frame no longer than it usually takes."""

from __future__ import annotations

import threading
from collections.abc import Callable

from eyas_device.camera import Camera
from eyas_device.errors import CameraError

_MIN_PATIENCE_S = 1.2
_MARGIN = 4.0
_FULL_EVERY = 16
"""Each 16th attempt waits as long as the source itself allows, in case it has become slower."""


class Opening:
    """One attempt to open a source in a thread that can be abandoned; a camera that is then opened is closed there."""

    def __init__(self, open: Callable[[], Camera]) -> None:
        self.done = threading.Event()
        self._open = open
        self._lock = threading.Lock()
        self._abandoned = False
        self._camera: Camera | None = None
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="eyas-open", daemon=True)

    def start(self) -> None:
        """Start to open."""
        self._thread.start()

    def take(self) -> Camera:
        """Return the opened camera. Raises what opening raised."""
        self._thread.join()
        if self._error is not None:
            raise self._error
        if self._camera is None:
            raise CameraError("opening returned no camera")
        return self._camera

    def abandon(self) -> None:
        """Close the camera, now or when it has been opened."""
        with self._lock:
            self._abandoned = True
            camera, self._camera = self._camera, None
        if camera is not None:
            camera.close()

    def _run(self) -> None:
        camera = None
        try:
            camera = self._open()
        except BaseException as error:  # raised by `take`
            self._error = error
        with self._lock:
            if not self._abandoned:
                self._camera, camera = camera, None
        if camera is not None:
            camera.close()
        self.done.set()


class Patience:
    """How long the first frame of a reopened source is waited for.

    A server that accepts and stays silent would otherwise hold each attempt for the whole time-out, and be noticed that
    much later when it is well again.
    """

    def __init__(self) -> None:
        self._usual_s: float | None = None
        self._attempts = 0

    def learn(self, seconds: float) -> None:
        """The first frame came `seconds` after the source was open."""
        self._usual_s, self._attempts = seconds, 0

    def next_s(self) -> float | None:
        """Time for the next attempt, seconds; None: as long as the source allows."""
        self._attempts += 1
        if self._usual_s is None or self._attempts % _FULL_EVERY == 0:
            return None
        return max(_MIN_PATIENCE_S, _MARGIN * self._usual_s)
