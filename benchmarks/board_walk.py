"""From an empty clone to a camera in `eyas watch` on the emulated board: what a reader without hardware types, timed.

The commands are those of the README's section on the fleet as `make board` prints them, with the board's address.
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec

from tests.board.machine import cache
from tests.board.walk import Workplace, commands, is_answering
from tests.support.fleet_parts import listens, wait_until
from tests.support.paths import ROOT

_CACHES = ("uv", "pip", "eyas-wheels")
"""Folders of the user's cache that spare downloads and builds, beside the images of boards."""
_BUILD_S = 3600
"""How long packages or an image may take to come."""
_START_S = 120
_BROKER_PORT = 8883


class Walk(msgspec.Struct, kw_only=True):
    """What a walk took."""

    seconds: dict[str, float]
    """Of each step, in order."""
    cold: bool
    """Whether caches were empty: the board's image and all packages had to be fetched and built, too."""
    screen: str
    """What `eyas watch` showed at the end."""


def walk(*, cold: bool) -> Walk:
    """Clone the repository into a temporary folder and go through everything.

    Args:
        cold: Begin with empty caches, in place of this user's.

    """
    seconds: dict[str, float] = {}

    @contextmanager
    def step(name: str) -> Iterator[None]:
        print(f"{name} ...", flush=True)
        since = time.monotonic()
        yield
        seconds[name] = round(time.monotonic() - since, 1)
        print(f"{name}, {seconds[name]:g} s", flush=True)

    assert not listens(_BROKER_PORT), f"port {_BROKER_PORT} is taken: the walk's own broker needs it"
    with _empty_place(cold) as place:
        folder = place.folder
        with step("git clone"):
            subprocess.run(["git", "clone", "--quiet", ROOT.as_uri(), folder], check=True)
        with step("make install"):
            place.run("make install", _BUILD_S)
        board = place.start("make board BOARD_FLAGS=--fresh", folder / "board.log")
        with step("make board-bundle, while the board starts"):
            place.run("make board-bundle", _BUILD_S)
        with step("make board, from then on"):
            wait_until(lambda: _typed(folder) or board.poll() is not None, _BUILD_S, "the board's start")
            assert board.poll() is None, (folder / "board.log").read_text(errors="replace")
        broker, enroll, flash, collect, watch = _typed(folder)
        with step("eyas broker"):
            place.start(broker, folder / "broker.log")
            wait_until(lambda: listens(_BROKER_PORT), _START_S, "the broker's start")
        with step("eyas enroll"):
            place.run(enroll)
        with step("make flash"):
            place.run(flash)
        with step("eyas collect and eyas watch, until the camera answers"):
            place.start(collect, folder / "collect.log")
            screen = place.look(watch, is_answering)
    lines = (line.rstrip() for line in screen.splitlines())
    return Walk(seconds=seconds, cold=cold, screen="\n".join(line for line in lines if line))


@contextmanager
def _empty_place(cold: bool) -> Iterator[Workplace]:
    """A folder without anything, and an environment without this checkout's; both go with the block."""
    with tempfile.TemporaryDirectory(prefix="eyas-walk-") as name:
        Path(name).chmod(0o755)  # root's broker runs as another user
        (clone := Path(name, "eyas")).mkdir()
        (caches := Path(name, "cache")).mkdir()
        for kept in () if cold else _kept():
            (caches / kept.relative_to(cache().parents[1])).parent.mkdir(parents=True, exist_ok=True)
            (caches / kept.relative_to(cache().parents[1])).symlink_to(kept)
        ours = {"PYTHONPATH", "VIRTUAL_ENV", "CONDA_PREFIX"}
        environment = {key: value for key, value in os.environ.items() if key not in ours}
        paths = [path for path in os.environ["PATH"].split(os.pathsep) if not Path(path).is_relative_to(ROOT)]
        environment |= {"PATH": os.pathsep.join(paths), "XDG_CACHE_HOME": str(caches), "TERM": "xterm"}
        place = Workplace(clone, environment)
        try:
            yield place
        finally:
            place.end()


def _kept() -> list[Path]:
    """What a warm walk finds of this user's caches: packages, wheels and images; not the disk of a board."""
    boards = [path for path in cache().iterdir() if (path / "disk.img").exists()]
    return [*boards, *(path for path in (cache().parents[1] / name for name in _CACHES) if path.is_dir())]


def _typed(folder: Path) -> list[str]:
    """The commands that `make board` printed, once all are there: those of the README, with the board's address."""
    printed = (folder / "board.log").read_text(errors="replace").replace("\\\n", " ")
    found = re.findall(r"^  ((?:\.venv/bin/eyas|make flash) .*)$", printed, re.MULTILINE)
    return found if [_verb(command) for command in found] == [_verb(command) for command in commands()] else []


def _verb(command: str) -> str:
    """What a command does: `eyas enroll`, `make flash`."""
    return " ".join(command.removeprefix(".venv/bin/").split()[:2])
