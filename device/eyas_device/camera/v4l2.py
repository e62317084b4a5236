"""Video4Linux2 devices: USB cameras and capture cards."""

from __future__ import annotations

import errno
import fcntl
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import msgspec
import numpy as np
import numpy.typing as npt

from eyas_device.camera import TIMEOUT_S
from eyas_device.camera.controls import Wanted, set_v4l2
from eyas_device.camera.opencv import trim_jpeg
from eyas_device.camera.spec import RATE, SIZE, parse_options, parse_rate, parse_size
from eyas_device.camera.subprocess import SubprocessCamera
from eyas_device.camera.v4l2_device import Buffer, Ioctl, NoSignalError, PixelFormat, V4L2Device, capture_nodes
from eyas_device.camera.v4l2_pixels import JPEG, LAYOUTS, to_bgr
from eyas_device.errors import CameraError, CameraSpecError, ImageError

_USAGE = "v4l2:NUMBER or v4l2:/dev/PATH, with ?size=WIDTHxHEIGHT&fps=N&format=FORMAT"
_USAGE += f"; FORMAT is one of {', '.join(code.lower() for code in (*JPEG, *LAYOUTS))}"
_PATTERNS = {"size": SIZE, "fps": RATE, "format": "|".join(code.lower() for code in (*JPEG, *LAYOUTS))}
_DEFAULT_SIZE = 640, 480
_SAME_RATE = 0.01
_PATIENCE = 0.9
"""Share of the time-out after which this process reports a silent device, before its parent ends it."""


class Settings(msgspec.Struct, frozen=True):
    """A device and what is requested of it."""

    source: str
    """Path of its node."""
    timeout_s: float = TIMEOUT_S
    size: tuple[int, int] | None = None
    """Width and height, pixels."""
    fps: float | None = None
    """Frame rate, frames per second."""
    format: str = ""
    """Lower-case code of a pixel format; empty: JPEG if the device has it, else the best that can be read."""
    controls: dict[str, float | str] = {}
    """Control -> value or `auto`."""


class V4L2Camera(SubprocessCamera):
    """A V4L2 device, read in a separate process; JPEG from the driver stays undecoded."""

    @classmethod
    def open(cls, rest: str, *, timeout_s: float = TIMEOUT_S, controls: Wanted | None = None) -> V4L2Camera:
        """Open `v4l2:0?size=1280x720&fps=30&format=mjpg`; the default format is mjpg if the device supports it.

        A driver may deliver the nearest size instead of the requested one; `Frame.source` then names it.
        `controls` are set once it is open; those that are refused are in `problems`.
        Raises `CameraSpecError` for a wrong specification, and `CameraError` if the device is missing, not permitted,
        in use, or not a camera: device numbers change when others are plugged in.
        """
        shown = f"v4l2:{rest}"
        settings = msgspec.structs.replace(cls.parse(rest), timeout_s=timeout_s, controls=dict(controls or {}))
        # The most common failure is checked here: starting a process on each attempt would cost much more.
        if not Path(settings.source).exists():
            raise CameraError(f"camera {shown}: {_errno_message(errno.ENOENT, settings.source)}")
        return cls(f"{__name__}:V4L2Reader", settings, shown=shown, timeout_s=timeout_s)

    @staticmethod
    def parse(rest: str) -> Settings:
        """Device, size, rate and format of a specification. Raises `CameraSpecError` for a wrong one."""
        shown = f"v4l2:{rest}"
        device, _, query = rest.partition("?")
        values = parse_options(query, _PATTERNS, spec=shown, usage=_USAGE)
        if re.fullmatch(r"\d{1,3}", device, re.ASCII):
            device = f"/dev/video{int(device)}"
        elif not device.startswith("/") or "\0" in device:
            raise CameraSpecError(f"camera {shown}: {device!r} is not a device; allowed are {_USAGE}")
        return Settings(
            source=device,
            size=parse_size(values["size"], spec=shown, usage=_USAGE) if "size" in values else None,
            fps=parse_rate(values["fps"], spec=shown, usage=_USAGE) if "fps" in values else None,
            format=values.get("format", ""),
        )


class V4L2Reader:
    """Reads a V4L2 device; JPEG stays undecoded, other formats become BGR."""

    def __init__(self, settings: dict[str, Any]) -> None:
        """Open the device, take format, size and rate, and start to stream. Raises `CameraError`."""
        cv2.setNumThreads(1)
        self.settings = msgspec.convert(settings, Settings)
        self.note = ""
        """How the source differs from the request."""
        self._frame: Buffer | None = None
        path = self.settings.source
        if (problem := find_problem(path)) is not None:
            raise problem
        try:
            self._device = V4L2Device(path)
        except OSError as error:
            raise _camera_error(error, path) from None
        try:
            self.format = self._configure()
            self.problems = set_v4l2(path, self.settings.controls)
            """Controls that could not be set."""
            self._device.start()
        except OSError as error:
            self._device.close()
            raise error if isinstance(error, CameraError) else _camera_error(error, path) from None

    def _configure(self) -> PixelFormat:
        """Negotiate with the driver; `note` says what it took instead of what was requested."""
        wanted, device = self.settings, self._device
        default = None if device.follow_signal() else _DEFAULT_SIZE
        taken = device.set_format(_choose(device.formats(), wanted.format), wanted.size or default)
        if taken.code not in (*JPEG, *LAYOUTS):
            raise CameraError(f"its driver delivers {taken.code} in place of the format that was requested")
        notes = []
        if wanted.size is not None and (taken.width, taken.height) != wanted.size:
            notes.append(f"{taken.width}x{taken.height}, the nearest supported size")
        if wanted.fps is not None:
            fps = device.set_rate(wanted.fps)
            if fps is None:
                notes.append("its driver has no frame rate to set")
            elif abs(fps - wanted.fps) > _SAME_RATE * wanted.fps:
                notes.append(f"{fps:.4g} frames/s, the nearest supported rate")
        self.note = "; ".join(notes)
        return taken

    def grab(self) -> bool:
        """Wait for the next frame, the newest one that the driver holds."""
        self._frame = None
        timeout_s = _PATIENCE * self.settings.timeout_s
        try:
            self._frame = self._device.wait(timeout_s)
        except OSError as error:
            raise _camera_error(error, self.settings.source) from None
        if self._frame is None:
            raise CameraError(f"no frame came within {timeout_s:.2g} s")
        return True

    def retrieve(self, buffer: npt.NDArray[np.uint8]) -> npt.NDArray[Any] | bytes:
        """The grabbed frame, as JPEG bytes or BGR pixels. Raises `ImageError` for one that is damaged."""
        frame = self._frame
        if frame is None or frame.broken:
            raise ImageError("the driver marked it as damaged")
        if self.format.code not in JPEG:
            return to_bgr(frame.data, self.format)
        data = trim_jpeg(frame.data.tobytes())
        if data is None:
            raise ImageError("not a JPEG, though the device promised one")
        return data

    def close(self) -> None:
        """Release the device."""
        self._frame = None
        self._device.close()


def _choose(offered: Sequence[str], wanted: str) -> str:
    """The format to ask for: the requested one, else JPEG, else the best of those that can be read."""
    readable = [code for code in (*JPEG, *LAYOUTS) if code in offered]
    names = ", ".join(code.lower() for code in readable)
    if not readable:
        raise CameraError(f"its driver delivers {', '.join(offered) or 'no format'}, which Eyas cannot read")
    if not wanted:
        return readable[0]
    code = wanted.upper()
    if code not in readable:
        raise CameraError(f"its driver does not deliver {wanted}; omit format=, or use one of {names}")
    return code


def find_problem(path: str, *, ioctl: Ioctl = fcntl.ioctl) -> CameraError | None:
    """Why the device `path` cannot capture; None if it can, or if another program uses it."""
    if Path(path).exists() and not Path(path).is_char_device():  # before it is opened, which may not be allowed
        return CameraError(_errno_message(errno.ENOTTY, path))
    try:
        device = V4L2Device(path, ioctl=ioctl)
    except OSError as error:
        return _camera_error(error, path)
    captures = device.captures
    device.close()
    if captures:
        return None
    return CameraError(f"{path} is a video device without capture (a codec, output or metadata); {_others(path)}")


def _others(path: str) -> str:
    """Which nodes are cameras."""
    nodes = [node for node in capture_nodes() if not node.startswith(f"{path} ")]
    return f"cameras are {', '.join(nodes)}" if nodes else "no /dev/video* is a camera"


def _camera_error(error: OSError, path: str) -> CameraError:
    if isinstance(error, NoSignalError):
        return CameraError(error.strerror)
    return CameraError(_errno_message(error.errno or 0, path))


def _hint(path: str) -> str:
    """What to look for in place of a node that is not there: numbers change when a camera is plugged in again."""
    there = sorted(str(node) for node in Path("/dev/v4l/by-path").glob("*-video-index0"))
    if not there or not path.startswith("/dev/video"):
        return "`ls /dev/video*` lists the devices"
    return f"Numbers change, names do not: use {' or '.join(f'v4l2:{name}' for name in there)}"


def _errno_message(number: int, path: str) -> str:
    """Explain an error number of open or ioctl, and what to do."""
    if number in (errno.ENOENT, errno.ENODEV, errno.ENXIO):
        return f"{path} does not exist (now); is the camera plugged in? {_hint(path)}"
    if number in (errno.EACCES, errno.EPERM):
        return f"{path}: permission denied; add the user to the group: sudo usermod -aG video USER"
    if number == errno.EBUSY:
        return f"{path} is in use by another program; `fuser -v {path}` names it"
    if number == errno.ENOTTY:
        return f"{path} is not a video device; `ls /dev/video*` lists them"
    if number == errno.ENOSPC:
        return f"{path}: its USB bus has no bandwidth left; use format=mjpg, a smaller size or rate, or another port"
    return f"{path}: its driver reports an error ({os.strerror(number)})"
