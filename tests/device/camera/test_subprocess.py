"""Cameras whose library may hang or crash live in a process that can be killed: that process, and what runs in it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

from eyas_device.agent.loop import FramePrediction, Listener, Loop, Pace
from eyas_device.camera import Camera, Frame
from eyas_device.camera.reconnecting import ReconnectingCamera
from eyas_device.camera.subprocess import SubprocessCamera
from eyas_device.errors import CameraError, CameraSpecError, ImageError
from eyas_device.predict import Prediction
from tests.support.camera_readers import Behaviour, pixels
from tests.support.paths import ROOT
from tests.support.servers import PLENTY_S, gone, taken
from tests.support.streams import jpeg_image


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Children find these tests' readers."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT), prepend=os.pathsep)


def start(how: str = "raw", *, timeout_s: float = 10.0, **settings: Any) -> SubprocessCamera:
    return SubprocessCamera(
        "tests.support.camera_readers:Drawn", Behaviour(how=how, **settings), shown=f"test:{how}", timeout_s=timeout_s
    )


def test_pixels_arrive_as_they_are_and_stay() -> None:
    """Frames are copies: what comes later does not change what was handed out."""
    with start() as camera:
        frames = [taken(camera) for _ in range(4)]
    numbers = []
    for frame in frames:
        assert isinstance(frame.image, np.ndarray)
        numbers.append(next(n for n in range(250) if np.array_equal(frame.image, pixels(n))))
    assert numbers == sorted(set(numbers))
    assert [frame.source for frame in frames] == [f"test:raw#{n}" for n in range(4)]
    assert all(abs(frame.time - time.time()) < 60 and frame.captured <= time.monotonic() for frame in frames)


@pytest.mark.parametrize("how", ["in place", "encoded", "grey"])
def test_kinds_of_image(how: str) -> None:
    with start(how) as camera:
        image = taken(camera).image
    if how == "encoded":
        assert isinstance(image, bytes) and image in [jpeg_image(n) for n in range(250)]
    elif how == "grey":
        assert isinstance(image, np.ndarray) and image.shape == (24, 32, 3) and np.ptp(image, axis=2).max() == 0
    else:
        assert any(np.array_equal(image, pixels(n)) for n in range(250))


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("16 bit", "uint16"),
        ("two channels", "2 channels"),
        ("nothing", r"shape \(0, 0, 3\)"),
        ("torn", "torn"),
        ("huge", "at most"),
    ],
)
def test_an_undecodable_frame_raises_and_the_next_one_follows(how: str, message: str) -> None:
    with start(how) as camera:
        with pytest.raises(ImageError, match=message):
            camera.capture()
        assert isinstance(taken(camera).image, np.ndarray)


def test_a_frame_is_recent_after_any_pause() -> None:
    with start(fps=200) as camera:
        camera.capture()
        time.sleep(1.0)
        asked = time.monotonic()
        assert taken(camera).captured >= asked - 0.5


def test_a_slow_loop_asks_a_fast_camera_for_few_frames_and_gets_recent_ones() -> None:
    """Also through the wrapper that reopens it."""
    captured = []

    class Counting(SubprocessCamera):
        def capture(self) -> Frame | None:
            captured.append(1)
            return super().capture()

    class Model:
        """Stands in for a classifier."""

        spec = None

        def predict(self, frame: Any) -> Prediction:
            return Prediction("a", 0, 1.0, False, np.array([1.0], np.float32), 1.0)

        def close(self) -> None:
            """Nothing is held."""

    ages: list[float] = []

    class Ages(Listener):
        def on_prediction(self, predicted: FramePrediction) -> None:
            ages.append(predicted.age_ms)

    def opened() -> Camera:
        settings = Behaviour(how="raw", fps=200, at=10**9)
        return Counting("tests.support.camera_readers:Drawn", settings, shown="test:raw", timeout_s=10.0)

    loop = Loop(cast(Any, Model()), ReconnectingCamera(opened), [Ages()], pace=Pace(fps=20.0))
    loop.run(frames=20)
    assert len(captured) <= 1.2 * 20, len(captured)
    assert sorted(ages)[10] < 100


def test_a_stopped_child_is_killed_in_time() -> None:
    with start(timeout_s=1.0) as camera:
        camera.capture()
        os.kill(camera.pid, signal.SIGSTOP)
        started = time.monotonic()
        with pytest.raises(CameraError, match="no frame came within 1 s; its process was ended"):
            for _ in range(3):  # a frame may have been on its way
                camera.capture()
        assert 0.9 < time.monotonic() - started < PLENTY_S
        assert gone(camera.pid)
        with pytest.raises(CameraError):
            camera.capture()


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("hang", "no frame came within 1 s"),
        ("crash", f"ended unexpectedly .signal {int(signal.SIGSEGV)}"),
        ("end", "ended or stopped delivering"),
        ("fail", "test:fail: pulled out"),
    ],
)
def test_the_end_of_a_stream_is_reported(how: str, message: str) -> None:
    with start(how, timeout_s=1.0, at=5) as camera, pytest.raises(CameraError, match=message):
        for _ in range(10):
            camera.capture()


def test_a_killed_child_is_reported() -> None:
    with start() as camera:
        os.kill(camera.pid, signal.SIGKILL)
        with pytest.raises(CameraError, match="signal 9"):
            for _ in range(3):
                camera.capture()


@pytest.mark.parametrize(
    ("how", "kind", "message"),
    [
        ("slow opening", CameraError, "did not open within"),
        ("no opening", CameraError, "test:no opening: not there"),
        ("mistake", CameraSpecError, "test:mistake: no such thing"),
    ],
)
def test_a_failure_to_open_is_reported_in_time(how: str, kind: type[CameraError], message: str) -> None:
    started = time.monotonic()
    with pytest.raises(CameraError, match=message) as caught:
        start(how, timeout_s=0.5)
    assert caught.type is kind
    assert time.monotonic() - started < PLENTY_S


def test_a_note_shows_in_the_source() -> None:
    with start("note", text="8x8, the nearest supported size") as camera:
        assert taken(camera).source == "test:note (8x8, the nearest supported size)#0"


@pytest.mark.parametrize(
    "text",
    [
        "\x00\xff nonsense",
        "{}",
        '{"type":"_Ready"}',
        '{"type":"_Raw","width":16384,"height":16384,"time":0,"captured":0}',
        '{"type":"_Raw","width":-1,"height":-1,"time":0,"captured":0}',
        '{"type":"_Raw","width":0,"height":9,"time":0,"captured":0}',
        '{"type":"_Encoded","length":1000000000000,"time":0,"captured":0}',
        '{"type":"_Encoded","length":-1,"time":0,"captured":0}',
        "[" * 60000,
    ],
)
def test_replies_of_a_compromised_child_are_rejected(text: str) -> None:
    with start("say", at=0, text=text) as camera, pytest.raises(CameraError, match="invalid reply"):
        camera.capture()


def test_the_shared_memory_cannot_be_truncated() -> None:
    with start() as camera:
        shared = next(
            f"/proc/{camera.pid}/fd/{fd.name}"
            for fd in Path(f"/proc/{camera.pid}/fd").iterdir()
            if "eyas-frame" in str(fd.readlink())
        )
        with pytest.raises(PermissionError), Path(shared).open("r+b") as file:
            file.truncate(0)


def test_closing_wakes_a_waiting_capture() -> None:
    camera = start("hang", at=0, timeout_s=300.0)
    captured: list[Frame | None] = []
    waiting = threading.Thread(target=lambda: captured.append(camera.capture()), daemon=True)
    waiting.start()
    time.sleep(0.2)
    camera.close()
    waiting.join(PLENTY_S)
    assert captured == [None] and gone(camera.pid)
    camera.close()
    assert camera.capture() is None


@pytest.mark.parametrize("stopped", [False, True])
def test_the_child_ends_with_its_parent(stopped: bool) -> None:
    """However the parent ends; whether the child hangs or is even stopped."""
    program = (
        "import sys, time; from tests.device.camera.test_subprocess import start;"
        "c = start('hang', at=0); print(c.pid, flush=True); time.sleep(600)"
    )
    parent = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    try:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        if stopped:
            os.kill(child, signal.SIGSTOP)
        assert not gone(child, within_s=0.1)
    finally:
        parent.kill()
        parent.wait(PLENTY_S)
    ended = gone(child)
    if not ended:
        os.kill(child, signal.SIGKILL)
    assert ended


def test_the_child_does_not_end_with_the_thread_that_opened_it() -> None:
    cameras: list[SubprocessCamera] = []
    thread = threading.Thread(target=lambda: cameras.append(start()))
    thread.start()
    thread.join(PLENTY_S)
    with cameras[0] as camera:
        time.sleep(0.3)
        taken(camera)


def test_nothing_is_left_after_many_reopenings() -> None:
    def held() -> tuple[int, int, int]:
        children = Path(f"/proc/self/task/{threading.get_native_id()}/children").read_text().split()
        return len(list(Path("/proc/self/fd").iterdir())), threading.active_count(), len(children)

    start().close()
    before = held()
    for turn in range(9):
        with start() as camera:
            camera.capture()
            if turn % 3:
                os.kill(camera.pid, signal.SIGKILL)
            if turn % 3 == 2:
                with pytest.raises(CameraError):
                    for _ in range(3):
                        camera.capture()
    with pytest.raises(CameraError):
        start("no opening")
    assert held() == before
