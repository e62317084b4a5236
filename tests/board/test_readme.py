"""The README's fleet section, command by command, from an empty folder to a camera in the live view."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pty
import re
import select
import shlex
import shutil
import signal
import struct
import subprocess
import termios
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from eyas_host.fleet.store.database import Store
from tests.support.brokers import free_port
from tests.support.fleet_parts import listens, open_folder, wait_until  # noqa: F401 - fixture
from tests.support.paths import ROOT
from tests.support.system_parts import require

from .flashing import FLASH_S, login_options, wheel_folder
from .machine import HOST_ADDRESS, Board, Image

_STAYS = ("eyas broker", "eyas collect")
"""Programs that run until they are stopped: each has a terminal of its own."""
_ROWS, _COLUMNS = 24, 80
_SECTION = re.search(
    r"^## A fleet$.*?(?=^## )", (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL
)


def commands() -> list[str]:
    """The lines of the section's blocks of commands, without their comments."""
    assert _SECTION is not None, "the README has no section `A fleet`"
    blocks = re.findall(r"^```sh\n(.*?)^```$", _SECTION[0], re.MULTILINE | re.DOTALL)
    lines = [line.partition("  #")[0].strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if line and not line.startswith("#")]


class Workplace:
    """A folder that looks like a clone of the repository, and the programs that its user has started in it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.started: list[subprocess.Popen[bytes]] = []
        for name in subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.splitlines():
            top = name.split("/")[0]
            if not (folder / top).is_symlink():
                (folder / top).symlink_to(ROOT / top)
        (folder / ".venv").symlink_to(ROOT / ".venv")
        self.environment = os.environ | {
            "PATH": f"{folder / '.venv/bin'}:{os.environ['PATH']}",
            "PYTHONPATH": f"{ROOT / 'device'}:{ROOT / 'host'}",
            "TERM": "xterm",
        }

    def run(self, command: str, timeout: float = FLASH_S) -> str:
        """Output of a command that has to succeed."""
        done = subprocess.run(
            ["bash", "-c", command],
            cwd=self.folder,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout,
            check=False,
        )
        assert done.returncode == 0, f"$ {command}\nexit {done.returncode}\n{done.stdout}"
        return done.stdout

    def start(self, command: str, log: Path) -> None:
        """Start a program that stays."""
        with log.open("wb") as stream:
            self.started.append(
                subprocess.Popen(
                    ["bash", "-c", f"exec {command}"],
                    cwd=self.folder,
                    env=self.environment,
                    stdin=subprocess.DEVNULL,
                    stdout=stream,
                    stderr=stream,
                    start_new_session=True,
                )
            )

    def look(self, command: str, until: Callable[[str], bool], timeout: float = 300) -> str:
        """Run a program in a terminal of 80 columns until its screen shows what is waited for, then press q."""
        master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", _ROWS, _COLUMNS, 0, 0))
        process = subprocess.Popen(
            ["bash", "-c", f"exec {command}"],
            cwd=self.folder,
            stdin=slave,
            stdout=slave,
            stderr=slave,
            env=self.environment,
            start_new_session=True,
        )
        os.close(slave)
        self.started.append(process)
        text, screen, deadline = "", "", time.monotonic() + timeout
        while not until(screen):
            assert time.monotonic() < deadline, f"not seen within {timeout:g} s:\n{screen or text[-3000:]}"
            if select.select([master], [], [], 1)[0]:
                with contextlib.suppress(OSError):
                    text += os.read(master, 65536).decode(errors="replace")
            screen = last_screen(text)
        os.write(master, b"q")
        while process.poll() is None and time.monotonic() < deadline:
            if select.select([master], [], [], 0.2)[0]:
                with contextlib.suppress(OSError):
                    os.read(master, 65536)
        assert process.wait(20) == 0
        os.close(master)
        return screen

    def end(self) -> None:
        """Stop what was started, in order."""
        for process in reversed(self.started):
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
        for process in self.started:
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def last_screen(text: str) -> str:
    """What a terminal shows last of a table that is drawn again and again, as plain lines."""
    frames = re.split(r"\x1b\[(?:H|\d*;?\d*H|2J|\d+A)", text)
    plain = [re.sub(r"\x1b(?:\[[0-9;?]*[A-Za-z]|[()][A-Z0-9])", "", frame).replace("\r", "") for frame in frames]
    return next((frame for frame in reversed(plain) if "cam-7" in frame), plain[-1])


def _answers(screen: str) -> bool:
    """Whether the device has a label: colour bars are none of the model's classes, which the view may say, too."""
    return bool(re.search(r"cam-7 +(online|ood) +[a-z-]+ \d+%", screen))


@pytest.fixture
def workplace(open_folder: Path) -> Iterator[Workplace]:  # noqa: F811 - fixture
    place = Workplace(open_folder)
    try:
        yield place
    finally:
        place.end()


@pytest.fixture
def fresh_board(image: Image, tmp_path: Path) -> Iterator[Board]:
    board = Board(tmp_path / "board", image).start()
    try:
        yield board.wait_ssh()
    finally:
        board.close()


def test_the_section_names_each_step_once() -> None:
    assert [command.split()[:2] for command in commands()] == [
        ["eyas", "broker"],
        ["eyas", "enroll"],
        ["make", "flash"],
        ["eyas", "collect"],
        ["eyas", "watch"],
    ]


@pytest.mark.timeout(2400)
def test_from_a_bare_board_to_answers(
    fresh_board: Board,
    workplace: Workplace,
    pristine_bundle: Path,
    report: Callable[[str], None],
) -> None:
    """Only the board's address, how to log in on it, and the broker's address and port are put in."""
    require("mosquitto", "openssl")
    board, port, since = fresh_board, free_port(), time.monotonic()
    flags = f"--offline --wheel-dir {wheel_folder()} {shlex.join(login_options(board))}"
    for command in commands():
        if "eyas broker" in command:
            workplace.start(f"{command} --port {port} --name {HOST_ADDRESS}", workplace.folder / "broker.log")
            wait_until(lambda: listens(port), 60, "the broker's start")
        elif any(program in command for program in _STAYS):
            workplace.start(command, workplace.folder / "collect.log")
        elif "make flash" in command:
            command = re.sub(r"DEVICE=\S+", f"DEVICE={board.address}", command)
            shutil.copytree(pristine_bundle, workplace.folder / named_bundle(command))
            output = workplace.run(f"{command} FLASH_FLAGS={shlex.quote(flags)}")
            assert ": flashed: " in output and "warning" not in output, output
            report(output.strip().splitlines()[-1])
        elif "eyas watch" in command:
            screen = workplace.look(command, _answers)
            shown = "\n".join(line.rstrip() for line in screen.splitlines() if line.strip())
            report(f"{time.monotonic() - since:.0f} s from the broker to an answering camera in eyas watch:\n{shown}")
            assert max(map(len, screen.splitlines())) <= _COLUMNS
        else:
            workplace.run(command)
    assert board.run("systemctl is-active eyas-device").stdout == "active\n"
    asked = board.run("/opt/eyas/venv/bin/eyas-device status --json", check=False)  # 1: out of distribution
    status = json.loads(asked.stdout)
    assert status["camera"]["state"] == "delivering", status
    with Store(f"sqlite:///{workplace.folder}/fleet.db") as store:
        assert sum(window.frames for window in store.windows("cam-7")) > 0


def named_bundle(command: str) -> str:
    """The bundle that a command of `make flash` flashes."""
    named = re.search(r"BUNDLE=(\S+)", command)
    return named[1] if named else "runs/solar-cells/bundle"
