"""The folder camera: every image of a folder once, the rest said once."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import pytest

from eyas_device.camera import open_camera
from eyas_device.errors import CameraError


def write(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(os.fsencode(name))
    return root


def sources(root: Path) -> list[str]:
    with open_camera(f"folder:{root}") as camera:
        return [frame.source for frame in iter(camera.capture, None)]


def test_what_is_left_out_is_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    write(tmp_path, "ok/1.png", "ok/2.JPEG", "ok/3.heic", "ok/.4.png", "@eaDir/5.jpg", "ok/6.jpg.part")
    (tmp_path / "ok" / "gone.png").symlink_to(tmp_path / "nothing")
    assert sources(tmp_path) == [str(tmp_path / "ok" / "1.png"), str(tmp_path / "ok" / "2.JPEG")]
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 1
    assert said[0].startswith(f"camera folder:{tmp_path}: 5 files left out: ")
    for reason in ("1 .heic", "1 hidden", "1 left behind by a system or a tool", "1 .part", "1 broken link"):
        assert reason in said[0]


def test_a_name_that_is_no_text_is_escaped(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    write(tmp_path, "1.png", "\udcfc.png")
    assert len(sources(tmp_path)) == 1
    assert caplog.records[0].getMessage().endswith(rf"1 with a name that is not UTF-8 (b'{tmp_path}/\xfc.png')")


def test_nothing_is_said_where_nothing_is_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    sources(write(tmp_path, "1.png"))
    assert not caplog.records


def test_linked_images_come_once_and_with_the_name_that_they_have_here(tmp_path: Path) -> None:
    store = write(tmp_path / "store", "3f", "more/2.png")
    root = write(tmp_path / "set", "b/1.png")
    (root / "a").mkdir()
    (root / "a" / "linked.jpg").symlink_to(store / "3f")
    (root / "a" / "more").symlink_to(store / "more")
    (root / "a" / "other").symlink_to(root / "b")  # a folder keeps its own place
    (root / "a" / "around").symlink_to(root)
    found = [str(Path(source).relative_to(root)) for source in sources(root)]
    assert found == ["a/linked.jpg", "a/more/2.png", "b/1.png"]


@pytest.mark.parametrize(
    ("name", "said"),
    [("file.png", "is a file; give the folder"), ("nothing", "no such folder"), ("x" * 300, "too long")],
)
def test_what_is_no_folder_is_said_in_one_line(name: str, said: str, tmp_path: Path) -> None:
    write(tmp_path, "file.png")
    with pytest.raises(CameraError, match=said) as caught:
        open_camera(f"folder:{tmp_path / name}")
    assert "\n" not in str(caught.value)


def test_a_folder_without_images_says_what_is_in_it(tmp_path: Path) -> None:
    write(tmp_path, "a.heic", "b.heic", "c")
    with pytest.raises(CameraError, match=r"no image files; .*; 3 files left out: 2 \.heic, 1 without a usual suffix"):
        open_camera(f"folder:{tmp_path}")
