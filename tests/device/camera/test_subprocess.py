"""Cameras whose library may hang or crash live in a process that can be killed: that process, and what runs in it."""

from __future__ import annotations

import grp
import json
import os
import pwd
import signal
import stat
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

from eyas_device.agent.loop import FramePrediction, Listener, Loop, Pace
from eyas_device.camera import Camera, Frame, confine
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


@pytest.mark.parametrize("captured", ["-1e308", "1e308", "0", "1e12", "-1"])
@pytest.mark.parametrize("kind", ['"_Raw","width":8,"height":8', '"_Encoded","length":9'])
def test_an_implausible_time_is_named(kind: str, captured: str) -> None:
    """It would be the age of a prediction, and overflow its histogram."""
    text = f'{{"type":{kind},"captured":{captured}}}'
    with (
        start("say", at=0, text=text) as camera,
        pytest.raises(CameraError, match=r"a frame [+-]\S+ s from now"),
    ):
        camera.capture()
    assert gone(camera.pid)


def test_the_time_of_a_frame_is_between_its_request_and_now() -> None:
    with start(fps=20.0) as camera:
        for _ in range(3):
            before = time.monotonic()
            frame = taken(camera)
            assert before - 0.5 < frame.captured <= time.monotonic()
            assert abs((time.time() - frame.time) - (time.monotonic() - frame.captured)) < 0.1


def _reported(path: Path | None = None) -> dict[str, Any]:
    with pytest.raises(CameraError) as caught:
        start("tell", text=str(path or "/nowhere"))
    return cast(dict[str, Any], json.loads(str(caught.value).partition("test:tell: ")[2]))


def test_the_child_inherits_no_secrets_and_is_ended_first(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "S3cret")
    monkeypatch.setenv("NOTIFY_SOCKET", "/run/systemd/notify")
    with (tmp_path / "key").open("w") as held:
        os.set_inheritable(held.fileno(), True)
        reported = _reported()
    assert reported["secret"] == [] and reported["path"]
    assert reported["fds"] <= 8, (
        "standard streams, socket, shared memory, decoders' messages, and the one that lists them"
    )
    assert (reported["oom"], reported["nnp"]) == ("500", "1")
    assert Path("/proc/self/oom_score_adj").read_text().strip() != "500"


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, whose child becomes somebody else")
@pytest.mark.parametrize("user", ["", "daemon", "root", "nobody-of-this-name"])
def test_the_child_of_root_is_another_user(
    user: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        key = Path(folder) / "device.key"
        key.write_text("private")
        key.chmod(0o600)
        Path(folder).chmod(0o755)
        if user:
            monkeypatch.setenv("EYAS_CAMERA_USER", user)
        reported = _reported(key)
        key.chmod(0o644)
        assert _reported(key)["read"] == "private", "what others may read, it may"
    if user in ("root", "nobody-of-this-name"):
        assert reported["uid"] == ["0"] * 4 and reported["read"] == "private"
        assert ("there is no user 'nobody-of-this-name'" in caplog.text) == (user != "root")
        return
    account = pwd.getpwnam(user or "nobody")
    assert reported["uid"] == [str(account.pw_uid)] * 4 and int(reported["caps"], 16) == 0
    assert reported["read"] == "PermissionError"
    assert 0 not in reported["groups"] and grp.getgrnam("video").gr_gid in reported["groups"]


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, whose child becomes somebody else")
def test_a_device_stays_accessible_to_the_child(monkeypatch: pytest.MonkeyPatch) -> None:
    """By its group, whatever that is called; a node for root alone keeps the child root, and says so."""
    made: list[tuple[str, list[int]]] = []
    monkeypatch.setattr(os, "setgroups", lambda groups: made.append(("groups", groups)))
    monkeypatch.setattr(os, "setresgid", lambda *ids: None)
    monkeypatch.setattr(os, "setresuid", lambda *ids: None)
    monkeypatch.setattr(confine, "raise_oom_score", lambda: None)
    monkeypatch.setattr(confine, "_NO_NEW_PRIVS", -1)
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        node = Path(folder) / "video0"
        os.mknod(node, 0o660 | stat.S_IFCHR, os.makedev(1, 3))
        node.chmod(0o660)
        os.chown(node, 0, 4711)
        assert confine.confine(str(node)) == "" and 4711 in made[0][1]
        os.chown(node, 0, 0)
        assert confine.confine(str(node)) == f"only root may open {node}; give it the group video"
        node.chmod(0o666)
        assert confine.confine(str(node)) == "" and len(made) == 2


def test_a_process_that_cannot_be_killed_is_the_only_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """As one that hangs in a driver: the source is not opened again before it has ended; another source is."""
    camera = start("hang", at=0, timeout_s=0.3)
    process = camera._child._process
    kill = process.kill
    monkeypatch.setattr(process, "kill", lambda: None)
    with pytest.raises(CameraError, match="no frame came"):
        camera.capture()
    for _ in range(3):
        with pytest.raises(CameraError, match=f"its earlier process {camera.pid} hangs in a driver"):
            start("hang", at=0)
    start("raw").close()
    kill()
    process.wait(PLENTY_S)
    start("hang", at=0).close()


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
