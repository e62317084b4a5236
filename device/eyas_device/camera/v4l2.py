"""Video4Linux2 devices: USB cameras and capture cards."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import struct
from collections.abc import Callable
from pathlib import Path

import cv2
import msgspec

from eyas_device.camera import TIMEOUT_S
from eyas_device.camera.controls import Wanted, set_v4l2
from eyas_device.camera.opencv import OpenCVReader, Settings
from eyas_device.camera.spec import RATE, SIZE, parse_options, parse_rate, parse_size
from eyas_device.camera.subprocess import SubprocessCamera
from eyas_device.errors import CameraError, CameraSpecError

_USAGE = "v4l2:NUMBER or v4l2:/dev/PATH, with ?size=WIDTHxHEIGHT&fps=N&format=mjpg|yuyv"
_PATTERNS = {"size": SIZE, "fps": RATE, "format": "mjpg|yuyv"}
# Source: linux/videodev2.h.
_QUERYCAP, _REQBUFS = 0x80685600, 0xC0145608
_CAPTURES = {0x00000001: 1, 0x00001000: 9}
"""Capability -> buffer type, for single- and multi-planar capture."""
_HAS_DEVICE_CAPS = 0x80000000
_MMAP = 1


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


class V4L2Reader(OpenCVReader):
    """OpenCV's V4L2 backend."""

    backend = cv2.CAP_V4L2

    def check_source(self) -> None:  # OpenCV does not say why it cannot open a device
        error = find_problem(self.settings.source)
        if error is not None:
            raise error

    def open_error(self) -> CameraError:
        return find_problem(self.settings.source, buffers=True) or CameraError(
            "its driver delivers no format that OpenCV can read; `v4l2-ctl --list-formats-ext` lists them"
        )

    def configure(self) -> None:
        # Format, size and rate, in the order that OpenCV's backend needs.
        requested = self.settings
        code = "YUYV" if requested.format == "yuyv" else "MJPG"
        self.video.set(cv2.CAP_PROP_FOURCC, cv2.VideoWriter.fourcc(*code))
        if requested.size is not None:
            self.video.set(cv2.CAP_PROP_FRAME_WIDTH, requested.size[0])
            self.video.set(cv2.CAP_PROP_FRAME_HEIGHT, requested.size[1])
        if requested.fps is not None:
            self.video.set(cv2.CAP_PROP_FPS, requested.fps)
        if requested.format != "yuyv" and int(self.video.get(cv2.CAP_PROP_FOURCC)) == cv2.VideoWriter.fourcc(*"MJPG"):
            self.take_undecoded()
        elif requested.format == "mjpg":
            raise CameraError("its driver does not deliver mjpg; omit format= or use format=yuyv")
        size = int(self.video.get(cv2.CAP_PROP_FRAME_WIDTH)), int(self.video.get(cv2.CAP_PROP_FRAME_HEIGHT))
        if requested.size is not None and size != requested.size:
            self.note = f"{size[0]}x{size[1]}, the nearest supported size"
        self.problems = set_v4l2(requested.source, requested.controls)


def find_problem(
    path: str, *, buffers: bool = False, ioctl: Callable[[int, int, bytearray], object] = fcntl.ioctl
) -> CameraError | None:
    """Why the device `path` cannot capture; None if it can.

    With `buffers`, also requests a buffer, which the driver refuses while another program uses the device.
    """
    if Path(path).exists() and not Path(path).is_char_device():  # before it is opened, which may not be allowed
        return CameraError(_errno_message(errno.ENOTTY, path))
    try:
        device = os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        return _camera_error(error, path)
    try:
        answer = bytearray(104)
        ioctl(device, _QUERYCAP, answer)
        capabilities, device_caps = struct.unpack_from("=II", answer, 84)
        mask = device_caps if capabilities & _HAS_DEVICE_CAPS else capabilities
        kinds = [kind for flag, kind in _CAPTURES.items() if mask & flag]
        if not kinds:
            return CameraError(
                f"{path} is a video device without capture (a codec or metadata); try the other /dev/video*"
            )
        if buffers:
            ioctl(device, _REQBUFS, bytearray(struct.pack("=IIIII", 1, kinds[0], _MMAP, 0, 0)))
            ioctl(device, _REQBUFS, bytearray(struct.pack("=IIIII", 0, kinds[0], _MMAP, 0, 0)))
    except OSError as error:
        return _camera_error(error, path)
    finally:
        os.close(device)
    return None


def _camera_error(error: OSError, path: str) -> CameraError:
    return CameraError(_errno_message(error.errno or 0, path))


def _errno_message(number: int, path: str) -> str:
    """Explain an error number of open or ioctl, and what to do."""
    if number in (errno.ENOENT, errno.ENODEV, errno.ENXIO):
        return f"{path} does not exist (now); is the camera plugged in? `ls /dev/video*` lists the devices"
    if number in (errno.EACCES, errno.EPERM):
        return f"{path}: permission denied; add the user to the group: sudo usermod -aG video USER"
    if number == errno.EBUSY:
        return f"{path} is in use by another program; `fuser -v {path}` names it"
    if number == errno.ENOTTY:
        return f"{path} is not a video device; `ls /dev/video*` lists them"
    return f"{path}: {os.strerror(number)}"
