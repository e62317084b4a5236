"""What has to be fixed on a device before anything is brought to it."""

from __future__ import annotations

import shutil
from pathlib import Path

import msgspec
import pytest

from eyas_host.fleet.connect.preflight import (
    DeviceFacts,
    Layout,
    closed_python,
    inspect_device,
    problems,
    sudo_prefix,
    warnings,
)
from eyas_host.fleet.connect.ssh import Remote, Target
from tests.support.ssh_board import Board
from tests.support.system_parts import SYSTEM_PYTHON

READY = DeviceFacts(
    system="Linux",
    machine="aarch64",
    bits="64",
    glibc="glibc 2.36",
    uid="0",
    user="root",
    rsync="/usr/bin/rsync",
    python="/usr/bin/python3",
    python_version="3.11.2",
    venv="yes",
    opt_free_kb="10000000",
    state_free_kb="10000000",
)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"machine": "armv7l", "bits": "32"}, "a 64-bit system is needed"),
        ({"bits": "32"}, "32-bit programs"),
        ({"system": "Darwin"}, "Linux is needed"),
        ({"python": ""}, "no Python 3.10"),
        ({"venv": "no"}, "apt-get install python3-venv"),
        ({"rsync": ""}, "apt-get install rsync"),
        ({"glibc": "glibc 2.27"}, "2.28 or newer"),
        ({"glibc": ""}, "glibc unknown"),
        ({"opt_free_kb": "100000"}, "102 MB free, 700 MB needed"),
        ({"state_free_kb": "junk"}, "unknown"),
        ({"uid": "1000", "user": "pi"}, "password-less sudo"),
        ({"venv_link": "."}, "a folder, not a link"),
    ],
)
def test_preflight(change: dict[str, str], message: str) -> None:
    def found(facts: DeviceFacts) -> list[str]:
        return problems(facts, Layout(), bundle_bytes=1_000_000, environment=True, service=True)

    assert found(READY) == []
    [problem] = found(msgspec.structs.replace(READY, **change))
    assert message in problem


def test_profiles_and_sudo() -> None:
    change = msgspec.structs.replace
    assert READY.profile == "device-numpy2"
    assert change(READY, picamera2="yes", numpy="1.24.2").profile == "device-numpy1"
    assert change(READY, picamera2="yes", numpy="2.2.4").profile == "device-numpy2"
    assert change(READY, python_version="3.10.12").profile == "device-jetpack6"
    pi = change(READY, uid="1000", sudo="yes", opt_writable="yes", state_writable="yes")
    assert sudo_prefix(READY, Layout(), service=True) == ()
    assert sudo_prefix(pi, Layout(), service=True) == ("sudo", "-n")
    assert sudo_prefix(pi, Layout("/home/pi/eyas"), service=False) == ()
    assert warnings(READY) == []
    assert warnings(change(READY, skew_s=-1.7e9)) == ["its clock is 1700000000 s behind: set up NTP"]


def test_a_python_that_the_service_cannot_run_is_not_chosen(board: Board, tmp_path: Path) -> None:
    """As that of pyenv, which its owner's login puts first."""
    own = Path(shutil.copy(Path(SYSTEM_PYTHON).resolve(), tmp_path / "python3"))
    tmp_path.chmod(0o700)
    board.tool("python3", f'#!/bin/sh\nexec {own} "$@"\n')
    with Remote(Target.parse(board.name), board.access) as remote:
        chosen = inspect_device(remote, Layout())
        given = inspect_device(remote, Layout(), str(own))
    assert (chosen.python, chosen.python_closed) == (SYSTEM_PYTHON, "")
    assert given.python == str(own) and given.python_closed
    assert closed_python(chosen, "eyas") == ""
    assert closed_python(given, given.user) == ""
    assert f"{own}: the service cannot look into {given.python_closed}" in closed_python(given, "eyas")
