"""The README's fleet section as its reader goes through it: each command in its terminal, in a folder like a clone."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import re
import select
import shlex
import shutil
import signal
import struct
import subprocess
import tempfile
import termios
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import msgspec

from eyas_host.fleet.store.database import Store
from tests.support.brokers import free_port
from tests.support.fleet_parts import listens, wait_until
from tests.support.paths import ROOT
from tests.support.system_parts import require

from .flashing import FLASH_S, login_options
from .machine import HOST_ADDRESS, Board

_STAYS = ("eyas broker", "eyas collect")
"""Programs that run until they are stopped: each has a terminal of its own."""
ROWS, COLUMNS = 24, 80
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
    """A folder in which a reader types commands, and the programs that run there.

    Args:
        folder: A clone of the repository, or what looks like one.
        environment: Of the programs.

    """

    def __init__(self, folder: Path, environment: Mapping[str, str]) -> None:
        self.folder, self.environment = folder, environment
        self.started: list[subprocess.Popen[bytes]] = []

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

    def start(self, command: str, log: Path) -> subprocess.Popen[bytes]:
        """Start a program that stays."""
        with log.open("wb") as stream:
            process = subprocess.Popen(
                ["bash", "-c", f"exec {command}"],
                cwd=self.folder,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=stream,
                start_new_session=True,
            )
        self.started.append(process)
        return process

    def look(self, command: str, until: Callable[[str], bool], timeout: float = 300) -> str:
        """Run a program in a terminal of 80 columns until its screen shows what is waited for, then press q."""
        master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, COLUMNS, 0, 0))
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


def is_answering(screen: str) -> bool:
    """Whether the device has a label: colour bars are none of the model's classes, which the view may say, too."""
    return bool(re.search(r"cam-7 +(online|ood) +[a-z-]+ \d+%", screen))


def looks_like_a_clone(folder: Path) -> None:
    """Fill a folder with links to all that the repository tracks, and to the environment that is there."""
    for name in subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.splitlines():
        top = name.split("/")[0]
        if not (folder / top).is_symlink():
            (folder / top).symlink_to(ROOT / top)
    (folder / ".venv").mkdir()
    for part in (ROOT / ".venv").iterdir():
        if not part.name.startswith(".installed-"):
            (folder / ".venv" / part.name).symlink_to(part)
    for kind in ("cpu", "cuda"):  # newer than all of it: `make` is not to install this folder in place of the clone
        (folder / f".venv/.installed-{kind}").touch()


@contextlib.contextmanager
def workplace() -> Iterator[Workplace]:
    """A workplace whose programs end, and whose folder goes, with the block."""
    with tempfile.TemporaryDirectory(prefix="eyas-walk-") as name:
        folder = Path(name)
        folder.chmod(0o755)  # root's broker runs as another user, to whom pytest's folders are closed
        looks_like_a_clone(folder)
        own = {"PATH": f"{folder / '.venv/bin'}:{os.environ['PATH']}", "TERM": "xterm"}
        place = Workplace(folder, os.environ | own | {"PYTHONPATH": f"{ROOT / 'device'}:{ROOT / 'host'}"})
        try:
            yield place
        finally:
            place.end()


class Walk(msgspec.Struct):
    """What a reader of the section has seen."""

    flash: str
    """Output of `make flash`."""
    screen: str
    """What `eyas watch` showed when the camera answered."""
    seconds: float
    """From the first command to that."""
    status: str
    """What the agent on the board said of itself, as JSON."""
    active: str
    """What systemd said of the service."""
    frames: int
    """Of the windows in the collector's store."""


def walk(board: Board, workplace: Workplace, bundle: Path, wheels: Path) -> Walk:
    """Run the section's commands; only addresses, ports and how to log in on the board are put in."""
    require("mosquitto", "openssl")
    port, since, flashed, screen = free_port(), time.monotonic(), "", ""
    flags = f"--offline --wheel-dir {wheels} {shlex.join(login_options(board))}"
    for command in commands():
        if "eyas broker" in command:
            workplace.start(f"{command} --port {port} --name {HOST_ADDRESS}", workplace.folder / "broker.log")
            wait_until(lambda: listens(port), 60, "the broker's start")
        elif any(program in command for program in _STAYS):
            workplace.start(command, workplace.folder / "collect.log")
        elif "make flash" in command:
            command = re.sub(r"DEVICE=\S+", f"DEVICE={board.address}", command)
            shutil.copytree(bundle, workplace.folder / named_bundle(command))
            flashed = workplace.run(f"{command} FLASH_FLAGS={shlex.quote(flags)}")
        elif "eyas watch" in command:
            screen = workplace.look(command, is_answering)
        else:
            workplace.run(command)
    seconds = time.monotonic() - since
    active = board.run("systemctl is-active eyas-device").stdout
    # exit code 1: colour bars are out of distribution
    status = board.run("/opt/eyas/venv/bin/eyas-device status --json", check=False).stdout
    with Store(f"sqlite:///{workplace.folder}/fleet.db") as store:
        frames = sum(window.frames for window in store.windows("cam-7"))
    return Walk(flashed, screen, seconds, status, active, frames)


def named_bundle(command: str) -> str:
    """The bundle that a command of `make flash` flashes."""
    named = re.search(r"BUNDLE=(\S+)", command)
    return named[1] if named else "runs/solar-cells/bundle"
