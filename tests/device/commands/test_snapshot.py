"""`eyas-device snapshot`: private files, and frames that are torn on the way."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from eyas_device.agent.reporter import Reporter, ReporterSettings
from eyas_device.agent.snapshot import take
from eyas_device.bundle import MANIFEST
from eyas_device.camera import Frame
from eyas_device.camera.view import View
from eyas_device.cli import main
from eyas_device.errors import ImageError
from eyas_device.predict import Classifier
from eyas_device.preprocess import Pixels
from eyas_device.support.closing import Closing
from eyas_device.telemetry.messages import Event
from eyas_device.telemetry.mqtt import UplinkSettings
from tests.support import tiny


class Torn(Closing):
    """A live camera of which only every third frame is whole; after `good` of them none is."""

    live = True

    def __init__(self, good: int) -> None:
        self._good, self._number = good, -1

    def capture(self) -> Frame:
        self._number += 1
        if self._number % 3 != 2 or self._number >= 3 * self._good:
            raise ImageError(f"http://admin:S3cret@cam/#{self._number}: torn")
        image = tiny.draw_shape("disc", self._number)
        return Frame(image=image, time=time.time(), source=f"http://admin:S3cret@cam/#{self._number}")


@pytest.fixture(autouse=True)
def umask() -> Iterator[None]:
    before = os.umask(0)
    yield
    os.umask(before)


def test_torn_frames_are_skipped(
    pristine_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    arguments = ["snapshot", "--bundle", str(pristine_bundle), "--camera", "rtsp://cam/", "--out", str(out)]
    monkeypatch.setattr("eyas_device.camera.open_configured", lambda camera: Torn(good=2))
    assert main([*arguments, "--frames", "2", "--every", "0"]) == 0, capsys.readouterr()
    files = sorted(out.iterdir())
    assert [path.name.rpartition("Z")[2] for path in files] == ["-frame.png", "-input.png", ".json"] * 2
    assert {path.stat().st_mode & 0o777 for path in files} == {0o600}, "whatever the umask is"
    assert out.stat().st_mode & 0o777 == 0o700
    printed = "".join(capsys.readouterr()) + "".join(path.read_text() for path in files if path.suffix == ".json")
    assert printed.count("skipped: ") == 4 and "S3cret" not in printed

    assert main([*arguments, "--frames", "3", "--every", "0"]) == 2
    assert "100 unusable frames in a row; 2 written" in capsys.readouterr().err


def test_people_see_the_bits_that_the_model_sees(
    bundle_root: Path, edit_manifest: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An image of 12 bits in 16, turned by the camera's mount, in a snapshot and in an event."""
    preprocessing = json.loads((bundle_root / MANIFEST).read_bytes())["preprocessing"]
    edit_manifest(preprocessing=preprocessing | {"bits": 12})
    shown = tiny.draw_shape("disc", 1)
    stored = (shown.astype(np.uint16) << 4) | 0xF
    frame = Frame(cv2.imencode(".png", stored)[1].tobytes(), time.time(), "cam", view=View(rotate=180))
    upright = cv2.rotate(shown, cv2.ROTATE_180)
    with Classifier.open(bundle_root, artefact="onnx-fp32") as classifier:
        snapshot = take(frame, classifier, tmp_path / "out")
        assert np.array_equal(cv2.imread(str(tmp_path / "out" / snapshot.frame)), upright)
        seen: list[Pixels | None] = []

        def image(pixels: Pixels | None, *_: object) -> tuple[str, dict[str, Any]]:
            seen.append(pixels)
            return "", {}

        with Reporter(
            ReporterSettings(uplink=UplinkSettings(host="127.0.0.1", port=1, site="hall-2", device="cam-7")), classifier
        ) as reporter:
            monkeypatch.setattr(reporter._policy, "image", image)
            reporter._append_event(Event(label="disc"), frame)
    assert seen[0] is not None and np.array_equal(seen[0], upright)


def test_a_snapshot_is_durable(pristine_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each file is on the disk before it has its name."""
    calls: list[str] = []
    real_fsync, real_replace = os.fsync, Path.replace
    monkeypatch.setattr(os, "fsync", lambda fd: calls.append("sync") or real_fsync(fd))
    monkeypatch.setattr(Path, "replace", lambda path, to: calls.append("name") or real_replace(path, to))
    frame = Frame(image=tiny.draw_shape("disc", 1), time=1.8e9, source="x")
    with Classifier.open(pristine_bundle) as classifier:
        take(frame, classifier, tmp_path)
    assert calls == ["sync", "name", "sync"] * 3
