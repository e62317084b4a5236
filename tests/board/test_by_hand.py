"""A board that is set up by hand, from a wheel, with the commands of docs/boards.md."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.support.paths import ROOT

from .machine import Board, Computer
from .native import NativeBoard
from .service import SERVICE, WAIT_S, answering, shown

_PAGE = (ROOT / "docs/boards.md").read_text(encoding="utf-8")
_PIP = "python3 $(ls /usr/share/python-wheels/pip-*.whl)/pip"


def commands() -> list[str]:
    """The commands of the section, without their comments."""
    block = re.search(r"^## As a service$.*?^```sh\n(.*?)^```$", _PAGE, re.MULTILINE | re.DOTALL)
    assert block is not None, "docs/boards.md has no commands in its section `As a service`"
    return [line.partition("  #")[0].strip() for line in block[1].splitlines()]


@pytest.fixture
def prepared_board(
    kind: str, kind_wheels: Path, two_bundles: tuple[Path, Path], request: pytest.FixtureRequest
) -> Iterator[Computer]:
    """A board without Eyas; wheel, constraints and bundle lie in /root, and the packages that Eyas needs.

    On the emulated one, those are installed in its own Python: its processor takes minutes for that.
    """
    [wheel] = kind_wheels.glob("eyas_device-*.whl")
    with tempfile.TemporaryDirectory(prefix="eyas-board-") as name, ExitStack() as on:
        board: Computer
        if kind == "native":
            board = on.enter_context(NativeBoard(Path(name)).start())
            board.put(kind_wheels, "/root/wheels")
        else:
            equipped: Board = request.getfixturevalue("equipped")
            board = on.enter_context(equipped.copy(Path(name, "board")).start()).wait_ssh()
            board.run("mkdir /root/wheels")
        board.put(wheel, f"/root/{wheel.name}")
        board.put(ROOT / "constraints", "/root/constraints")
        board.put(two_bundles[0], "/root/bundle")
        yield board


def test_the_commands_of_the_manual(prepared_board: Computer) -> None:
    """Pip installs without a package index."""
    board, output = prepared_board, {}
    for command in commands():
        typed = command
        if "-m venv" in command:
            typed = f"{command} --without-pip"
        elif "/bin/pip" in command:
            pip = command.replace("/bin/pip", f"/bin/{_PIP}")
            typed = f"{pip} --no-index --find-links /root/wheels --disable-pip-version-check --no-compile"
        elif command.startswith("sudoedit "):
            source = board.camera.replace("&", r"\&")
            typed = command.replace("sudoedit", f"""sed -i 's/^#source = ""/source = "{source}"/'""")
        done = board.run(typed, check="doctor" not in command, timeout=WAIT_S)  # it finds such images strange
        output[command.split()[-1]] = done.stdout
    real = board.camera.startswith("v4l2")  # which one program can read at a time
    said = "delivering, held by the agent" if real else "25 frames of 64 x 48"
    assert f"{board.camera}: {said}" in output["doctor"], output["doctor"]
    assert answering(board).model.name == "tiny-shapes 1.0.0"
    assert shown(board, "ExecStart").startswith("{ path=/opt/eyas-device/bin/eyas-device ")
    assert board.run(f"systemctl is-enabled {SERVICE}").stdout == "enabled\n"
    assert board.run("stat -c '%U:%G %a' /etc/eyas/device.toml").stdout == "root:eyas 640\n"
    assert "is installed as it should be" in board.run("sudo /opt/eyas-device/bin/eyas-device service install").stdout
