"""A camera that nobody has to watch: it sees that its source is ill, says so, and opens it again until it is well."""

from __future__ import annotations

import random
import threading
import zlib
from collections.abc import Callable
from typing import Literal

import cv2
import msgspec
import numpy as np

from eyas_device.camera import Camera, Frame
from eyas_device.errors import CameraError, CameraSpecError, ImageError
from eyas_device.preprocess import MAX_SIDE, Pixels, image_size
from eyas_device.support.clock import SYSTEM, Clock
from eyas_device.support.closing import Closing

Condition = Literal["opening", "delivering", "lost", "frozen", "black", "resized", "closed"]
_BLACK_EVERY_S = 1.0
_LONG_S = 60.0
_ROWS = 16
"""Of raw pixels every so many rows are compared: noise alone makes any of them differ."""


class CameraState(msgspec.Struct, frozen=True):
    """How a camera is. Replaced as a whole, so another thread may read it at any time."""

    condition: Condition = "opening"
    """`resized` delivers too, in another size than at first; `black` delivers nothing that can be answered."""
    reason: str = ""
    """Why it does not deliver as it should; empty when it does."""
    since: float = 0.0
    """When this condition began, monotonic seconds."""
    losses: int = 0
    """How often the source was closed to be opened again."""
    frames: int = 0
    """Good frames handed out."""
    unusable: int = 0
    """Frames that were no image, or of a kind that no model takes, or black."""
    last_frame: float | None = None
    """When the last good frame was handed out, monotonic seconds."""

    def __str__(self) -> str:
        reason = self.reason.removeprefix("camera ")
        return f"camera {self.condition}" + (f": {reason}" if reason else "")


class Backoff(msgspec.Struct, frozen=True, kw_only=True):
    """How long to wait before opening again: exponential with full jitter, so that a fleet does not knock in step.

    Source: M. Brooker, "Exponential Backoff And Jitter", AWS Architecture Blog, 2015.
    """

    first_s: float = 0.5
    """Longest wait before the first attempt; it doubles with each further one."""
    most_s: float = 30.0
    """Longest wait of all."""
    reset_s: float = 10.0
    """After good delivery for so long the count of attempts begins again."""

    def bound_s(self, attempt: int) -> float:
        """The longest wait before an attempt, numbered from 0."""
        return min(self.most_s, self.first_s * 2.0 ** min(attempt, 60))


class ReconnectingCamera(Closing):
    """A live camera over any source. After construction it never raises `CameraError`.

    One thread captures; `state` and `close` are for any thread.
    """

    live = True

    def __init__(
        self,
        open: Callable[[], Camera],
        *,
        frozen_s: float = 30.0,
        black_level: float = 4.0,
        backoff: Backoff = Backoff(),  # noqa: B008 - frozen
        clock: Clock = SYSTEM,
        on_change: Callable[[CameraState], None] | None = None,
        jitter: Callable[[], float] = random.random,
    ) -> None:
        """Open the source once; if it is not there (yet), `capture` goes on trying.

        `open` makes the source, and returns or raises within its own timeout. `frozen_s` is how long the image may
        stay the same, byte for byte, seconds (0: for ever); an image with all values at or below `black_level` is
        black. `on_change` is told of each new condition or reason, by the thread that found it; it must not wait.
        `jitter` gives numbers 0..1. Raises `CameraSpecError` for a mistake in what names the source.
        """
        self._open, self._frozen_s, self._black_level = open, frozen_s, black_level
        self._backoff, self._clock, self._on_change, self._jitter = backoff, clock, on_change, jitter
        self._closing = threading.Event()
        self._guard = threading.Lock()
        """Over `_camera`, `_opening` and `state`, between the capturing thread and those that close."""
        self._camera: Camera | None = None
        self._opening: _Opening | None = None
        self.state = CameraState(since=clock.monotonic())
        self._attempt = 0
        self._good_since: float | None = None
        self._bad_since: float | None = None
        self._checksum: int | None = None
        self._same_since = 0.0
        self._black = False
        self._black_looked: float | None = None
        self._size: tuple[int, int] | None = None
        self._other_size: tuple[int, int] | None = None
        try:
            self._open_once()
        except CameraSpecError:
            raise
        except OSError as error:
            self._say("lost", str(error))

    def capture(self) -> Frame | None:
        """The next good frame, however long that takes; None only after `close`.

        Raises `ImageError` for a frame that is no image, of a kind that no model takes, or black.
        """
        while not self._closing.is_set():
            camera = self._camera
            if camera is None:
                self._reopen()
                continue
            try:
                frame = camera.capture()
                if frame is None:
                    self._lose("lost", "the stream ended")
                    continue
                if self._is_well(frame):
                    self._say(*self._good_condition(), frame=True)
                    return frame
            except ImageError as error:
                if self._is_useless():
                    self._lose("lost", f"no usable image for {self._frozen_s:g} s ({error})")
                    continue
                raise
            except OSError as error:  # CameraError, and what a source forgot to make one of
                self._lose("lost", str(error))
        return None

    def close(self) -> None:
        """Close the source; a capture that waits in another thread returns None at once."""
        self._closing.set()
        with self._guard:
            camera, self._camera = self._camera, None
            if self._opening is not None:
                self._opening.done.set()
        self._say("closed", "")
        if camera is not None:
            camera.close()

    def _reopen(self) -> None:
        """Wait, then try once."""
        wait_s = self._jitter() * self._backoff.bound_s(self._attempt)
        self._attempt += 1
        if self._clock.wait(self._closing, wait_s):
            return
        try:
            self._open_once()
        except OSError as error:
            self._say("lost", str(error))

    def _open_once(self) -> None:
        """Open the source in a thread of its own, because opening cannot be interrupted but `close` must not wait."""
        opening = _Opening(self._open)
        with self._guard:
            if self._closing.is_set():
                return
            self._opening = opening
        opening.start()
        while not opening.done.wait(_LONG_S):
            pass  # the source's own timeout ends it, or `close`
        with self._guard:
            self._opening = None
            wanted = not self._closing.is_set()
            if wanted:
                self._camera = opening.take()
        if not wanted:
            opening.abandon()
        self._good_since = self._bad_since = None

    def _lose(self, condition: Condition, reason: str, *, frozen: bool = False) -> None:
        """Close the source, so that the next turn opens it again; a `frozen` image is known again then."""
        if self._closing.is_set():
            return
        now = self._clock.monotonic()
        if self._good_since is not None and now - self._good_since >= self._backoff.reset_s:
            self._attempt = 0
        if not frozen:
            self._checksum = None
        with self._guard:
            camera, self._camera = self._camera, None
        self._say(condition, reason, loss=True)
        if camera is not None:
            camera.close()

    def _is_well(self, frame: Frame) -> bool:
        """Whether `frame` may be answered; False if the source was closed because of it.

        Raises `ImageError` for a frame that is unusable or black.
        """
        now = self._clock.monotonic()
        size = _size(frame)
        if self._is_frozen(frame, now):
            condition: Condition = "black" if self._black else "frozen"
            reason = f"the same {'black ' if self._black else ''}image for {self._frozen_s:g} s"
            self._lose(condition, reason, frozen=True)
            return False
        self._bad_since = None
        if self._is_black(frame, now):
            self._say("black", f"every value of the image is at most {self._black_level:g}")
            raise ImageError(f"{frame.source}: black; is the lens covered, or the light off?")
        if size is not None and self._is_resized(size):
            return False
        if self._good_since is None:
            self._good_since = now
        return True

    def _is_frozen(self, frame: Frame, now: float) -> bool:
        """Whether the image has been the same for too long, or is, after opening again, still the frozen one."""
        if self._frozen_s <= 0:
            return False
        image = frame.image
        checksum = zlib.crc32(image if isinstance(image, bytes) else image[::_ROWS].tobytes())
        if checksum != self._checksum:
            self._checksum, self._same_since = checksum, now
        return now - self._same_since >= self._frozen_s

    def _is_resized(self, size: tuple[int, int]) -> bool:
        """Whether the source was closed because its size changed: once for each size, then that one is taken."""
        if self._size is None:
            self._size = size
        if size in (self._size, self._other_size):
            self._other_size = None if size == self._size else size
            return False
        self._other_size = size
        self._lose("resized", self._resizing(size))
        return True

    def _is_black(self, frame: Frame, now: float) -> bool:
        """Whether the image is black; looked at once a second, and at each frame while it is."""
        if not self._black and self._black_looked is not None and now - self._black_looked < _BLACK_EVERY_S:
            return False
        self._black_looked = now
        self._black = int(_small(frame).max()) <= self._black_level
        return self._black

    def _is_useless(self) -> bool:
        """Count an unusable frame; whether, black ones aside, there was nothing else for as long as may be frozen."""
        now = self._clock.monotonic()
        self._say(self.state.condition, self.state.reason, unusable=True)
        if self._black:
            return False
        if self._bad_since is None:
            self._bad_since = now
        return 0 < self._frozen_s <= now - self._bad_since

    def _good_condition(self) -> tuple[Condition, str]:
        return ("resized", self._resizing(self._other_size)) if self._other_size is not None else ("delivering", "")

    def _resizing(self, size: tuple[int, int]) -> str:
        first = self._size or size
        return f"images of {size[0]}x{size[1]} pixels, {first[0]}x{first[1]} at first"

    def _say(
        self, condition: Condition, reason: str, *, loss: bool = False, frame: bool = False, unusable: bool = False
    ) -> None:
        """Replace the state."""
        now = self._clock.monotonic()
        with self._guard:
            before = self.state
            if before.condition == "closed":
                return
            self.state = CameraState(
                condition=condition,
                reason=reason,
                since=before.since if before.condition == condition else now,
                losses=before.losses + loss,
                frames=before.frames + frame,
                unusable=before.unusable + unusable,
                last_frame=now if frame else before.last_frame,
            )
            state = self.state
        changed = (before.condition, before.reason) != (condition, reason)
        if changed and self._on_change is not None:
            self._on_change(state)


class _Opening:
    """One attempt to open, in a thread that may be left alone: a camera that comes too late is closed there."""

    def __init__(self, open: Callable[[], Camera]) -> None:
        self.done = threading.Event()
        self._open = open
        self._guard = threading.Lock()
        self._abandoned = False
        self._camera: Camera | None = None
        self._fault: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="eyas-open", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def take(self) -> Camera:
        """What was opened. Raises what opening raised."""
        self._thread.join()
        if self._fault is not None:
            raise self._fault
        if self._camera is None:
            raise CameraError("opening gave no camera")
        return self._camera

    def abandon(self) -> None:
        """Want the camera no more."""
        with self._guard:
            self._abandoned = True
            camera, self._camera = self._camera, None
        if camera is not None:
            camera.close()

    def _run(self) -> None:
        camera = None
        try:
            camera = self._open()
        except BaseException as error:  # told where it was asked for
            self._fault = error
        with self._guard:
            if not self._abandoned:
                self._camera, camera = camera, None
        if camera is not None:
            camera.close()
        self.done.set()


def _size(frame: Frame) -> tuple[int, int] | None:
    """Width and height, pixels; None for encoded images that are not JPEG. Raises `ImageError` for odd kinds."""
    image = frame.image
    if isinstance(image, bytes):
        size = image_size(image)
        if size is None and (not image or image.startswith(b"\xff\xd8")):
            raise ImageError(f"{frame.source}: a damaged JPEG of {len(image)} bytes, without a size")
        if size is not None and max(size) > MAX_SIDE:
            raise ImageError(f"{frame.source}: {size[0]}x{size[1]} pixels; at most {MAX_SIDE} a side are allowed")
        return size
    plain = image.dtype == np.uint8 and image.ndim in (2, 3) and 0 not in image.shape
    if not plain or (image.ndim == 3 and image.shape[2] not in (1, 3, 4)):
        raise ImageError(
            f"{frame.source}: {image.dtype} pixels of shape {image.shape}; uint8 [h, w] or [h, w, 1|3|4] is allowed"
        )
    return image.shape[1], image.shape[0]


def _small(frame: Frame) -> Pixels:
    """The image for judging its brightness: a JPEG at an eighth of its scale. Raises `ImageError`."""
    if not isinstance(frame.image, bytes):
        return frame.image
    try:
        pixels = cv2.imdecode(np.frombuffer(frame.image, dtype=np.uint8), cv2.IMREAD_REDUCED_COLOR_8)
    except cv2.error as error:
        raise ImageError(f"{frame.source}: not an image that can be decoded ({error.err})") from None
    if pixels is None:
        raise ImageError(f"{frame.source}: not an image that can be decoded")
    return np.asarray(pixels, dtype=np.uint8)
