"""Camera wrapper that detects lost, frozen, black and degraded sources and reopens them.

A source that delivered is opened again at once; one that is absent or refuses is tried at most twice a second, so that
it is back within two seconds of being well. Two kinds are tried less often: a camera that refuses the login (cameras
lock users out), and a source whose child process takes long to start on this board.
"""

from __future__ import annotations

import random
import threading
import zlib
from collections import deque
from collections.abc import Callable
from typing import Literal

import msgspec

from eyas_device.camera import Camera, Frame
from eyas_device.camera.opening import Opening, Patience
from eyas_device.camera.quality import RECENT_S, BrokenShare, frame_size, is_black
from eyas_device.errors import CameraError, CameraRefused, CameraSpecError, ImageError
from eyas_device.support.clock import SYSTEM, Clock
from eyas_device.support.closing import Closing
from eyas_device.support.redact import redact

Condition = Literal["opening", "delivering", "degraded", "resized", "lost", "frozen", "black", "closed"]
_BLACK_EVERY_S = 1.0
_MIN_AGE_S = 5
_RENEW_S = 10.0
_START_SHARE = 2.0
"""A child process that was started in vain is started again after this multiple of the time that it took."""
_FLAPPING, _FLAPPING_S = 5, 60.0
"""A camera that was lost this often within this time is degraded."""
_MOVE_S = 1.0
"""Time for a source that was frozen to deliver another image after it was reopened, seconds."""
_POLL_S = 60.0
_ROW_STEP = 16
"""Every 16th row of raw pixels is compared: sensor noise alone makes any of them differ."""


class CameraState(msgspec.Struct, frozen=True):
    """Condition and counters of a camera. Immutable and replaced atomically: safe to read from any thread."""

    condition: Condition = "opening"
    """`delivering`, `degraded` (too many broken frames or losses) and `resized` (frames of another size than at first)
    deliver; the others do not."""
    reason: str = ""
    """Why it does not deliver normally; empty if it does."""
    since: float = 0.0
    """Start of this condition, monotonic seconds."""
    reason_since: float = 0.0
    """Since when this reason holds, monotonic seconds."""
    losses: int = 0
    """Number of times that the source was closed to be reopened."""
    frames: int = 0
    """Good frames returned."""
    unusable: int = 0
    """Frames that could not be decoded, have an unsupported type or shape, or are black."""
    last_frame: float | None = None
    """When the last good frame was returned, monotonic seconds."""

    def reason_at(self, now: float) -> str:
        """The reason with its age, e.g. `connection refused (for 40 s)`."""
        age = int(now - self.reason_since)
        if not self.reason or age < _MIN_AGE_S:
            return self.reason
        shown = f"{age} s" if age < 120 else f"{age // 60} min" if age < 7200 else f"{age // 3600} h"
        return f"{self.reason} (for {shown})"

    def __str__(self) -> str:
        reason = self.reason.removeprefix("camera ")
        return f"camera {self.condition}" + (f": {reason}" if reason else "")


class Backoff(msgspec.Struct, frozen=True, kw_only=True):
    """Wait before reopening: exponential with equal jitter, so that cameras of one host are not retried in step.

    A delivered frame restarts the count of attempts. Source: M. Brooker, "Exponential Backoff And Jitter", AWS
    Architecture Blog, 2015.
    """

    first_s: float = 0.1
    """Maximum wait before the first attempt; it doubles with each further one. The minimum is half of it."""
    max_s: float = 1.0
    """Upper bound of the maximum wait."""
    interval_s: float = 0.5
    """Minimum time between the starts of two attempts, for a source that delivers little each time."""

    jitter: Callable[[], float] = random.random
    """Returns random numbers 0..1."""

    def bound_s(self, attempt: int) -> float:
        """Maximum wait before an attempt, numbered from 0."""
        return min(self.max_s, self.first_s * 2.0 ** min(attempt, 60))

    def wait_s(self, attempt: int) -> float:
        """A random wait before an attempt, from half of its bound to its bound."""
        return (0.5 + 0.5 * self.jitter()) * self.bound_s(attempt)


REFUSED = Backoff(first_s=30.0, max_s=300.0)
"""Waits after a refused login: a camera that locks users out counts every attempt."""


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
        self._opening: Opening | None = None
        self.state = CameraState(since=clock.monotonic())
        self._attempt = self._refusals = 0
        self._opened_at = clock.monotonic()
        self._min_wait_s = 0.0
        self._first_frame = False
        """Whether the open source has delivered a good frame."""
        self._just_opened = False
        """Whether nothing has been captured from it."""
        self._patience = Patience()
        self._losses: deque[float] = deque(maxlen=_FLAPPING)
        self._broken = BrokenShare()
        """Protected by `_lock`, like the next two."""
        self._undecoded_since: float | None = None
        self._degraded_reason = ""
        self._broken_share = self._degraded_at = 0.0
        self._first_frame_from = clock.monotonic()
        self._bad_since: float | None = None
        self._checksum: int | None = None
        self._same_since = 0.0
        self._black = self._still = False
        self._black_checked: float | None = None
        self._size: tuple[int, int] | None = None
        self._other_size: tuple[int, int] | None = None
        try:
            self._open_once()
        except CameraSpecError:
            raise
        except OSError as error:
            self._open_failed(error)

    @property
    def on_demand(self) -> bool:
        """Whether the open source drops the frames that nobody captures."""
        return bool(getattr(self._camera, "on_demand", False))

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
                frame, end = self._next(camera)
                if frame is None:
                    self._lose("lost", end)
                    continue
                if self._is_good(frame):
                    self._delivered()
                    return frame
            except ImageError as error:
                if self._is_stalled():
                    self._lose("lost", f"no usable image for {self._frozen_s:g} s ({error})")
                    continue
                raise
            except OSError as error:  # CameraError, and other errors that a source did not convert
                self._lose("lost", str(error))
        return None

    def decoded(self, good: bool) -> None:
        """Count whether a captured frame could be decoded; for the thread that decodes."""
        now = self._clock.monotonic()
        with self._lock:
            self._broken.decoded(now, broken=not good)
            if good:
                self._undecoded_since = None
            elif self._undecoded_since is None:
                self._undecoded_since = now

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
        now = self._clock.monotonic()
        wait_s = max(
            self._backoff.wait_s(self._attempt), self._opened_at + self._backoff.interval_s - now, self._min_wait_s
        )
        self._attempt += 1
        if self._clock.wait(self._closing, wait_s):
            return
        try:
            self._open_once()
        except OSError as error:
            self._open_failed(error)

    def _open_failed(self, error: OSError) -> None:
        """Report why the source does not open, and decide how long to wait."""
        self._min_wait_s = _START_SHARE * (error.started_s if isinstance(error, CameraError) else 0.0)
        if isinstance(error, CameraRefused):
            self._min_wait_s = REFUSED.wait_s(self._refusals)
            self._refusals += 1
        self._set_state("lost", str(error))

    def _open_once(self) -> None:
        """Open the source in a separate thread: opening cannot be interrupted, but `close` must not wait for it."""
        self._opened_at = self._clock.monotonic()
        opening = Opening(self._open)
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
        self._first_frame, self._just_opened, self._first_frame_from = False, True, self._clock.monotonic()
        self._bad_since = None

    def _next(self, camera: Camera) -> tuple[Frame | None, str]:
        """Capture a frame, or None and why; the first one of a reopened source is not waited for longer than usual."""
        seconds = self._patience.next_s() if self._just_opened and self.state.losses else None
        self._just_opened = False
        if seconds is None:
            return camera.capture(), "the stream ended"
        silent = threading.Event()

        def close() -> None:
            silent.set()
            camera.close()

        timer = threading.Timer(seconds, close)
        timer.daemon = True
        timer.start()
        try:
            frame = camera.capture()
        finally:
            timer.cancel()
            timer.join()
        return frame, f"opened, but no frame came within {seconds:.1f} s" if silent.is_set() else "the stream ended"

    def _delivered(self) -> None:
        """Note a good frame."""
        now = self._clock.monotonic()
        if not self._first_frame:
            self._first_frame = True
            self._patience.learn(now - self._first_frame_from)
        self._attempt = self._refusals = 0
        with self._lock:
            self._broken.captured(now, broken=False)
        self._set_state(*self._good_condition(now), frame=True)

    def _lose(self, condition: Condition, reason: str, *, frozen: bool = False) -> None:
        """Close the source, so that `capture` reopens it; a `frozen` image is still recognised afterwards."""
        if self._closing.is_set():
            return
        if not frozen:
            self._checksum = None
        self._losses.append(self._clock.monotonic())
        with self._lock:
            camera, self._camera = self._camera, None
            self._undecoded_since = None
        # Without a good frame, starting a child process again and again would take the processor from the model.
        self._min_wait_s = 0.0 if self._first_frame else _START_SHARE * getattr(camera, "started_s", 0.0)
        self._set_state(condition, reason, loss=True)
        if camera is not None:
            camera.close()

    def _is_good(self, frame: Frame) -> bool:
        """Whether `frame` is good; False if the source was closed because of it.

        Raises `ImageError` for a frame that is unusable or black.
        """
        now = self._clock.monotonic()
        size = frame_size(frame)
        self._still = self._is_frozen(frame, now)
        if self._still and not self._first_frame and now - self._first_frame_from < _MOVE_S:
            raise ImageError(
                f"{frame.source}: still the image that did not change"
            )  # some cameras send an old one first
        if self._still:
            condition: Condition = "black" if self._black else "frozen"
            reason = f"the same {'black ' if self._black else ''}image for {self._frozen_s:g} s"
            self._lose(condition, reason, frozen=True)
            return False
        self._bad_since = None
        if self._is_black(frame, now):
            self._set_state("black", f"every value of the image is at most {self._black_level:g}")
            raise ImageError(f"{frame.source}: black; is the lens covered, or the light off?")
        if self._is_resized(size):
            return False
        since = self._undecoded_since
        if since is not None and 0 < self._frozen_s <= now - since:
            self._lose("lost", f"no image could be decoded for {self._frozen_s:g} s")
            return False
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
        self._lose("lost", self._resize_reason(size))
        return True

    def _is_black(self, frame: Frame, now: float) -> bool:
        """Whether the image is black; checked once a second, and on each frame while it is."""
        if not self._black and self._black_checked is not None and now - self._black_checked < _BLACK_EVERY_S:
            return False
        self._black_checked = now
        self._black = is_black(frame, self._black_level)
        return self._black

    def _is_stalled(self) -> bool:
        """Count an unusable frame. True once there was no usable frame for `frozen_s` (black frames do not count)."""
        now = self._clock.monotonic()
        condition, reason = self.state.condition, self.state.reason
        if not self._black and not self._still:
            with self._lock:
                self._broken.captured(now, broken=True)
            if condition in ("delivering", "degraded", "resized"):
                condition, reason = self._good_condition(now)
        self._set_state(condition, reason, unusable=True)
        if self._black:
            return False
        if self._bad_since is None:
            self._bad_since = now
        return 0 < self._frozen_s <= now - self._bad_since

    def _good_condition(self, now: float) -> tuple[Condition, str]:
        """Condition and reason of a source that delivers."""
        reasons = []
        with self._lock:
            if self._broken.degraded:
                reasons.append(self._broken_reason(now))
            else:
                self._degraded_reason = ""
        if len(self._losses) == _FLAPPING and now - self._losses[0] < _FLAPPING_S:
            reasons.append(f"lost {_FLAPPING} times or more within {_FLAPPING_S:g} s")
        if self._other_size is not None:
            reasons.append(self._resize_reason(self._other_size))
            if len(reasons) == 1:
                return "resized", reasons[0]
        return ("degraded", "; ".join(reasons)) if reasons else ("delivering", "")

    def _broken_reason(self, now: float) -> str:
        """The share of broken frames, renewed at most every ten seconds: each new reason is a message."""
        share = self._broken.share
        changed = abs(share - self._broken_share) > 0.2 * self._broken_share
        if not self._degraded_reason or (changed and now - self._degraded_at >= _RENEW_S):
            self._broken_share, self._degraded_at = share, now
            self._degraded_reason = f"{share:.0%} of the frames of the last {RECENT_S:g} s are broken"
        return self._degraded_reason

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
                reason=redact(reason),
                since=before.since if before.condition == condition else now,
                reason_since=before.reason_since if before.reason == reason else now,
                losses=before.losses + loss,
                frames=before.frames + frame,
                unusable=before.unusable + unusable,
                last_frame=now if frame else before.last_frame,
            )
            state = self.state
        changed = (before.condition, before.reason) != (condition, reason)
        if changed and self._on_change is not None:
            self._on_change(state)
