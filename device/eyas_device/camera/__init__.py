"""Where frames come from: one small protocol, one file for each kind of source.

A source is named by a specification `KIND:REST`, e.g. `folder:pictures/`, `video:belt.mp4` or `fake:`.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from types import TracebackType
from typing import Protocol, cast

from eyas_device.closing import Closing
from eyas_device.errors import CameraError
from eyas_device.preprocess import Pixels, decode

_KINDS = {
    "folder": "eyas_device.camera.folder:FolderCamera",
    "video": "eyas_device.camera.video:VideoCamera",
    "fake": "eyas_device.camera.fake:FakeCamera",
}


@dataclass(frozen=True)
class Frame:
    """One picture and where it is from. Encoded bytes stay encoded until somebody looks at the frame."""

    image: Pixels | bytes
    """uint8 [height, width, 3] BGR, or the bytes of an encoded picture (JPEG, PNG, ...)."""
    time: float
    """When it was captured, seconds since 1970."""
    source: str
    """Where it is from: the file, or the video and frame number. Shown in answers and messages."""

    def pixels(self) -> Pixels:
        """The decoded picture, uint8 BGR. Raises `PictureError` if the bytes cannot be decoded."""
        return decode(self.image, where=self.source) if isinstance(self.image, bytes) else self.image


class Camera(Protocol):
    """A source of frames; a context manager that gives the device back when it closes."""

    def capture(self) -> Frame | None:
        """The next frame, or None at the end of the source.

        Raises `PictureError` if this one frame is unusable (the next call goes on with the next one) and `CameraError`
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

    def __init__(self, spec: str) -> None:
        self._spec = spec
        self._camera = open_camera(spec)

    def capture(self) -> Frame | None:
        """The next frame of this round or the first of the next; None if that has none."""
        frame = self._camera.capture()
        if frame is None:
            self._camera.close()
            self._camera = open_camera(self._spec)
            frame = self._camera.capture()
        return frame

    def close(self) -> None:
        """Close the source of this round."""
        self._camera.close()


def open_camera(spec: str, *, loop: bool = False) -> Camera:
    """Open the source that `spec` names; with `loop` it starts again at its end.

    `folder:PATH` delivers the pictures below a folder in order, `video:PATH` the frames of a video file, and
    `fake:?frames=20&size=640x480&seed=1` drawn pictures. Raises `CameraError` if there is no such source.
    """
    kind, colon, rest = spec.partition(":")
    if not colon or kind not in _KINDS:
        raise CameraError(f"camera {spec!r}: no such kind of source; allowed are {', '.join(f'{k}:' for k in _KINDS)}")
    if loop:
        return Looping(spec)
    module, name = _KINDS[kind].split(":")
    return cast(Camera, getattr(importlib.import_module(module), name).open(rest))
