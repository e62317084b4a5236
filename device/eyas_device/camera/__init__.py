"""Frame sources: one small protocol, one file for each kind of source.

A source is named by a specification `KIND:REST`, e.g. `v4l2:0`, `mjpeg:http://camera/stream`, `folder:images/` or
`fake:`. `capture` returns or raises within the timeout that the source was opened with; a source whose library cannot
guarantee that runs in a process that can be killed (`subprocess.py`). `reconnecting.py` wraps any live source, detects
its failures and reopens it.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from time import monotonic
from types import TracebackType
from typing import Any, Protocol, cast

from eyas_device.camera.spec import suggest
from eyas_device.camera.view import View
from eyas_device.config import CameraSection
from eyas_device.errors import CameraError, CameraSpecError
from eyas_device.preprocess import Pixels, Preprocessing, decode
from eyas_device.support.closing import Closing
from eyas_device.support.redact import redact

KINDS = {
    "v4l2": "eyas_device.camera.v4l2:V4L2Camera",
    "rtsp": "eyas_device.camera.rtsp:RtspCamera",
    "rtsps": "eyas_device.camera.rtsp:RtspsCamera",
    "mjpeg": "eyas_device.camera.mjpeg:MjpegCamera",
    "picamera2": "eyas_device.camera.picamera2:Picamera2Camera",
    "gst": "eyas_device.camera.gstreamer:GStreamerCamera",
    "video": "eyas_device.camera.video:VideoCamera",
    "folder": "eyas_device.camera.folder:FolderCamera",
    "fake": "eyas_device.camera.fake:FakeCamera",
}
"""Kind -> class. Its `parse(rest)` checks the part after the colon, its `open(rest, timeout_s=...)` also opens it."""
CONTROLLED = ("v4l2", "picamera2")
"""Kinds whose `open` also takes `controls`."""
TIMEOUT_S = 5.0
_logger = logging.getLogger(__name__)
_warned: set[str] = set()
_MAX_WARNED = 100


@dataclass(frozen=True)
class Frame:
    """One captured image. Encoded bytes stay encoded until `pixels` is called."""

    image: Pixels | bytes
    """uint8 [height, width, 3] BGR, or the bytes of an encoded image (JPEG, PNG, ...)."""
    time: float
    """Capture time, seconds since 1970."""
    source: str
    """Origin, shown in predictions and messages: the file, or the stream and frame number."""
    captured: float = field(default_factory=monotonic)
    """Capture time on the monotonic clock, for the frame's age."""
    view: View | None = None
    """The part of the image that is looked at, and which way up; None: the image as it is."""

    def pixels(self, spec: Preprocessing | None = None) -> Pixels:
        """The decoded view, uint8 BGR; with `spec`, decoded at the scale that its model needs.

        Raises `ImageError` if the bytes cannot be decoded.
        """
        view = self.view
        if not isinstance(self.image, bytes):
            return self.image if view is None else view.apply(self.image)
        if view is None:
            return decode(self.image, spec=spec, where=self.source)
        return view.apply(decode(self.image, spec=spec, where=self.source, kept=view.kept))


class Camera(Protocol):
    """A source of frames; a context manager that releases the device on exit."""

    live: bool
    """Whether frames arrive in real time: a frame that is not captured in time is replaced by a newer one."""

    def capture(self) -> Frame | None:
        """Return the next frame, or None at the end of the source.

        Raises `ImageError` if this frame is unusable (the next call returns the next one) and `CameraError` if the
        source stopped delivering.
        """

    def close(self) -> None:
        """Release the source. Closing twice is allowed."""

    def __enter__(self) -> Camera: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None: ...


class LoopingCamera(Closing):
    """Camera wrapper that restarts a finite source at its end, until a round delivers nothing."""

    def __init__(self, spec: str, *, timeout_s: float = TIMEOUT_S) -> None:
        self._spec, self._timeout_s = spec, timeout_s
        self._camera = open_camera(spec, timeout_s=timeout_s)
        self.live = self._camera.live

    def capture(self) -> Frame | None:
        frame = self._camera.capture()
        if frame is None:
            self._camera.close()
            self._camera = open_camera(self._spec, timeout_s=self._timeout_s)
            frame = self._camera.capture()
        return frame

    def close(self) -> None:
        self._camera.close()


class ViewedCamera(Closing):
    """Camera wrapper whose frames are looked at through a view."""

    def __init__(self, camera: Camera, view: View) -> None:
        self._camera, self._view = camera, view
        self.live = camera.live
        self.on_demand = bool(getattr(camera, "on_demand", False))
        self.started_s = float(getattr(camera, "started_s", 0.0))

    def capture(self) -> Frame | None:
        frame = self._camera.capture()
        return None if frame is None else replace(frame, view=self._view)

    def close(self) -> None:
        self._camera.close()


def is_live(spec: str) -> bool:
    """Whether the source that `spec` names delivers in real time, without opening it."""
    kind, _, rest = spec.partition(":")
    if kind == "fake":
        return "live=1" in rest.partition("?")[2].split("&")
    return kind not in ("video", "folder")


def open_configured(camera: CameraSection, *, loop: bool = False) -> Camera:
    """Open a camera as it is configured; raises what `open_camera` raises."""
    view = View(rotate=camera.rotate, flip=camera.flip, region=camera.region)
    opened = open_camera(camera.source, loop=loop, timeout_s=camera.timeout_s, controls=camera.controls)
    return opened if view.is_plain else ViewedCamera(opened, view)


def open_camera(
    spec: str,
    *,
    loop: bool = False,
    timeout_s: float = TIMEOUT_S,
    controls: Mapping[str, float | str] | None = None,
) -> Camera:
    """Open the source that `spec` names; with `loop` it restarts at its end.

    `folder:PATH` delivers the images below a folder in order, `video:PATH` the frames of a video file, and
    `fake:?frames=20&size=640x480&seed=1` synthetic images; the other kinds are live. `timeout_s` bounds opening and
    each capture. `controls` (name -> value or `auto`) are set on v4l2 and picamera2 cameras; a refused one is logged.
    Raises `CameraSpecError` if `spec` is wrong and `CameraError` if the source does not open.

    >>> with open_camera("fake:?frames=3&size=640x480") as camera:
    ...     shapes = [camera.capture().pixels().shape for _ in range(3)]
    >>> shapes[0], shapes[-1]
    ((480, 640, 3), (480, 640, 3))
    """
    kind, rest = _split(spec)
    if loop:
        return LoopingCamera(spec, timeout_s=timeout_s)
    further = {"controls": controls} if controls and kind in CONTROLLED else {}
    try:
        camera = _class_of(kind).open(rest, timeout_s=timeout_s, **further)
    except CameraError as error:
        error.args = (redact(str(error)),)
        raise
    problems = getattr(camera, "problems", ())
    if controls and not further:
        problems = (f"{kind} cameras have no controls; those of v4l2 and picamera2 can be set",)
    for problem in problems:
        _warn_once(f"camera {redact(spec)}: {problem}")
    return cast(Camera, camera)


def check_spec(spec: str) -> None:
    """Raise `CameraSpecError` unless a camera can be specified so; opens nothing, also for a camera elsewhere."""
    kind, rest = _split(spec)
    _class_of(kind).parse(rest)


def _split(spec: str) -> tuple[str, str]:
    """Kind and rest of a specification. Raises `CameraSpecError` for an unknown kind."""
    kind, colon, rest = spec.partition(":")
    if not colon or kind not in KINDS:
        meant = suggest(spec)
        known = f"write {redact(meant)!r}" if meant else f"allowed are {', '.join(f'{k}:' for k in KINDS)}"
        raise CameraSpecError(f"camera {redact(spec)!r}: unknown kind; {known}")
    return kind, rest


def _class_of(kind: str) -> Any:
    """The class that reads a kind of camera."""
    module, name = KINDS[kind].split(":")
    return getattr(importlib.import_module(module), name)


def _warn_once(text: str) -> None:
    """Log a warning; a camera that is reopened all the time logs it once."""
    if text not in _warned:
        if len(_warned) >= _MAX_WARNED:
            _warned.clear()
        _warned.add(text)
        _logger.warning("%s", text)
