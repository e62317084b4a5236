"""V4L2 cameras: real error paths, and a stand-in for a driver's ioctl; `tests/board` runs them on a real kernel."""

from __future__ import annotations

import ctypes
import errno
import functools
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from eyas_device.camera import open_camera
from eyas_device.camera import v4l2 as v4l
from eyas_device.camera.v4l2_device import PixelFormat, V4L2Device
from eyas_device.camera.v4l2_pixels import LAYOUTS, to_bgr
from eyas_device.errors import CameraError, CameraSpecError, ImageError
from tests.support.streams import jpeg_image


@pytest.mark.parametrize(
    ("spec", "kind", "message"),
    [
        ("v4l2:99", CameraError, "/dev/video99 does not exist"),
        ("v4l2:/dev/video99", CameraError, "is the camera plugged in"),
        ("v4l2:/dev/null", CameraError, "not a video device"),
        (f"v4l2:{__file__}", CameraError, "not a video device"),
        ("v4l2:/tmp", CameraError, "not a video device"),
    ],
)
def test_v4l2_explains_why_a_path_is_not_a_camera(spec: str, kind: type[CameraError], message: str) -> None:
    with pytest.raises(CameraError, match=message) as caught:
        open_camera(spec)
    assert caught.type is kind


@pytest.mark.parametrize(
    ("number", "message"),
    [(errno.EACCES, "usermod -aG video"), (errno.ENODEV, "plugged in"), (errno.EIO, "Input/output error")],
)
def test_v4l2_distinguishes_errors_of_the_device(number: int, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> int:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "open", refuse)
    error = v4l.find_problem("/dev/video0")
    assert type(error) is CameraError and message in str(error)
    assert type(v4l.find_problem(__file__)) is CameraError  # whoever may not open it


class Driver:
    """Stands in for the ioctl of a driver whose buffers lie one after the other in a file."""

    SIZES = ((640, 480), (1280, 720))

    def __init__(self, path: Path, *, formats: tuple[str, ...] = ("MJPG", "YUYV"), planes: bool = False) -> None:
        self.formats, self.planes, self.path = formats, planes, path
        self.capabilities = 0x1000 if planes else 1
        self.frames: list[tuple[bytes, int]] = []
        """Content and flags of the frames to deliver."""
        self.errors: dict[int, int] = {}
        """Request -> error number."""
        self.rates = (30, 10)
        self.fourcc, self.size, self.rate, self.status, self.changed = "", self.SIZES[0], 0.0, 0, False
        self.has_timings = False
        self.queued: list[int] = []
        self.calls: list[int] = []
        self._bytes = 1 << 20
        path.write_bytes(bytes(4 * self._bytes))

    def __call__(self, device: int, request: int, data: bytearray) -> int:
        self.calls.append(request)
        if request in self.errors:
            raise OSError(self.errors[request], os.strerror(self.errors[request]))
        reply = {
            0x80685600: self._query,
            0xC0405602: self._format,
            0xC0D05604: self._present,
            0xC0D05605: self._set_format,
            0xC0CC5616: self._set_rate,
            0xC0145608: lambda data: struct.pack_into("=I", data, 0, 4),
            0xC0585609: self._query_buffer,
            0xC058560F: lambda data: self.queued.append(struct.unpack_from("=I", data)[0]),
            0xC0585611: self._dequeue,
            0x80845663: self._timings,
            0xC050561A: lambda data: struct.pack_into("=8s24xII12xI", data, 4, b"HDMI 0", 2, 0, self.status),
        }.get(request)
        if reply is not None:
            reply(data)
        return 0

    def _query(self, data: bytearray) -> None:
        struct.pack_into("=32s", data, 16, b"Stand-in")
        struct.pack_into("=II", data, 84, 0x80000000 | 0x800000, self.capabilities)

    def _format(self, data: bytearray) -> None:
        index = struct.unpack_from("=I", data)[0]
        if index >= len(self.formats):
            raise OSError(errno.EINVAL, "no more")
        data[44:48] = self.formats[index].encode()

    def _present(self, data: bytearray) -> None:
        struct.pack_into("=II", data, 8, *self.size)

    def _set_format(self, data: bytearray) -> None:
        width, _, code = struct.unpack_from("=II4s", data, 8)
        self.fourcc = code.decode() if code.decode() in self.formats else self.formats[0]
        self.size = min(self.SIZES, key=lambda size: abs(size[0] - width))
        struct.pack_into("=II4s", data, 8, *self.size, self.fourcc.encode())
        struct.pack_into("=I", data, 32 if self.planes else 24, 2 * self.size[0] + 64)

    def _set_rate(self, data: bytearray) -> None:
        over, below = struct.unpack_from("=II", data, 12)
        self.rate = min(self.rates, key=lambda rate: abs(rate - below / over))
        struct.pack_into("=II", data, 12, 1, int(self.rate))

    def _query_buffer(self, data: bytearray) -> None:
        index = struct.unpack_from("=I", data)[0]
        if self.planes:
            self._plane(data, "=I4xI", 4, self._bytes, index * self._bytes)
            self._plane(data, "=II", 4, self._bytes, index * self._bytes)
        else:
            struct.pack_into("=I4xI", data, 64, index * self._bytes, self._bytes)

    def _plane(self, data: bytearray, layout: str, offset: int, *values: int) -> None:
        address = struct.unpack_from("=Q", data, 64)[0] + offset
        packed = struct.pack(layout, *values)
        ctypes.memmove(address, packed, len(packed))

    def _dequeue(self, data: bytearray) -> None:
        if not self.frames or not self.queued:
            raise OSError(errno.EAGAIN, "nothing yet")
        content, flags = self.frames.pop(0)
        index = self.queued.pop(0)
        with self.path.open("r+b") as file:
            file.seek(index * self._bytes)
            file.write(content)
        struct.pack_into("=IIII", data, 0, index, 1, len(content), flags)
        if self.planes:
            self._plane(data, "=I", 0, len(content))
            self._plane(data, "=I", 16, 128)

    def _timings(self, data: bytearray) -> None:
        if not self.has_timings:
            raise OSError(errno.ENOTTY, "a camera")


Make = Callable[..., tuple[v4l.V4L2Reader, Driver]]


@pytest.fixture
def make(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Make:
    """Make the reader on a stand-in driver."""

    def make(*, formats: tuple[str, ...] = ("MJPG", "YUYV"), planes: bool = False, **settings: Any) -> Any:
        errors, status = settings.pop("errors", {}), settings.pop("status", 0)
        driver = Driver(tmp_path / "device", formats=formats, planes=planes)
        driver.errors, driver.status, driver.has_timings = errors, status, settings.pop("timings", False)
        monkeypatch.setattr(v4l, "find_problem", lambda *_, **__: None)
        monkeypatch.setattr(v4l, "V4L2Device", functools.partial(V4L2Device, ioctl=driver))
        return v4l.V4L2Reader({"source": str(driver.path), **settings}), driver

    return make


ROOM = np.zeros(1 << 20, dtype=np.uint8)


def test_jpeg_stays_undecoded_and_is_trimmed(make: Make) -> None:
    reader, driver = make()
    assert driver.fourcc == "MJPG" and driver.queued == [0, 1, 2, 3] and reader.note == ""
    for data in (jpeg_image(1) + bytes(99), jpeg_image(2) + jpeg_image(3)[400:]):
        driver.frames.append((data, 0))
        assert reader.grab()
        assert reader.retrieve(ROOM) == jpeg_image(1 if data.endswith(bytes(9)) else 2)
    driver.frames.append((bytes(50), 0))
    assert reader.grab()
    with pytest.raises(ImageError, match="not a JPEG"):
        reader.retrieve(ROOM)
    reader.close()


def test_the_newest_frame_is_taken_and_every_buffer_comes_back(make: Make) -> None:
    reader, driver = make()
    for number in range(6):
        driver.frames = [(jpeg_image(number), 0), (jpeg_image(number + 1), 0), (jpeg_image(number + 2), 0)]
        assert reader.grab()
        assert reader.retrieve(ROOM) == jpeg_image(number + 2)
        assert len(driver.queued) == 3  # and one is held


def test_a_frame_that_the_driver_marks_as_damaged_is_unusable(make: Make) -> None:
    reader, driver = make()
    driver.frames = [(jpeg_image(1), 0x40)]
    assert reader.grab()
    with pytest.raises(ImageError, match="the driver marked it as damaged"):
        reader.retrieve(ROOM)
    driver.frames = [(jpeg_image(2), 0)]
    assert reader.grab() and reader.retrieve(ROOM) == jpeg_image(2)


@pytest.mark.parametrize("planes", [False, True])
def test_pixels_have_rows_with_padding_and_planes_an_offset(make: Make, planes: bool) -> None:
    reader, driver = make(formats=("YUYV",), planes=planes)
    assert reader.format.row_bytes == 1344
    row = b"\x51\x5a\x51\xf0" * 320 + bytes(64)  # red
    driver.frames = [(bytes(128 if planes else 0) + row * 480, 0)]
    assert reader.grab()
    image = reader.retrieve(ROOM)
    assert isinstance(image, np.ndarray) and image.shape == (480, 640, 3)
    assert (np.abs(image.astype(int) - (0, 0, 254)) <= 2).all()
    driver.frames = [(row * 479, 0)]
    assert reader.grab()
    with pytest.raises(ImageError, match="cut short"):
        reader.retrieve(ROOM)


def test_what_the_driver_takes_instead_is_said(make: Make) -> None:
    reader, driver = make(size=(1300, 700), fps=25, format="yuyv")
    assert reader.note == "1280x720, the nearest supported size; 30 frames/s, the nearest supported rate"
    assert (driver.fourcc, driver.size) == ("YUYV", (1280, 720))
    assert make(size=(640, 480), fps=10)[0].note == ""
    assert make(fps=10, errors={0xC0CC5616: errno.ENOTTY})[0].note == "its driver has no frame rate to set"
    with pytest.raises(CameraError, match=r"does not deliver nv12; omit format=, or use one of mjpg, yuyv"):
        make(format="nv12")
    with pytest.raises(CameraError, match=r"delivers H264, NM12, which Eyas cannot read"):
        make(formats=("H264", "NM12"))


def test_a_device_that_cannot_stream_is_explained(make: Make) -> None:
    with pytest.raises(CameraError, match="in use by another program"):
        make(errors={0xC0D05605: errno.EBUSY})
    with pytest.raises(CameraError, match=r"its driver reports an error \(Invalid argument\)"):
        make(errors={0x40045612: errno.EINVAL})
    with pytest.raises(CameraError, match="no bandwidth left; use format=mjpg"):
        make(errors={0x40045612: errno.ENOSPC})
    reader, driver = make(timeout_s=0.1)
    driver.errors = {0xC0585611: errno.ENODEV}
    with pytest.raises(CameraError, match="does not exist"):
        reader.grab()


def test_an_input_without_a_signal_is_not_opened(make: Make) -> None:
    _, driver = make(timings=True)
    assert 0xC0845657 in driver.calls  # the timings of the signal
    with pytest.raises(CameraError, match="no signal at its input HDMI 0"):
        make(status=2)
    with pytest.raises(CameraError, match="no power at its input HDMI 0"):
        make(status=1)
    with pytest.raises(CameraError, match="an unstable signal at its input HDMI 0"):
        make(errors={0x80845663: errno.ENOLCK})


def test_the_driver_is_asked_what_the_device_is(tmp_path: Path) -> None:
    """Against `/dev/null`, which is a character device, with a stand-in for ioctl."""
    driver = Driver(tmp_path / "device")
    assert v4l.find_problem("/dev/null", ioctl=driver) is None
    driver.capabilities = 0x1000
    assert v4l.find_problem("/dev/null", ioctl=driver) is None
    driver.capabilities = 0x00A00000
    error = v4l.find_problem("/dev/null", ioctl=driver)
    assert type(error) is CameraError and "without capture" in str(error)


def test_a_format_is_one_that_can_be_read() -> None:
    assert v4l.V4L2Camera.parse("0?format=y16-be").format == "y16-be"
    with pytest.raises(CameraSpecError, match=r"format='h264' is not valid; allowed are .* mjpg, jpeg, yuyv, "):
        v4l.V4L2Camera.parse("0?format=h264")


COLOURS = {"white": (191, 191, 191), "red": (0, 0, 191), "green": (0, 191, 0), "blue": (191, 0, 0)}


@pytest.mark.parametrize("encoding", ["601", "709", "2020", "240"])
@pytest.mark.parametrize("full_range", [False, True])
@pytest.mark.parametrize("code", ["YUYV", "NV21", "YV12"])
def test_encodings_of_ycbcr(code: str, encoding: str, full_range: bool) -> None:
    """Against the definition: luma is a weighted sum, chroma the distance of blue and red from it."""
    red, blue = {"601": (0.299, 0.114), "709": (0.2126, 0.0722), "2020": (0.2627, 0.0593), "240": (0.212, 0.087)}[
        encoding
    ]
    for bgr in COLOURS.values():
        b, g, r = (value / 255 for value in bgr)
        y = red * r + (1 - red - blue) * g + blue * b
        scale, base, chroma = (255, 0, 255) if full_range else (219, 16, 224)
        luma, cb, cr = (
            round(value)
            for value in (
                base + scale * y,
                128 + chroma * (b - y) / (1 - blue) / 2,
                128 + chroma * (r - y) / (1 - red) / 2,
            )
        )
        data = {
            "YUYV": bytes([luma, cb, luma, cr]) * 8,
            "NV21": bytes([luma] * 16 + [cr, cb] * 4),
            "YV12": bytes([luma] * 16 + [cr] * 4 + [cb] * 4),
        }[code]
        image = to_bgr(np.frombuffer(data, np.uint8), PixelFormat(code, 4, 4, 0, encoding, full_range))
        assert image.shape == (4, 4, 3) and (np.abs(image.astype(int) - bgr) <= 3).all(), (bgr, image[0, 0])


def test_rgb_of_limited_range_is_stretched() -> None:
    data = np.array([16, 126, 235] * 4, np.uint8)
    assert to_bgr(data, PixelFormat("RGB3", 2, 2, 0, "601", full_range=False)).tolist()[0][0] == [255, 128, 0]
    assert to_bgr(data, PixelFormat("RGB3", 2, 2, 0)).tolist()[0][0] == [235, 126, 16]


@pytest.mark.parametrize("code", LAYOUTS)
def test_every_format_reads_rows_with_padding_as_without(code: str) -> None:
    layout = LAYOUTS[code]
    used = 16 * layout.pixel_bytes
    rows = 8 if layout.kind == "packed" else 12
    plain = np.random.default_rng(1).integers(0, 256, (rows, used), np.uint8)
    padded = np.zeros((rows, used + 32), np.uint8)
    padded[:, :used] = plain
    if layout.kind == "planar":  # rows of chroma have half the length
        padded[8:] = 0
        padded[8:].reshape(8, -1)[:, : used // 2] = plain[8:].reshape(8, used // 2)
    expected = to_bgr(plain.ravel(), PixelFormat(code, 16, 8, 0))
    assert expected.shape == (8, 16, 3) and expected.dtype == np.uint8
    assert np.array_equal(to_bgr(padded.ravel(), PixelFormat(code, 16, 8, used + 32)), expected)
