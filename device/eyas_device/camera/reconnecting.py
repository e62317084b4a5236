"""Camera wrapper that detects lost, frozen and black sources and reopens them with jittered backoff."""

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
_POLL_S = 60.0
_ROW_STEP = 16
"""Every 16th row of raw pixels is compared: sensor noise alone makes any of them differ."""


class CameraState(msgspec.Struct, frozen=True):
    """Condition and counters of a camera. Immutable and replaced atomically: safe to read from any thread."""

    condition: Condition = "opening"
    """`resized` delivers frames of another size than at first; `black` delivers no usable frames."""
    reason: str = ""
    """Why it does not deliver normally; empty if it does."""
    since: float = 0.0
    """Start of this condition, monotonic seconds."""
    losses: int = 0
    """Number of times that the source was closed to be reopened."""
    frames: int = 0
    """Good frames returned."""
    unusable: int = 0
    """Frames that could not be decoded, have an unsupported type or shape, or are black."""
    last_frame: float | None = None
    """When the last good frame was returned, monotonic seconds."""

    def __str__(self) -> str:
        reason = self.reason.removeprefix("camera ")
        return f"camera {self.condition}" + (f": {reason}" if reason else "")


class Backoff(msgspec.Struct, frozen=True, kw_only=True):
    """Wait before reopening: exponential with full jitter, so that a fleet does not retry in step.

    Source: M. Brooker, "Exponential Backoff And Jitter", AWS Architecture Blog, 2015.
    """

    first_s: float = 0.5
    """Maximum wait before the first attempt; it doubles with each further one."""
    max_s: float = 30.0
    """Upper bound of the maximum wait."""
    reset_s: float = 10.0
    """After good delivery for this long, the count of attempts restarts."""

    jitter: Callable[[], float] = random.random
    """Returns random numbers 0..1."""

    def bound_s(self, attempt: int) -> float:
        """Maximum wait before an attempt, numbered from 0."""
        return min(self.max_s, self.first_s * 2.0 ** min(attempt, 60))

    def wait_s(self, attempt: int) -> float:
        """A random wait before an attempt, at most its bound."""
        return self.jitter() * self.bound_s(attempt)


class ReconnectingCamera(Closing):
    """A live camera that reopens its source. After construction it never raises `CameraError`.

    Only one thread may capture; `state` and `close` are thread-safe.
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
    ) -> None:
        """Open the source once; if it is not available, `capture` keeps trying.

        Args:
            open: Creates the source; returns or raises within its own timeout.
            frozen_s: After this time with identical images the source counts as frozen, seconds (0: never).
            black_level: An image with all values at or below it is black.
            backoff: Waits between attempts to reopen.
            clock: Reads the time and waits.
            on_change: Called with each new condition or reason, by the thread that detects it; must not block.

        Raises:
            CameraSpecError: The specification of the source is wrong.

        """
        self._open, self._frozen_s, self._black_level = open, frozen_s, black_level
        self._backoff, self._clock, self._on_change = backoff, clock, on_change
        self._closing = threading.Event()
        self._lock = threading.Lock()
        """Protects `_camera`, `_opening` and `state`."""
        self._camera: Camera | None = None
        self._opening: _Opening | None = None
        self.state = CameraState(since=clock.monotonic())
        self._attempt = 0
        self._good_since: float | None = None
        self._bad_since: float | None = None
        self._checksum: int | None = None
        self._same_since = 0.0
        self._black = False
        self._black_checked: float | None = None
        self._size: tuple[int, int] | None = None
        self._other_size: tuple[int, int] | None = None
        try:
            self._open_once()
        except CameraSpecError:
            raise
        except OSError as error:
            self._set_state("lost", str(error))

    def capture(self) -> Frame | None:
        """Wait for the next good frame; None only after `close`.

        Raises `ImageError` for a frame that cannot be decoded, has an unsupported type or shape, or is black.
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
                if self._is_good(frame):
                    self._set_state(*self._good_condition(), frame=True)
                    return frame
            except ImageError as error:
                if self._is_stalled():
                    self._lose("lost", f"no usable image for {self._frozen_s:g} s ({error})")
                    continue
                raise
            except OSError as error:  # CameraError, and other errors that a source did not convert
                self._lose("lost", str(error))
        return None

    def close(self) -> None:
        """Close the source; a capture that waits in another thread returns None at once."""
        self._closing.set()
        with self._lock:
            camera, self._camera = self._camera, None
            if self._opening is not None:
                self._opening.done.set()
        self._set_state("closed", "")
        if camera is not None:
            camera.close()

    def _reopen(self) -> None:
        """Wait, then try to open the source once."""
        wait_s = self._backoff.wait_s(self._attempt)
        self._attempt += 1
        if self._clock.wait(self._closing, wait_s):
            return
        try:
            self._open_once()
        except OSError as error:
            self._set_state("lost", str(error))

    def _open_once(self) -> None:
        """Open the source in a separate thread: opening cannot be interrupted, but `close` must not wait for it."""
        opening = _Opening(self._open)
        with self._lock:
            if self._closing.is_set():
                return
            self._opening = opening
        opening.start()
        while not opening.done.wait(_POLL_S):
            pass  # ended by the source's own timeout, or by `close`
        with self._lock:
            self._opening = None
            keep = not self._closing.is_set()
            if keep:
                self._camera = opening.take()
        if not keep:
            opening.abandon()
        self._good_since = self._bad_since = None

    def _lose(self, condition: Condition, reason: str, *, frozen: bool = False) -> None:
        """Close the source, so that `capture` reopens it; a `frozen` image is still recognised afterwards."""
        if self._closing.is_set():
            return
        now = self._clock.monotonic()
        if self._good_since is not None and now - self._good_since >= self._backoff.reset_s:
            self._attempt = 0
        if not frozen:
            self._checksum = None
        with self._lock:
            camera, self._camera = self._camera, None
        self._set_state(condition, reason, loss=True)
        if camera is not None:
            camera.close()

    def _is_good(self, frame: Frame) -> bool:
        """Whether `frame` is good; False if the source was closed because of it.

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
            self._set_state("black", f"every value of the image is at most {self._black_level:g}")
            raise ImageError(f"{frame.source}: black; is the lens covered, or the light off?")
        if size is not None and self._is_resized(size):
            return False
        if self._good_since is None:
            self._good_since = now
        return True

    def _is_frozen(self, frame: Frame, now: float) -> bool:
        """Whether the image has been the same for too long, also across reopening."""
        if self._frozen_s <= 0:
            return False
        image = frame.image
        checksum = zlib.crc32(image if isinstance(image, bytes) else image[::_ROW_STEP].tobytes())
        if checksum != self._checksum:
            self._checksum, self._same_since = checksum, now
        return now - self._same_since >= self._frozen_s

    def _is_resized(self, size: tuple[int, int]) -> bool:
        """Close the source once for each new image size, then accept it; True if it was closed."""
        if self._size is None:
            self._size = size
        if size in (self._size, self._other_size):
            self._other_size = None if size == self._size else size
            return False
        self._other_size = size
        self._lose("resized", self._resize_reason(size))
        return True

    def _is_black(self, frame: Frame, now: float) -> bool:
        """Whether the image is black; checked once a second, and on each frame while it is."""
        if not self._black and self._black_checked is not None and now - self._black_checked < _BLACK_EVERY_S:
            return False
        self._black_checked = now
        self._black = int(_downscaled(frame).max()) <= self._black_level
        return self._black

    def _is_stalled(self) -> bool:
        """Count an unusable frame. True once there was no usable frame for `frozen_s` (black frames do not count)."""
        now = self._clock.monotonic()
        self._set_state(self.state.condition, self.state.reason, unusable=True)
        if self._black:
            return False
        if self._bad_since is None:
            self._bad_since = now
        return 0 < self._frozen_s <= now - self._bad_since

    def _good_condition(self) -> tuple[Condition, str]:
        return (
            ("resized", self._resize_reason(self._other_size)) if self._other_size is not None else ("delivering", "")
        )

    def _resize_reason(self, size: tuple[int, int]) -> str:
        first = self._size or size
        return f"images of {size[0]}x{size[1]} pixels, {first[0]}x{first[1]} at first"

    def _set_state(
        self, condition: Condition, reason: str, *, loss: bool = False, frame: bool = False, unusable: bool = False
    ) -> None:
        """Replace the state and report a change."""
        now = self._clock.monotonic()
        with self._lock:
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


def _size(frame: Frame) -> tuple[int, int] | None:
    """Width and height, pixels; None for encoded images other than JPEG. Raises `ImageError` for unsupported images."""
    image = frame.image
    if isinstance(image, bytes):
        size = image_size(image)
        if size is None and (not image or image.startswith(b"\xff\xd8")):
            raise ImageError(f"{frame.source}: a damaged JPEG of {len(image)} bytes, without a frame header")
        if size is not None and max(size) > MAX_SIDE:
            raise ImageError(f"{frame.source}: {size[0]}x{size[1]} pixels; at most {MAX_SIDE} a side are allowed")
        return size
    plain = image.dtype == np.uint8 and image.ndim in (2, 3) and 0 not in image.shape
    if not plain or (image.ndim == 3 and image.shape[2] not in (1, 3, 4)):
        raise ImageError(
            f"{frame.source}: {image.dtype} pixels of shape {image.shape}; uint8 [h, w] or [h, w, 1|3|4] is allowed"
        )
    return image.shape[1], image.shape[0]


def _downscaled(frame: Frame) -> Pixels:
    """The image for the black check, a JPEG decoded at 1/8 scale. Raises `ImageError`."""
    if not isinstance(frame.image, bytes):
        return frame.image
    try:
        pixels = cv2.imdecode(np.frombuffer(frame.image, dtype=np.uint8), cv2.IMREAD_REDUCED_COLOR_8)
    except cv2.error as error:
        raise ImageError(f"{frame.source}: not an image that can be decoded ({error.err})") from None
    if pixels is None:
        raise ImageError(f"{frame.source}: not an image that can be decoded")
    return np.asarray(pixels, dtype=np.uint8)
