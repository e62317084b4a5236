"""Signed updates on a board, native or emulated; the tests of each are steps of one board's life."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ..machine import Board, Computer
from ..native import NativeBoard
from .publishing import SLOW_S, Publisher, next_version


@pytest.fixture(scope="session")
def versions(two_bundles: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The same model under another version, each with files of its own."""
    folder = tmp_path_factory.mktemp("versions")
    made = {"1.0.0": two_bundles[0]}

    def version_of(version: str) -> Path:
        made[version] = made.get(version) or next_version(two_bundles[0], folder, version)
        return made[version]

    return version_of


@pytest.fixture(scope="session")
def bare_or_flashed(kind: str, request: pytest.FixtureRequest) -> Iterator[Computer]:
    """A board that is on: the emulated one has been flashed before, which takes minutes."""
    with tempfile.TemporaryDirectory(prefix="eyas-board-") as name:
        if kind == "native":
            with NativeBoard(Path(name)).start() as native:
                yield native
        else:
            flashed: Board = request.getfixturevalue("flashed")
            with flashed.copy(Path(name, "board")).start() as emulated:
                yield emulated.wait_ssh(SLOW_S)


@pytest.fixture(scope="session")
def publisher(bare_or_flashed: Computer) -> Iterator[Publisher]:
    """What the board's team has and types."""
    with tempfile.TemporaryDirectory(prefix="eyas-publisher-") as name:
        Path(name).chmod(0o755)  # root's broker runs as another user
        publisher = Publisher(Path(name), bare_or_flashed.host)
        try:
            yield publisher
        finally:
            publisher.close()


@pytest.fixture(scope="session")
def board(
    bare_or_flashed: Computer, publisher: Publisher, two_bundles: tuple[Path, Path], kind_wheels: Path
) -> Computer:
    """It runs 1.0.0 and follows the repository, which it looks at every few minutes."""
    publisher.publish(two_bundles[0], "--channel", "stable")
    publisher.bring(bare_or_flashed, two_bundles[0], kind_wheels, poll_s=300, rate_kb=800, agent=True)
    return bare_or_flashed
