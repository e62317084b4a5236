"""The doctor that root runs judges with the service's user: what is closed to that is red, and its fix mends it."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import pytest

from eyas_host.fleet.broker.enroll import enroll
from eyas_host.fleet.broker.kit import prepare
from tests.support import tiny
from tests.support.brokers import free_port
from tests.support.fleet_parts import Processes, listens, needs_mosquitto, wait_until

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")

_PACKAGES = [path for path in sys.path if path and not path.startswith(sys.base_prefix)]
_ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join(_PACKAGES)}
_SCRIPT = """
import sys
from pathlib import Path
from eyas_device import config
config.SERVICE_USER, config.CONFIG = sys.argv[1], Path(sys.argv[2]) / "device.toml"
from eyas_device import doctor
from eyas_device.cli import main
checks = ("user", "golden", "camera", "broker", "disk")
doctor.examine.__defaults__ = (tuple(check for check in doctor.CHECKS if check.__name__ in checks),)
sys.exit(main(sys.argv[3:]))
"""


@pytest.fixture(scope="module")
def interpreter() -> str:
    """A Python of this version that every user may start, with the packages of this one."""
    for path in (sys.executable, f"/usr/bin/python3.{sys.version_info.minor}"):
        command = [path, "-c", "import cv2, msgspec, paho"]
        with contextlib.suppress(OSError):
            if subprocess.run(command, user="nobody", env=_ENVIRONMENT, check=False).returncode == 0:
                return path
    pytest.skip("no Python that the user nobody may start")


class Board(NamedTuple):
    """Folders of a device, made by root."""

    etc: Path
    state: Path
    pictures: Path
    bundle: Path
    interpreter: str

    @property
    def key(self) -> Path:
        """The private key."""
        return self.etc / "credentials/client.key"


@pytest.fixture
def board(open_folder: Path, pristine_bundle: Path, interpreter: str) -> Iterator[Board]:
    """A device with a broker, a bundle and a camera, all as it should be for the user `nobody`."""
    processes, root = Processes(open_folder), open_folder / "board"
    made = Board(root / "etc", root / "state", root / "pictures", root / "bundle", interpreter)
    made.etc.mkdir(parents=True)
    port = free_port()
    kit = prepare(open_folder / "fleet", port=port)
    process = processes.start(needs_mosquitto(), "-c", str(kit.config))
    wait_until(lambda: listens(port) or process.poll() is not None, 15, "a listening broker")
    given = enroll(open_folder / "fleet", "cam-7").credentials
    (made.etc / "credentials").mkdir()
    for path in (given.ca, given.cert, given.key):
        shutil.copy(path, made.etc / "credentials")
    shutil.copytree(pristine_bundle, made.bundle)
    made.pictures.mkdir()
    for number in range(3):
        cv2.imwrite(str(made.pictures / f"{number}.png"), tiny.draw_shape(tiny.LABELS[0], number))
    made.state.mkdir()
    (made.etc / "device.toml").write_text(
        f"""
[device]
name = "cam-7"
state = "{made.state}"
[camera]
source = "folder:{made.pictures}"
[telemetry]
broker = "127.0.0.1:{port}"
ca = "{made.etc}/credentials/ca.crt"
certificate = "{made.etc}/credentials/client.crt"
key = "{made.key}"
"""
    )
    for path in (made.etc / "device.toml", made.key):
        shutil.chown(path, "root", "nogroup")
        path.chmod(0o640)
    shutil.chown(made.state, "nobody", "nogroup")
    yield made
    processes.close()
    shutil.rmtree(root)
    shutil.rmtree(open_folder / "fleet")


def doctor(board: Board, *options: object, user: str = "nobody") -> dict[str, dict[str, Any]]:
    """The findings by check."""
    words = ["doctor", "--json", "--config", board.etc / "device.toml", *options]
    command = list(map(str, [board.interpreter, "-c", _SCRIPT, user, board.etc, *words]))
    done = subprocess.run(command, env=_ENVIRONMENT, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode in (0, 1), done.stderr
    return {one["check"]: one for one in json.loads(done.stdout)["findings"]}


def mended(board: Board, check: str) -> dict[str, Any]:
    """The finding after its own fix was run, as printed."""
    fix = doctor(board)[check]["fix"]
    subprocess.run(fix, shell=True, check=True)
    return doctor(board)[check]


def test_a_key_that_only_root_reads(board: Board) -> None:
    assert doctor(board)["broker"]["status"] == "green"
    shutil.chown(board.key, "root", "root")
    board.key.chmod(0o600)
    found = doctor(board)
    assert found["user"]["finding"] == "judged as nobody, as the service runs"
    assert found["broker"]["status"] == "red", "root's own doctor would say green"
    assert found["broker"]["finding"] == f"{board.key}: the user nobody may not read it, it belongs to root"
    assert found["broker"]["fix"] == f"chgrp nogroup {board.key} && chmod g+r {board.key}"
    assert mended(board, "broker")["status"] == "green"
    board.key.parent.chmod(0o700)
    assert "may not enter its folder" in doctor(board)["broker"]["finding"]
    assert mended(board, "broker")["status"] == "green"


def test_a_configuration_that_only_root_reads(board: Board) -> None:
    path = board.etc / "device.toml"
    shutil.chown(path, "root", "root")
    path.chmod(0o600)
    found = doctor(board)["user"]
    assert found["status"] == "red" and f"{path}: the service's user nobody may not read it" in found["finding"]
    assert mended(board, "user")["status"] == "green"


def test_a_state_folder_of_root(board: Board) -> None:
    assert doctor(board)["disk"]["status"] != "red"
    shutil.chown(board.state, "root", "root")
    found = doctor(board)["disk"]
    assert found["status"] == "red" and "closed to nobody" in found["finding"]
    assert mended(board, "disk")["status"] != "red"


def test_a_camera_that_only_root_may_open(board: Board) -> None:
    assert doctor(board)["camera"]["status"] == "green"
    board.pictures.chmod(0o700)
    assert doctor(board)["camera"]["status"] == "red"


def test_a_password_that_only_root_reads(board: Board) -> None:
    (path := board.etc / "password").write_text("secret\n")
    path.chmod(0o600)
    given = doctor(board, "--password-file", path, "--user", "cam-7")["broker"]
    assert given["status"] == "red" and f"chgrp nogroup {path}" in given["fix"]


def test_a_bundle_that_only_root_reads_is_judged_by_root(board: Board) -> None:
    board.bundle.chmod(0o700)
    found = doctor(board, "--bundle", board.bundle)
    assert found["golden"]["status"] == "green"
    assert found["user"]["status"] == "yellow" and f"{board.bundle} is closed to nobody" in found["user"]["finding"]


def test_without_the_services_user_the_doctor_says_as_whom_it_judges(board: Board) -> None:
    found = doctor(board, user="nobody-of-this-name")
    assert found["user"]["status"] == "grey" and "judged as root; there is no user" in found["user"]["finding"]
