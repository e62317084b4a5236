"""Where frames come from: one small protocol, one file for each kind of source.

A source is named by a specification `KIND:REST`, e.g. `v4l2:0`, `mjpeg:http://camera/stream`, `folder:images/` or
`fake:`. A source promises that `capture` returns or raises within the timeout that it was opened with; one whose
library cannot promise that lives in a process of its own (`isolated.py`), which can be killed. Nobody has to trust a
source to stay well: `steady.py` watches any of them and opens it again.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass, field
from time import monotonic
from types import TracebackType
from typing import Protocol, cast

from eyas_device.errors import CameraSpecError
from eyas_device.preprocess import Pixels, Preprocessing, decode
from eyas_device.support.closing import Closing

KINDS = {
    "v4l2": "eyas_device.camera.v4l2:V4L2Camera",
    "rtsp": "eyas_device.camera.rtsp:RtspCamera",
    "mjpeg": "eyas_device.camera.mjpeg:MjpegCamera",
    "picamera2": "eyas_device.camera.picamera2:Picamera2Camera",
    "gst": "eyas_device.camera.gstreamer:GStreamerCamera",
    "video": "eyas_device.camera.video:VideoCamera",
    "folder": "eyas_device.camera.folder:FolderCamera",
    "fake": "eyas_device.camera.fake:FakeCamera",
}
"""Kind -> class. Its `open(rest, timeout_s=...)` reads what stands behind the colon."""
TIMEOUT_S = 5.0


@dataclass(frozen=True)
class Frame:
    """One image and where it is from. Encoded bytes stay encoded until somebody looks at the frame."""

    image: Pixels | bytes
    """uint8 [height, width, 3] BGR, or the bytes of an encoded image (JPEG, PNG, ...)."""
    time: float
    """When it was captured, seconds since 1970."""
    source: str
    """Where it is from: the file, or the video and frame number. Shown in answers and messages."""
    captured: float = field(default_factory=monotonic)
    """When it was captured by a clock that never jumps (`time.monotonic`), for its age."""

    def pixels(self, spec: Preprocessing | None = None) -> Pixels:
        """The decoded image, uint8 BGR, for the model of `spec` if that is given.

        Raises `ImageError` if the bytes cannot be decoded.
        """
        return decode(self.image, spec=spec, where=self.source) if isinstance(self.image, bytes) else self.image


class Camera(Protocol):
    """A source of frames; a context manager that gives the device back when it closes."""

    live: bool
    """Whether frames come in real time: one that nobody looked at in time is replaced by a newer one, not kept."""

    def capture(self) -> Frame | None:
        """The next frame, or None at the end of the source.

        Raises `ImageError` if this one frame is unusable (the next call goes on with the next one) and `CameraError`
        if the source stopped delivering.
        """

    def close(self) -> None:
        """Give the source back; closing twice is fine."""

    def __enter__(self) -> Camera: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None: ...


class Looping(Closing):
    """A source that starts again at its end, until it delivers nothing at all."""

    def __init__(self, spec: str, *, timeout_s: float = TIMEOUT_S) -> None:
        self._spec, self._timeout_s = spec, timeout_s
        self._camera = open_camera(spec, timeout_s=timeout_s)
        self.live = self._camera.live

    def capture(self) -> Frame | None:
        """The next frame of this round or the first of the next; None if that has none."""
        frame = self._camera.capture()
        if frame is None:
            self._camera.close()
            self._camera = open_camera(self._spec, timeout_s=self._timeout_s)
            frame = self._camera.capture()
        return frame

    def close(self) -> None:
        """Close the source of this round."""
        self._camera.close()


def is_live(spec: str) -> bool:
    """Whether the source that `spec` names delivers in real time, told without opening it."""
    kind, _, rest = spec.partition(":")
    if kind == "fake":
        return "live=1" in rest.partition("?")[2].split("&")
    return kind not in ("video", "folder")


def open_camera(spec: str, *, loop: bool = False, timeout_s: float = TIMEOUT_S) -> Camera:
    """Open the source that `spec` names; with `loop` it starts again at its end.

    `folder:PATH` delivers the images below a folder in order, `video:PATH` the frames of a video file, and
    `fake:?frames=20&size=640x480&seed=1` drawn images; the other kinds are live. `timeout_s` bounds how long opening
    and each capture take. Raises `CameraSpecError` if `spec` is mistaken and `CameraError` if the source does not open.
    """
    kind, colon, rest = spec.partition(":")
    if not colon or kind not in KINDS:
        raise CameraSpecError(f"camera {spec!r}: no such kind; allowed are {', '.join(f'{k}:' for k in KINDS)}")
    if loop:
        return Looping(spec, timeout_s=timeout_s)
    module, name = KINDS[kind].split(":")
    return cast(Camera, getattr(importlib.import_module(module), name).open(rest, timeout_s=timeout_s))
