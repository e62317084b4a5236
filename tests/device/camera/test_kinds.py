"""The cameras that live in a process of their own: RTSP, V4L2, GStreamer and Picamera2."""

from __future__ import annotations

import errno
import itertools
import os
import signal
import struct
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from eyas_device.camera import gstreamer as gst
from eyas_device.camera import open_camera
from eyas_device.camera import v4l2 as v4l
from eyas_device.camera.opencv import Settings, trim_jpeg
from eyas_device.errors import CameraError, CameraRefused, CameraSpecError, ImageError
from tests.support.camera_readers import pixels
from tests.support.servers import PLENTY_S, RtspServer, taken
from tests.support.streams import jpeg_image
from tests.support.system_parts import require

# --- RTSP, against a real server


@pytest.fixture
def rtsp() -> Iterator[RtspServer]:
    server = RtspServer()
    server.start()
    yield server
    server.kill()


def test_rtsp_delivers_moving_images(rtsp: RtspServer) -> None:
    with open_camera(rtsp.url, timeout_s=15) as camera:
        assert camera.live
        frames = [taken(camera) for _ in range(5)]
    images = [frame.image for frame in frames]
    assert all(isinstance(image, np.ndarray) and image.shape == (240, 320, 3) for image in images)
    assert all(not np.array_equal(one, next_) for one, next_ in itertools.pairwise(images))
    assert frames[-1].source == f"{rtsp.url}#4"


def test_rtsp_that_hangs_or_dies_is_reported(rtsp: RtspServer) -> None:
    with open_camera(rtsp.url, timeout_s=15) as camera:
        taken(camera)
        assert rtsp.process is not None
        camera.timeout_s = 1.5  # type: ignore[attr-defined]
        os.kill(rtsp.process.pid, signal.SIGSTOP)
        started = time.monotonic()
        with pytest.raises(CameraError, match="no frame came within"):
            for _ in range(100):
                camera.capture()
        with pytest.raises(CameraError, match=r"the host responds, but no stream arrived within 1.5 s"):
            open_camera(rtsp.url, timeout_s=1.5)
        assert time.monotonic() - started < PLENTY_S
        os.kill(rtsp.process.pid, signal.SIGCONT)
    with open_camera(rtsp.url, timeout_s=15) as camera:
        taken(camera)
        rtsp.kill()
        with pytest.raises(CameraError):
            for _ in range(100):
                camera.capture()
    with pytest.raises(CameraError, match=r"nothing listens there \(connection refused\)"):
        open_camera(rtsp.url, timeout_s=5)


def test_rtsp_reports_a_wrong_path_without_the_password(rtsp: RtspServer) -> None:
    with pytest.raises(CameraError, match="answers 404; is the path right") as caught:
        open_camera(f"rtsp://user:secret@127.0.0.1:{rtsp.port}/nothing", timeout_s=3)
    assert "secret" not in str(caught.value) and "***" in str(caught.value)


@pytest.fixture(scope="module")
def locked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RtspServer]:
    """RTSP over TLS, for user `guard` with password `secret`."""
    require("openssl")
    folder = tmp_path_factory.mktemp("tls")
    command = "req -x509 -newkey rsa:2048 -nodes -keyout key.pem -out cert.pem -days 2 -subj /CN=127.0.0.1"
    subprocess.run(["openssl", *command.split()], cwd=folder, check=True, capture_output=True)
    both = folder / "both.pem"
    both.write_bytes((folder / "key.pem").read_bytes() + (folder / "cert.pem").read_bytes())
    server = RtspServer(certificate=both)
    server.start()
    yield server
    server.kill()


def test_rtsp_over_tls_and_with_a_login(locked: RtspServer) -> None:
    with open_camera(f"rtsps://guard:secret@127.0.0.1:{locked.port}/ball", timeout_s=15) as camera:
        assert taken(camera).pixels().shape == (240, 320, 3)


@pytest.mark.parametrize(
    ("login", "message"),
    [("", r"refused \(401\); it needs a login"), ("guard:wrong@", r"\(401\).*check user and password")],
)
def test_rtsp_that_refuses_the_login_is_not_tried_all_the_time(locked: RtspServer, login: str, message: str) -> None:
    with pytest.raises(CameraRefused, match=message) as caught:
        open_camera(f"rtsps://{login}127.0.0.1:{locked.port}/ball", timeout_s=10)
    assert "wrong" not in str(caught.value)


# --- V4L2. No such device can be had here: real error paths, and a stand-in for `cv2.VideoCapture` for the frames.


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


def _ioctl(capabilities: int, device_caps: int = 0, *, busy: bool = False) -> Callable[[int, int, bytearray], object]:
    """A driver's replies to ioctl."""

    def ioctl(device: int, request: int, data: bytearray) -> int:
        if request == 0x80685600:
            assert len(data) == 104
            struct.pack_into("=II", data, 84, capabilities, device_caps)
        else:
            assert request == 0xC0145608 and len(data) == 20
            if busy:
                raise OSError(errno.EBUSY, "busy")
        return 0

    return ioctl


def test_v4l2_queries_the_driver() -> None:
    """Against `/dev/null`, which is a character device, with a stand-in for ioctl."""
    assert v4l.find_problem("/dev/null", buffers=True, ioctl=_ioctl(1)) is None
    assert v4l.find_problem("/dev/null", ioctl=_ioctl(0x80000001, 0x1000)) is None
    error = v4l.find_problem("/dev/null", buffers=True, ioctl=_ioctl(1, busy=True))
    assert type(error) is CameraError and "in use by another program" in str(error)
    error = v4l.find_problem("/dev/null", ioctl=_ioctl(0x80000001, 0x00A00000))
    assert type(error) is CameraError and "without capture" in str(error)


class Video:
    """Stands in for `cv2.VideoCapture` on a V4L2 device: a driver with the given formats, sizes and frames."""

    opens = True
    fourcc = ("MJPG", "YUYV")
    sizes = ((640, 480), (1280, 720))
    images: tuple[Any, ...] = ()

    def __init__(self, *_: object) -> None:
        self.values: dict[int, float] = {cv2.CAP_PROP_FOURCC: cv2.VideoWriter.fourcc(*self.fourcc[-1])}
        self.left = list(self.images)

    def isOpened(self) -> bool:  # noqa: N802
        return self.opens

    def set(self, name: int, value: float) -> bool:
        code = cv2.VideoWriter.fourcc
        if name == cv2.CAP_PROP_FOURCC and value not in [code(*known) for known in self.fourcc]:
            return False
        self.values[name] = value
        return True

    def get(self, name: int) -> float:
        if name in (cv2.CAP_PROP_FRAME_WIDTH, cv2.CAP_PROP_FRAME_HEIGHT):
            asked = self.values.get(cv2.CAP_PROP_FRAME_WIDTH, 640)
            return min(self.sizes, key=lambda s: abs(s[0] - asked))[name - cv2.CAP_PROP_FRAME_WIDTH]
        return self.values.get(name, 0)

    def grab(self) -> bool:
        return bool(self.left)

    def retrieve(self, *buffer: Any) -> tuple[bool, Any]:
        return True, self.left.pop(0)

    def release(self) -> None:
        """Nothing is held."""


@pytest.fixture
def reader(monkeypatch: pytest.MonkeyPatch) -> Callable[..., v4l.V4L2Reader]:
    """Make the V4L2 reader on a stand-in driver, in this process."""

    def make(settings: Settings | None = None, **driver: Any) -> v4l.V4L2Reader:
        monkeypatch.setattr(v4l, "find_problem", lambda *_, **__: None)
        monkeypatch.setattr(cv2, "VideoCapture", type("Driver", (Video,), driver))
        settings = settings or Settings(source="/dev/video0")
        return v4l.V4L2Reader({name: getattr(settings, name) for name in settings.__struct_fields__})

    return make


ROOM = np.zeros(1 << 20, dtype=np.uint8)


def row(data: bytes) -> Any:
    return np.frombuffer(data, dtype=np.uint8)[np.newaxis]


def test_v4l2_keeps_jpeg_undecoded_and_trimmed(reader: Callable[..., v4l.V4L2Reader]) -> None:
    made = reader(images=(row(jpeg_image(1) + b"\x00" * 99), row(jpeg_image(2) + jpeg_image(3)[400:])))
    assert made.video.get(cv2.CAP_PROP_CONVERT_RGB) == 0
    assert made.video.get(cv2.CAP_PROP_FOURCC) == cv2.VideoWriter.fourcc(*"MJPG")
    assert made.grab() and made.retrieve(ROOM) == jpeg_image(1)
    assert made.grab() and made.retrieve(ROOM) == jpeg_image(2)
    assert not made.grab()


def test_v4l2_falls_back_to_pixels_without_the_promised_jpeg(reader: Callable[..., v4l.V4L2Reader]) -> None:
    made = reader(images=(*[row(b"\x10\x80" * 64)] * 3, pixels(0), pixels(1)))
    for _ in range(3):
        with pytest.raises(ImageError, match="not a JPEG"):
            made.retrieve(ROOM)
    assert made.video.values[cv2.CAP_PROP_CONVERT_RGB] == 1
    for number in range(2):
        image = made.retrieve(ROOM)
        assert isinstance(image, np.ndarray) and np.array_equal(image, pixels(number))


def test_v4l2_recovers_after_one_torn_frame(reader: Callable[..., v4l.V4L2Reader]) -> None:
    torn = row(b"\x00" * 50)
    made = reader(images=(row(jpeg_image(0)), torn, torn, torn, torn, row(jpeg_image(5))))
    assert made.retrieve(ROOM) == jpeg_image(0)
    for _ in range(4):
        with pytest.raises(ImageError):
            made.retrieve(ROOM)
    assert made.retrieve(ROOM) == jpeg_image(5)


def test_v4l2_sets_format_size_and_rate(reader: Callable[..., v4l.V4L2Reader]) -> None:
    asked = Settings(source="/dev/video0", size=(1280, 720), fps=15, format="yuyv")
    made = reader(asked, images=(pixels(0),))
    assert made.video.get(cv2.CAP_PROP_FOURCC) == cv2.VideoWriter.fourcc(*"YUYV")
    assert cv2.CAP_PROP_CONVERT_RGB not in made.video.values and made.video.get(cv2.CAP_PROP_FPS) == 15
    assert made.note == ""
    assert reader(Settings(source="/dev/video0", size=(1300, 700))).note == "1280x720, the nearest supported size"
    with pytest.raises(CameraError, match="does not deliver mjpg"):
        reader(Settings(source="/dev/video0", format="mjpg"), fourcc=("YUYV",))
    assert cv2.CAP_PROP_CONVERT_RGB not in reader(fourcc=("YUYV",)).video.values
    with pytest.raises(CameraError, match="no format that OpenCV can read"):
        reader(opens=False)


def test_the_end_of_a_jpeg_is_not_that_of_its_thumbnail() -> None:
    plain = jpeg_image(0)
    thumbnail = b"\xff\xe1" + struct.pack(">H", 2 + len(plain)) + plain
    whole = plain[:2] + thumbnail + plain[2:]
    assert trim_jpeg(whole + b"\x00\x00") == whole
    assert trim_jpeg(whole[:-2]) == whole[:-2]
    assert trim_jpeg(b"\xff\xd8\xff") is None and trim_jpeg(b"") is None and trim_jpeg(b"\x89PNG") is None


# --- GStreamer and Picamera2 are not installed here: their errors for real, their frames through stand-ins.


def test_gstreamer_needs_an_appsink_and_an_opencv_with_it() -> None:
    for pipeline in ("", "videotestsrc", "videotestsrc ! fakesink", "a !"):
        with pytest.raises(CameraSpecError, match="ends in appsink"):
            open_camera(f"gst:{pipeline}")
    if not gst.has_gstreamer():
        with pytest.raises(CameraError, match="has no GStreamer"):
            open_camera("gst:videotestsrc ! appsink")
    assert gst.keep_newest("a ! appsink") == "a ! appsink drop=true max-buffers=1"
    assert gst.keep_newest("a ! appsink drop=false max-buffers=3") == "a ! appsink drop=false max-buffers=3"


PICAMERA2 = """
import numpy as np, time

class Request:
    def __init__(self, shape): self.shape = shape
    def make_array(self, name): return np.full(self.shape, 7, dtype=np.uint8)
    def release(self): pass

class Picamera2:
    cameras = [{"Model": "imx708"}]
    def __init__(self, number): pass
    @classmethod
    def global_camera_info(cls): return cls.cameras
    camera_controls = {
        "ExposureTime": (14, 66666, None), "AeEnable": (False, True, True), "AnalogueGain": (1.0, 16.0, 1.0),
        "LensPosition": (0.0, 15.0, 1.0), "AfMode": (0, 2, 0), "Brightness": (-1.0, 1.0, 0.0),
        "NoiseReductionMode": (0, 4, 0), "AwbEnable": (False, True, None), "FrameDurationLimits": (33333, 120000, None),
    }
    def create_video_configuration(self, **asked): return asked
    def configure(self, asked): self.asked = asked
    def camera_configuration(self): return self.asked
    def start(self):
        if self.asked["controls"].get("FrameRate") == 99: raise RuntimeError("Failed to acquire camera: busy")
    def capture_request(self):
        time.sleep(0.02)
        width, height = self.asked["main"]["size"]
        assert self.asked["main"]["format"] == "RGB888" and self.asked["queue"] is False
        return Request((height, width, 3))
    def close(self): pass
"""


def test_picamera2_delivers_through_a_stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "picamera2.py").write_text(PICAMERA2)
    monkeypatch.syspath_prepend(tmp_path)
    with open_camera("picamera2:?size=64x48&fps=10") as camera:
        image = taken(camera).image
    assert isinstance(image, np.ndarray) and image.shape == (48, 64, 3) and image.min() == image.max() == 7
    with pytest.raises(CameraError, match="does another program use it") as caught:
        open_camera("picamera2:?fps=99")
    assert caught.type is CameraError
    with pytest.raises(CameraError, match="finds 1 cameras, none with number 3"):
        open_camera("picamera2:3")


def test_picamera2_names_its_package() -> None:
    with pytest.raises(CameraError, match="sudo apt install python3-picamera2"):
        open_camera("picamera2:")
