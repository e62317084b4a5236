"""A second flash asks once and sends nothing; whatever is not as it should be is found, and put right."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from eyas_device.bundle import read_manifest
from eyas_device.updates.environment import BUILD, UNPACK
from eyas_device.updates.slots import Slots
from eyas_host.fleet.deploy.unchanged import _stays_up
from tests.support.fleet_parts import wait_until
from tests.support.ssh_board import Board, device_toml


def steps(board: Board) -> str:
    return "\n".join(board.lines)


def test_a_second_flash_asks_once(board: Board, bundle_root: Path, service: dict[str, object]) -> None:
    assert board.flash(bundle_root, **service)[0].ok
    before = board.tree()
    [second] = board.flash(bundle_root, **service)
    assert (second.status, second.sent_bytes, second.warnings) == ("unchanged", 0, ())
    assert second.detail == "tiny-shapes 1.2.3 in slot a; nothing to do"
    assert "delivers" in steps(board) and "health" not in steps(board)
    changed = {name for name in board.tree().keys() | before.keys() if board.tree().get(name) != before.get(name)}
    assert not {name for name in changed if "slots/" in name or "etc/" in name or "opt/" in name}, changed


def test_what_is_not_as_it_should_be_is_put_right(
    board: Board,
    bundle_root: Path,
    service: dict[str, object],
    tmp_path: Path,
    edit_manifest: Callable[..., None],
) -> None:
    """A damaged file, a changed configuration, another model, a service that is down."""
    board.flash(bundle_root, **service)
    artefact = Slots(board.state).folder / "a" / read_manifest(bundle_root).artefacts[1].files[0].path
    artefact.write_bytes(artefact.read_bytes()[:-1] + b"x")
    [damaged] = board.flash(bundle_root, **service)
    assert damaged.status == "flashed" and "new: model" in damaged.detail, damaged
    assert Slots(board.state).current() is not None
    (tmp_path / "device.toml").write_text(device_toml(board, "[loop]\nfps = 5\n"))
    [result] = board.flash(bundle_root, **service)
    assert result.detail.endswith("new: configuration"), result
    pid = int((tmp_path / "systemctl.log.pid").read_text())
    os.kill(pid, signal.SIGTERM)
    wait_until(lambda: not Path(f"/proc/{pid}").exists(), what="the agent's end")
    [down] = board.flash(bundle_root, **service)
    assert down.status == "unchanged" and "health" in steps(board), down
    assert "delivers" in steps(board)
    edit_manifest(version="1.2.4")
    [other] = board.flash(bundle_root, **service)
    assert other.status == "flashed" and board.version() == "1.2.4"


def test_trouble_with_the_camera_is_said_by_a_second_flash_too(
    board: Board, bundle_root: Path, service: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("eyas_host.fleet.deploy.report._WAIT_S", 1.0)
    dark = device_toml(board).replace("fake:?live=1", "mjpeg:http://127.0.0.1:9/?live=1")
    (tmp_path / "device.toml").write_text(dark)
    assert board.flash(bundle_root, **service)[0].ok
    [again] = board.flash(bundle_root, **service)
    assert again.status == "unchanged" and "does not deliver" in again.warnings[0], again


@pytest.mark.parametrize(
    ("said", "settled"),
    [
        ({"ActiveEnterTimestampMonotonic": "1000000"}, True),
        ({"ActiveEnterTimestampMonotonic": "97000000"}, False),
        ({"ActiveEnterTimestampMonotonic": ""}, False),
        ({"ActiveEnterTimestampMonotonic": "1000000", "UnitFileState": "disabled"}, False),
        ({"ActiveEnterTimestampMonotonic": "1000000", "ActiveState": "activating"}, False),
        ({}, False),
    ],
)
def test_only_a_service_that_stays_up_counts(said: dict[str, str], settled: bool) -> None:
    usual = {"ActiveState": "active", "UnitFileState": "enabled", "uptime": "100.00"}
    assert _stays_up(usual | said, 5.0) is settled


def test_an_environment_that_cannot_be_built_takes_no_space(tmp_path: Path) -> None:
    files, environment = tmp_path / "files", tmp_path / "venv-1"
    (files / "wheels").mkdir(parents=True)
    (files / "unpack.py").write_text("raise OSError(28, 'No space left on device')\n")
    arguments = [str(environment), sys.executable, str(files), "", "", "unpack"]
    done = subprocess.run(["sh", "-euc", BUILD, "sh", *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 1 and done.stderr.strip().endswith("OSError: [Errno 28] No space left on device")
    assert not environment.exists()


@pytest.mark.parametrize("folder", ["plain", "with a space", "long" * 40])
def test_wheels_are_unpacked_without_pip(folder: str, tmp_path: Path) -> None:
    """Scripts run from any folder, data files arrive, a damaged wheel and a path to the outside are refused."""
    environment = tmp_path / folder
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", environment], check=True)
    wheel = tmp_path / "thing-1-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("thing/__init__.py", "def main():\n    print('it runs')\n    return 7\n")
        archive.writestr("thing-1.dist-info/METADATA", "Metadata-Version: 2.1\nName: thing\nVersion: 1\n")
        archive.writestr("thing-1.dist-info/entry_points.txt", "[console_scripts]\nthing = thing:main [extra]\n")
        archive.writestr("thing-1.data/purelib/beside.py", "x = 1\n")
        archive.writestr("thing-1.data/data/share/thing.txt", "data\n")
        archive.writestr("../../outside.txt", "no\n")
    python = environment / "bin/python"
    subprocess.run([python, UNPACK, wheel], check=True)
    done = subprocess.run([environment / "bin/thing"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (7, "it runs\n"), done.stderr
    code = "import beside, importlib.metadata as m; print(m.version('thing'))"
    assert subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout == "1\n"
    assert (environment / "share/thing.txt").read_text() == "data\n"
    assert not list(tmp_path.rglob("*.data")) and not (tmp_path / "outside.txt").exists()
    wheel.write_bytes(wheel.read_bytes()[:-100])
    done = subprocess.run([python, UNPACK, wheel], capture_output=True, text=True, check=False)
    assert done.returncode and "BadZipFile" in done.stderr
