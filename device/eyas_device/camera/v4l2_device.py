"""A Video4Linux2 device as Linux shows it: what it is, its formats, input and rate, and the frames that it streams.

Source of all numbers: linux/videodev2.h, with the layout of 64-bit systems.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import math
import mmap
import os
import select
import struct
from collections.abc import Callable
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Ioctl = Callable[[int, int, bytearray], object]

_QUERYCAP, _ENUM_FMT, _G_FMT, _S_FMT = 0x80685600, 0xC0405602, 0xC0D05604, 0xC0D05605
_REQBUFS, _QUERYBUF, _QBUF, _DQBUF = 0xC0145608, 0xC0585609, 0xC058560F, 0xC0585611
_STREAMON, _STREAMOFF, _S_PARM = 0x40045612, 0x40045613, 0xC0CC5616
_G_INPUT, _ENUMINPUT = 0x80045626, 0xC050561A
_S_DV_TIMINGS, _QUERY_DV_TIMINGS = 0xC0845657, 0x80845663
_SUBSCRIBE_EVENT, _DQEVENT, _SOURCE_CHANGE = 0x4020565A, 0x80885659, 5
_CAPTURE, _CAPTURE_PLANES = 1, 9
_CAPABILITIES = MappingProxyType({0x00000001: _CAPTURE, 0x00001000: _CAPTURE_PLANES})
"""Capability -> type of buffer, for single- and multi-planar capture."""
_HAS_DEVICE_CAPS = 0x80000000
_MMAP, _ERROR_FLAG = 1, 0x40
_NO_SIGNAL = MappingProxyType(
    {errno.ENOLINK: "no signal", errno.ENOLCK: "an unstable signal", errno.ERANGE: "a signal that it does not support"}
)
_NO_POWER_STATUS, _NO_SIGNAL_STATUS = 1, 2
_ENCODINGS = MappingProxyType({1: "601", 2: "709", 3: "601", 4: "709", 6: "2020", 7: "2020", 8: "240"})
"""`enum v4l2_ycbcr_encoding`; 0 is the one of the colour space."""
_ENCODING_OF = MappingProxyType({2: "240", 3: "709", 10: "2020", 12: "709"})
"""`enum v4l2_colorspace` whose YCbCr is not that of BT.601."""
_JPEG_COLOURS = 7
_FULL_RANGE = MappingProxyType({1: True, 2: False})
"""`enum v4l2_quantization`; 0 is the usual one."""
_BUFFERS = 4
_PLANE_BYTES = 64
_MAX_FORMATS = 256


class NoSignalError(OSError):
    """The device is there, and nothing usable is connected to its input."""


class PixelFormat(NamedTuple):
    """What the driver delivers."""

    code: str
    """Four characters, as `v4l2-ctl --list-formats` shows them, e.g. `YUYV`; spaces at the end are cut off."""
    width: int
    height: int
    row_bytes: int
    """Bytes from one row to the next; 0 where the driver has none (JPEG)."""
    encoding: str = "601"
    """How RGB became YCbCr: `601`, `709`, `2020` or `240` (SMPTE 240M)."""
    full_range: bool | None = None
    """Whether values go from 0 to 255; None: as is usual, RGB does and YCbCr goes from 16 to 235."""


class Buffer(NamedTuple):
    """A filled buffer, which stays as it is until the next `wait`."""

    data: npt.NDArray[np.uint8]
    broken: bool
    """Whether the driver marked it as damaged."""


class V4L2Device:
    """An open device. Methods raise `OSError` with the driver's error number."""

    def __init__(self, path: str, *, ioctl: Ioctl = fcntl.ioctl) -> None:
        self._call = ioctl
        self._maps: list[mmap.mmap] = []
        self._held: int | None = None
        self._file = os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            answer = bytearray(104)
            self._ioctl(_QUERYCAP, answer)
        except OSError:
            os.close(self._file)
            raise
        self.name = answer[16:48].partition(b"\0")[0].decode("utf-8", "replace")
        """Name of the camera or chip."""
        capabilities, device_caps = struct.unpack_from("=II", answer, 84)
        mask = device_caps if capabilities & _HAS_DEVICE_CAPS else capabilities
        self._type = next((kind for flag, kind in _CAPABILITIES.items() if mask & flag), 0)
        self._plane = ctypes.create_string_buffer(_PLANE_BYTES)

    @property
    def captures(self) -> bool:
        """Whether it delivers images: codecs and nodes for metadata or output do not."""
        return self._type != 0

    def formats(self) -> list[str]:
        """Codes of the pixel formats that the driver offers."""
        codes = []
        with contextlib.suppress(OSError):  # EINVAL after the last one
            for index in range(_MAX_FORMATS):
                data = bytearray(64)
                struct.pack_into("=II", data, 0, index, self._type)
                self._ioctl(_ENUM_FMT, data)
                codes.append(_text(data[44:48]))
        return codes

    def set_format(self, code: str, size: tuple[int, int] | None) -> PixelFormat:
        """Ask for a format and a size (width, height), or the present size; returns what the driver took."""
        planes = self._type == _CAPTURE_PLANES
        data = bytearray(208)
        self._set_type(data)
        self._ioctl(_G_FMT, data)
        present = struct.unpack_from("=II", data, 8)
        struct.pack_into("=II4sI", data, 8, *(size or present), _fourcc(code), 0)
        # length and padding of a row are the driver's to choose
        struct.pack_into("=II", data, 28 if planes else 24, 0, 0)
        self._ioctl(_S_FMT, data)
        width, height = struct.unpack_from("=II", data, 8)
        row_bytes = struct.unpack_from("=I", data, 32 if planes else 24)[0]
        colours = struct.unpack_from("=I", data, 24 if planes else 32)[0]
        encoding, span = struct.unpack_from("=BB", data, 190) if planes else struct.unpack_from("=II", data, 44)
        return PixelFormat(
            _text(data[16:20]),
            width,
            height,
            row_bytes,
            _ENCODINGS.get(encoding) or _ENCODING_OF.get(colours, "601"),
            _FULL_RANGE.get(span, True if colours == _JPEG_COLOURS else None),
        )

    def set_rate(self, fps: float) -> float | None:
        """Ask for a frame rate; returns the one that the driver took, or None if it has none to set."""
        data = bytearray(204)
        self._set_type(data)
        struct.pack_into("=II", data, 12, 1000, round(fps * 1000))
        try:
            self._ioctl(_S_PARM, data)
        except OSError:
            return None
        numerator, denominator = struct.unpack_from("=II", data, 12)
        return denominator / numerator if numerator else None

    def follow_signal(self) -> bool:
        """Set a digital video input to the signal that it receives; False for a camera, which has no such input.

        Raises `NoSignalError` if the driver says that nothing usable is connected.
        """
        name = self._check_input()
        timings = bytearray(132)
        try:
            self._ioctl(_QUERY_DV_TIMINGS, timings)
        except OSError as error:
            if problem := _NO_SIGNAL.get(error.errno or 0):
                raise NoSignalError(error.errno, f"{problem} at its input{name and f' {name}'}") from None
            return False
        self._ioctl(_S_DV_TIMINGS, timings)
        return True

    def _check_input(self) -> str:
        """Name of the input, empty if it has none. Raises `NoSignalError`."""
        number = bytearray(4)
        data = bytearray(80)
        try:
            self._ioctl(_G_INPUT, number)
            data[:4] = number
            self._ioctl(_ENUMINPUT, data)
        except OSError:
            return ""
        name, status = _text(data[4:36]), struct.unpack_from("=I", data, 56)[0]
        if status & (_NO_POWER_STATUS | _NO_SIGNAL_STATUS):
            missing = "no power" if status & _NO_POWER_STATUS else "no signal"
            raise NoSignalError(errno.ENOLINK, f"{missing} at its input {name}")
        return name

    def start(self) -> None:
        """Start to stream."""
        with contextlib.suppress(OSError):  # not every driver has events
            self._ioctl(_SUBSCRIBE_EVENT, bytearray(struct.pack("=II24x", _SOURCE_CHANGE, 0)))
        request = bytearray(struct.pack("=IIIII", _BUFFERS, self._type, _MMAP, 0, 0))
        self._ioctl(_REQBUFS, request)
        for index in range(struct.unpack_from("=I", request)[0]):
            data = self._buffer(index)
            self._ioctl(_QUERYBUF, data)
            if self._type == _CAPTURE_PLANES:
                length, offset = struct.unpack_from("=II", self._plane, 4)
            else:
                offset, length = struct.unpack_from("=I4xI", data, 64)
            self._maps.append(mmap.mmap(self._file, length, mmap.MAP_SHARED, mmap.PROT_READ, offset=offset))
            self._ioctl(_QBUF, self._buffer(index))
        self._ioctl(_STREAMON, bytearray(struct.pack("=I", self._type)))

    def wait(self, timeout_s: float) -> Buffer | None:
        """Wait for the newest filled buffer, and give older ones back; None after `timeout_s`.

        Raises `NoSignalError` when the signal at the input has changed: the device must be opened again.
        """
        self._release()
        poll = select.poll()
        poll.register(self._file, select.POLLIN | select.POLLPRI)
        events = poll.poll(math.ceil(1000 * timeout_s))
        if not events:
            return None
        if events[0][1] & select.POLLPRI and self._source_changed():
            raise NoSignalError(errno.ENOLINK, "the signal at its input changed")
        newest: Buffer | None = None
        while True:
            data = self._buffer(0)
            try:
                self._ioctl(_DQBUF, data)
            except OSError as error:
                if error.errno != errno.EAGAIN:
                    raise
                if newest is None and events[0][1] & (select.POLLERR | select.POLLHUP):
                    raise OSError(errno.EIO, "the driver ended the stream") from None
                break
            self._release()
            index, _, used, flags = struct.unpack_from("=IIII", data)
            offset = 0
            if self._type == _CAPTURE_PLANES:
                used, offset = struct.unpack_from("=I12xI", self._plane)
            self._held = index
            newest = Buffer(np.frombuffer(self._maps[index], np.uint8)[offset:used], bool(flags & _ERROR_FLAG))
        return newest or self.wait(timeout_s)

    def close(self) -> None:
        """Stop the stream and release the device."""
        with contextlib.suppress(OSError):
            self._ioctl(_STREAMOFF, bytearray(struct.pack("=I", self._type)))
        for mapped in self._maps:
            with contextlib.suppress(BufferError):  # an image that is still referred to
                mapped.close()
        self._maps.clear()
        os.close(self._file)

    def _release(self) -> None:
        """Give the held buffer back to the driver."""
        if self._held is not None:
            held, self._held = self._held, None
            self._ioctl(_QBUF, self._buffer(held))

    def _source_changed(self) -> bool:
        changed = False
        with contextlib.suppress(OSError):  # ENOENT after the last one
            while True:
                event = bytearray(136)
                self._ioctl(_DQEVENT, event)
                changed = changed or struct.unpack_from("=I", event)[0] == _SOURCE_CHANGE
        return changed

    def _buffer(self, index: int) -> bytearray:
        """A `struct v4l2_buffer`."""
        data = bytearray(88)
        struct.pack_into("=II", data, 0, index, self._type)
        struct.pack_into("=I", data, 60, _MMAP)
        if self._type == _CAPTURE_PLANES:
            struct.pack_into("=QI", data, 64, ctypes.addressof(self._plane), 1)
        return data

    def _set_type(self, data: bytearray) -> None:
        struct.pack_into("=I", data, 0, self._type)

    def _ioctl(self, request: int, data: bytearray) -> None:
        self._call(self._file, request, data)


def capture_nodes(*, ioctl: Ioctl = fcntl.ioctl) -> list[str]:
    """The nodes that deliver images and can be opened, with the names of their cameras."""
    found = []
    for path in sorted(Path("/dev").glob("video*"), key=lambda node: (len(node.name), node.name)):
        with contextlib.suppress(OSError):
            device = V4L2Device(str(path), ioctl=ioctl)
            if device.captures:
                found.append(f"{path} ({device.name})")
            device.close()
    return found


def _fourcc(code: str) -> bytes:
    """A format's four bytes."""
    code, big_endian, _ = code.partition("-BE")
    data = bytearray(code.ljust(4).encode("latin-1"))
    data[3] |= 0x80 if big_endian else 0
    return bytes(data)


def _text(data: bytes | bytearray) -> str:
    """Fixed-length text of the kernel; a format that is stored with its highest byte first ends in `-BE` there."""
    text = bytes(data).partition(b"\0")[0]
    if len(text) == 4 and text[3] & 0x80:
        return text[:3].decode("latin-1").rstrip() + chr(text[3] & 0x7F).strip() + "-BE"
    return text.decode("latin-1").rstrip()
