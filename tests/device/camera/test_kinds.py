"""The cameras that live in a process of their own: RTSP, GStreamer and Picamera2."""

from __future__ import annotations

import itertools
import os
import signal
import struct
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from eyas_device.camera import gstreamer as gst
from eyas_device.camera import open_camera
from eyas_device.camera.opencv import trim_jpeg
from eyas_device.errors import CameraError, CameraRefused, CameraSpecError
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
