"""Cameras of Linux's own interface: USB cameras, capture cards."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import stat
import struct
from collections.abc import Callable
from pathlib import Path

import cv2

from eyas_device.camera import TIMEOUT_S
from eyas_device.camera.opencv import OpenCVReader, Settings
from eyas_device.camera.spec import RATE, SIZE, options, rate, sides
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
    """A V4L2 device, read in a process of its own; JPEG stays undecoded where the driver delivers it."""

    @classmethod
    def open(cls, rest: str, *, timeout_s: float = TIMEOUT_S) -> V4L2Camera:
        """`v4l2:0?size=1280x720&fps=30&format=mjpg`; the format is mjpg where the device has it, unless given.

        A driver may deliver the size nearest to the one asked for: the frames' source says so then.
        Raises `CameraSpecError` for a mistaken specification or a path that is no video device, and `CameraError` if
        the device is not there, not permitted or in use.
        """
        shown = f"v4l2:{rest}"
        device, _, query = rest.partition("?")
        given = options(query, _PATTERNS, spec=shown, usage=_USAGE)
        if re.fullmatch(r"\d{1,3}", device, re.ASCII):
            device = f"/dev/video{int(device)}"
        elif not device.startswith("/") or "\0" in device:
            raise CameraSpecError(f"camera {shown}: {device!r} is no device; allowed are {_USAGE}")
        settings = Settings(
            source=device,
            timeout_s=timeout_s,
            size=sides(given["size"], spec=shown, usage=_USAGE) if "size" in given else None,
            fps=rate(given["fps"], spec=shown, usage=_USAGE) if "fps" in given else None,
            format=given.get("format", ""),
        )
        # The commonest failure, told here: starting a process for it each time would cost more than the look.
        if not Path(device).exists():
            raise CameraError(f"camera {shown}: {_words(errno.ENOENT, device)}")
        return cls(f"{__name__}:V4L2Reader", settings, shown=shown, timeout_s=timeout_s)


class V4L2Reader(OpenCVReader):
    """OpenCV's V4L2 backend."""

    backend = cv2.CAP_V4L2

    def before(self) -> None:
        """Look at the device itself: OpenCV does not say why it does not open one."""
        fault = why_not(self.settings.source)
        if fault is not None:
            raise fault

    def explain(self) -> CameraError:
        """Ask the device for buffers: one that is in use has none to give."""
        return why_not(self.settings.source, buffers=True) or CameraError(
            "its driver delivers no format that OpenCV can read; `v4l2-ctl --list-formats-ext` lists what it has"
        )

    def arrange(self) -> None:
        """Ask for format, size and rate, in the order that OpenCV's backend needs."""
        asked = self.settings
        code = "YUYV" if asked.format == "yuyv" else "MJPG"
        self.video.set(cv2.CAP_PROP_FOURCC, cv2.VideoWriter.fourcc(*code))
        if asked.size is not None:
            self.video.set(cv2.CAP_PROP_FRAME_WIDTH, asked.size[0])
            self.video.set(cv2.CAP_PROP_FRAME_HEIGHT, asked.size[1])
        if asked.fps is not None:
            self.video.set(cv2.CAP_PROP_FPS, asked.fps)
        if asked.format != "yuyv" and int(self.video.get(cv2.CAP_PROP_FOURCC)) == cv2.VideoWriter.fourcc(*"MJPG"):
            self.take_undecoded()
        elif asked.format == "mjpg":
            raise CameraError("its driver does not deliver mjpg; leave format= away or write format=yuyv")
        size = int(self.video.get(cv2.CAP_PROP_FRAME_WIDTH)), int(self.video.get(cv2.CAP_PROP_FRAME_HEIGHT))
        if asked.size is not None and size != asked.size:
            self.note = f"{size[0]}x{size[1]}, the nearest that it has"


def why_not(
    path: str, *, buffers: bool = False, ioctl: Callable[[int, int, bytearray], object] = fcntl.ioctl
) -> CameraError | None:
    """What speaks against capturing from the device `path`, None if nothing does.

    With `buffers` it is asked for a buffer too, which it refuses while another program uses it.
    """
    try:
        device = os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        return _fault(error, path)
    try:
        if not stat.S_ISCHR(os.fstat(device).st_mode):
            return CameraSpecError(f"{path} is no video device; `ls /dev/video*` lists them")
        answer = bytearray(104)
        ioctl(device, _QUERYCAP, answer)
        capabilities, device_caps = struct.unpack_from("=II", answer, 84)
        mask = device_caps if capabilities & _HAS_DEVICE_CAPS else capabilities
        kinds = [kind for flag, kind in _CAPTURES.items() if mask & flag]
        if not kinds:
            return CameraSpecError(
                f"{path} is a video device that captures nothing (a codec or metadata); try its neighbours"
            )
        if buffers:
            ioctl(device, _REQBUFS, bytearray(struct.pack("=IIIII", 1, kinds[0], _MMAP, 0, 0)))
            ioctl(device, _REQBUFS, bytearray(struct.pack("=IIIII", 0, kinds[0], _MMAP, 0, 0)))
    except OSError as error:
        return _fault(error, path)
    finally:
        os.close(device)
    return None


def _fault(error: OSError, path: str) -> CameraError:
    mistake = error.errno in (errno.ENOTTY, errno.EISDIR)
    return (CameraSpecError if mistake else CameraError)(_words(error.errno or 0, path))


def _words(number: int, path: str) -> str:
    """What an error number of open or ioctl means for a camera, and what to do."""
    if number in (errno.ENOENT, errno.ENODEV, errno.ENXIO):
        return f"there is no {path} (now); is the camera plugged in? `ls /dev/video*` lists what is there"
    if number in (errno.EACCES, errno.EPERM):
        return f"{path}: permission denied; add the user to the group: sudo usermod -aG video USER"
    if number == errno.EBUSY:
        return f"{path} is in use by another program; `fuser -v {path}` names it"
    if number in (errno.ENOTTY, errno.EISDIR):
        return f"{path} is no video device; `ls /dev/video*` lists them"
    return f"{path}: {os.strerror(number)}"
