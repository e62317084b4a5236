"""The board that the tests of this folder share: started once, and again by each test that switches it off."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.device_fixtures import pristine_bundle, weights  # noqa: F401 - fixtures
from tests.support.proofs import tell, teller, unless_named

from .flashing import device_toml, flash, frozen_wheels, make_two_bundles
from .machine import Board, Image
from .service import CONFIG, DROP_INS, SERVICE, WAIT_S, Messages

HERE = Path(__file__).parent
_TEST_S = 1800


def pytest_ignore_collect(config: pytest.Config) -> bool | None:
    """Only `make test-board`, which names this folder, runs these tests: they need minutes and a built image."""
    return unless_named(HERE, config)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The first test waits for a flash, which takes minutes, and many where the machine has other things to do."""
    for item in items:
        if HERE in item.path.parents and item.get_closest_marker("timeout") is None:
            item.add_marker(pytest.mark.timeout(_TEST_S))
    # the board whose service runs comes last: while others run, it would only cost them time
    items.sort(key=lambda item: "service_board" in getattr(item, "fixturenames", ()))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Print what was measured."""
    tell(terminalreporter, config, "the virtual board")


@pytest.fixture
def report(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """Add a line to the summary."""
    return teller(request.config)


@pytest.fixture(scope="session")
def image() -> Image:
    """The image of all boards; without the programs that build and run it a test is skipped, or fails with CI=true."""
    return Image.build()


@pytest.fixture(scope="module")
def bare_board(image: Image, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Board]:
    """A board as it comes: a system and a camera, no Eyas. It is on; who switches it off switches it on again."""
    board = Board(tmp_path_factory.mktemp("bare"), image).start()
    try:
        yield board.wait_ssh()
    finally:
        board.close()


@pytest.fixture(scope="session")
def two_bundles(pristine_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:  # noqa: F811
    """Two bundles of the same network, which differ in their version and by four megabytes of ballast."""
    return make_two_bundles(pristine_bundle, tmp_path_factory.mktemp("bundles"))


@pytest.fixture(scope="session")
def wheels(image: Image, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheels that boards are flashed from here: with them, a second flash finds its environment there."""
    return frozen_wheels(tmp_path_factory.mktemp("wheels") / "all")


@pytest.fixture(scope="session")
def flashed(
    image: Image, two_bundles: tuple[Path, Path], wheels: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Board]:
    """A board that has the first of the two bundles and a service that runs it, switched off: begin with its `copy`."""
    folder = tmp_path_factory.mktemp("flashed")
    board = Board(folder / "board", image).start()
    try:
        flash(board.wait_ssh(), two_bundles[0], "--config", str(device_toml(folder)), wheels=wheels)
        board.stop()
        yield board
    finally:
        board.close()


@pytest.fixture(scope="session")
def messages(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Messages]:
    """What the service of `service_board` sends."""
    arrived = Messages(tmp_path_factory.mktemp("broker"))
    yield arrived
    arrived.close()


@pytest.fixture(scope="session")
def service_board(flashed: Board, messages: Messages, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Board]:
    """A flashed board whose service runs and reports to `messages`; a test leaves it so.

    Its watchdog waits for 10 s in place of a minute, its pause between restarts is short, and its camera's image moves.
    """
    folder = tmp_path_factory.mktemp("service")
    board = flashed.copy(folder / "board").start().wait_ssh()
    try:
        config = device_toml(folder, messages.port, 'window_s = 2.0\ndelivery = "broker"\n')
        board.run(f"cat >{CONFIG}", stdin=config.read_bytes())
        (folder / "short.conf").write_text(
            "[Service]\nWatchdogSec=10s\nRestartSec=1s\n"
            "ExecStartPre=-+/usr/bin/v4l2-ctl --set-ctrl horizontal_movement=6\n"
        )
        board.put(folder / "short.conf", f"{DROP_INS}/short.conf")
        board.run(f"systemctl daemon-reload && systemctl restart {SERVICE}", timeout=WAIT_S)
        yield board
    finally:
        board.close()
