"""Cameras on a real kernel: Linux's test driver `vivid` shows known colours, and fails as cameras do."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from eyas_device.camera.v4l2_pixels import LAYOUTS

from .machine import Board

SCENES = Path(__file__).with_name("camera_scenes.py")
_EYAS, _BUNDLE = "/root/eyas", "/root/camera-bundle"
"""On the board: the package `eyas_device`, and a bundle."""
_SCENE_S = 900
Scene = Callable[..., dict[str, Any]]
BARS = ["white", "yellow", "cyan", "green", "magenta", "red", "blue", "black"]
"""Bars of the driver's test image, each at 75 % (BT.801)."""
COLOURS = [(b, g, r) for g in (191, 0) for r in (191, 0) for b in (191, 0)]
GREYS = [191, 177, 150, 136, 55, 41, 14, 0]
"""Their luma with the weights of BT.709, in which the driver draws grey."""
_TOLERANCE = 8
"""RGB565 has steps of 8."""


@pytest.fixture(scope="module")
def scene(
    equipped: Board, wheels: Path, pristine_bundle: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Scene]:
    """Run a scene on a board without the service, which would hold the camera."""
    folder = tmp_path_factory.mktemp("camera")
    board = equipped.copy(folder / "board").start().wait_ssh()

    def play(name: str, *words: str) -> dict[str, Any]:
        command = f"PYTHONPATH={_EYAS} python3 /root/camera_scenes.py {name} {' '.join(words)}"
        found: dict[str, Any] = json.loads(board.run_apart(command, _SCENE_S))
        return found

    try:
        [wheel] = wheels.glob("eyas_device-*.whl")
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder / "eyas")
        board.put(folder / "eyas", _EYAS)
        board.put(SCENES, "/root/camera_scenes.py")
        board.put(pristine_bundle, _BUNDLE)
        yield play
    finally:
        board.close()


def shows_bars(found: dict[str, Any], code: str) -> bool:
    """Whether the colours of all bars are right."""
    is_grey = code.startswith(("grey", "y10", "y12", "y16"))
    expected = np.array([[grey] * 3 for grey in GREYS] if is_grey else COLOURS)
    return "bars" in found and bool((np.abs(np.array(found["bars"]) - expected) <= _TOLERANCE).all())


def test_colours_are_right_in_every_format(scene: Scene, report: Callable[[str], None]) -> None:
    found = scene("formats")
    requests = found.pop("requests")
    known = {code.lower() for code in LAYOUTS}
    assert set(found["webcam"]) == known, "the driver has all that can be read"
    wrong = {
        (kind, code): read
        for kind, codes in found.items()
        for code, read in codes.items()
        if not shows_bars(read, code)
    }
    assert not wrong
    assert {code: read["encoding"] for code, read in found["hdmi"].items()} == dict.fromkeys(found["hdmi"], "709")
    assert all(read["size"] == [1280, 720] for read in found["hdmi"].values())  # its signal's
    report(f"camera: colours of {sum(map(len, found.values()))} formats and encodings are right")

    assert requests["plain"]["size"] == [640, 480] and requests["plain"]["note"] == ""
    assert requests["size"]["size"] == [1280, 720]
    assert requests["size"]["note"] == "1280x720, the nearest supported size"
    assert requests["rate"]["note"] == "12.5 frames/s, the nearest supported rate"
    assert requests["both"]["note"] == "" and requests["both"]["size"] == [320, 180]


def test_a_video_input_follows_its_signal(scene: Scene) -> None:
    found = scene("inputs")
    for kind, name in (("hdmi", "HDMI 0"), ("tv", "TV 0")):
        assert shows_bars(found[kind]["signal"], "yuyv") and shows_bars(found[kind]["again"], "yuyv")
        assert found[kind]["while it streams"] == "the signal at its input changed"
        expected = ["no signal", "an unstable signal", "a signal that it does not support"]
        errors = [read["error"] for read in found[kind]["modes"]]
        assert errors == [f"{text} at its input {name}" for text in expected[: len(errors)]]
    assert len(found["hdmi"]["modes"]) == 3


def test_nodes_that_are_no_camera_closed_busy_or_absent_are_told_apart(scene: Scene) -> None:
    found = scene("nodes")
    assert "without capture" in found["output"]["error"] and "no /dev/video* is a camera" in found["output"]["error"]
    assert found["metadata"]["error"].endswith("; cameras are /dev/video0 (vivid)")
    assert found["busy"]["error"].startswith("/dev/video0 is in use by another program")
    assert all(np.allclose(bar, (0, 255, 0), atol=2) for bar in found["second"]["bars"])  # the other camera's
    assert "permission denied" in found["closed"]["error"] and "usermod -aG video" in found["closed"]["error"]
    assert "is the camera plugged in?" in found["absent"]["error"]
    assert "v4l2:/dev/v4l/by-path/platform-vivid.0-video-index0" in found["other number"]["error"]


def test_a_camera_that_fails_is_named_in_the_status_and_delivers_again(
    scene: Scene, report: Callable[[str], None]
) -> None:
    found = scene("faults", _BUNDLE)
    conditions = {name: state.partition(":")[0] for name, state in found["states"].items()}
    assert conditions == {
        **dict.fromkeys(("start of video0", "start of video1", "start of platform-vivid.0-video-index0"), "delivering"),
        "dark": "black",
        "frozen": "frozen",
        **dict.fromkeys(("silent", "stream error", "disconnected", "unplugged", "no signal"), "lost"),
        "another size": "resized",
    }
    before, after = found["nodes"]
    assert before != after  # and its name followed it
    assert found["controls"] == {"brightness": 120, "gain": 90, "gain_automatic": 0}
    assert "hue = 500: -128 to 128 is allowed" in found["log"]
    assert "exposure: no such control; this camera has gain, brightness" in found["log"]
    assert "Traceback" not in found["log"]
    longest = max(found["back_s"], key=found["back_s"].__getitem__)
    report(f"camera: delivers again within {found['back_s'][longest]:.1f} s ({longest}), with an emulated processor")


def test_doctor_and_snapshot_read_it(scene: Scene) -> None:
    found = scene("verbs", _BUNDLE)
    assert "frames of 320 x 180" in found["doctor"]["out"], found["doctor"]
    assert found["snapshot"]["code"] == 0 and "-frame.png" in found["snapshot"]["out"]
