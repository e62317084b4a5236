"""The wheel of the device's half is built once for one state of its sources."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from eyas_device.bundle import sha256
from eyas_host.fleet.connect import wheels
from tests.support.paths import ROOT


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A source tree of its own, and an empty cache."""
    ignored = shutil.ignore_patterns("__pycache__", "*.egg-info", "dist")
    shutil.copytree(ROOT / "device", tmp_path / "tree/device", ignore=ignored)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(wheels, "project_root", lambda: tmp_path / "tree")
    return tmp_path / "tree/device"


def test_a_built_wheel_is_kept_until_its_sources_change(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = [tmp_path / name for name in ("one", "two", "three")]
    for folder in folders:
        folder.mkdir()
    first = wheels.build_wheel(folders[0])
    build = wheels._build
    monkeypatch.setattr(wheels, "_build", lambda folder: pytest.fail("built again"))
    second = wheels.build_wheel(folders[1])
    assert second.parent == folders[1] and sha256(first) == sha256(second)
    monkeypatch.setattr(wheels, "_build", build)
    (project / "eyas_device/more.py").write_text('"""More."""\n')
    assert sha256(wheels.build_wheel(folders[2])) != sha256(first)
    assert len(list((tmp_path / "cache/eyas-wheels").iterdir())) == 2


def test_a_cache_that_cannot_be_written_is_no_matter(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(source: object, target: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(wheels.shutil, "copy", full)
    monkeypatch.setattr(wheels, "_build", lambda folder: folder / "eyas_device-0-py3-none-any.whl")
    assert wheels.build_wheel(tmp_path) == tmp_path / "eyas_device-0-py3-none-any.whl"


def test_only_a_few_are_kept(tmp_path: Path) -> None:
    wheel = tmp_path / "eyas_device-0-py3-none-any.whl"
    wheel.write_bytes(b"wheel")
    for number in range(9):
        wheels._keep(wheel, tmp_path / "kept" / str(number))
    assert len(list((tmp_path / "kept").iterdir())) == wheels._KEPT_WHEELS
