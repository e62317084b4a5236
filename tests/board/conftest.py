"""The boards that the tests of this folder begin with: each is made once, suspended, and woken as a copy."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest
from xdist.remote import Producer
from xdist.scheduler import LoadFileScheduling

from tests.support.device_fixtures import pristine_bundle, weights  # noqa: F401 - fixtures
from tests.support.once import once
from tests.support.proofs import tell, teller, unless_named

from .flashing import add_packages, device_toml, flash, freeze_wheels, make_two_bundles
from .machine import Board, Computer, Image
from .native import NativeBoard, needs_namespaces, this_machine
from .service import CONFIG, DROP_INS, SERVICE, WAIT_S, WATCHDOG_S, Messages
from .walk import Walk, walk, workplace

HERE = Path(__file__).parent
_GROUPS = {
    "readme": "readme",
    "board": "board",
    **dict.fromkeys(("updates", "cuts", "flash", "by_hand"), "native"),
    **dict.fromkeys(("service", "boot", "clock"), "service"),
    "camera": "camera",
    "power_cuts": "power_cuts",
}
"""Of the files, in order: all of a group are in one process. Two make and use emulated boards, which keep a processor
busy each; the third begins with the native ones, which mostly wait."""
_SHORT_WINDOWS = 'window_s = 2.0\ndelivery = "broker"\n'
_TEST_S = 1800
_CORES = 1
"""Of each board: an emulated core is a thread here, two boards run side by side, and one core waits for no other."""


def pytest_ignore_collect(config: pytest.Config) -> bool | None:
    """Only `make test-board`, which names this folder, runs these tests: they need minutes and a built image."""
    return unless_named(HERE, config)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> LoadFileScheduling:
    """All tests of one board in one process."""
    return _Boards(config, log)


class _Boards(LoadFileScheduling):
    def _split_scope(self, nodeid: str) -> str:
        return _GROUPS[_name(Path(nodeid.partition("::")[0]))]


def _name(file: Path) -> str:
    return file.stem.removeprefix("test_")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The first test waits for a flash, which takes minutes, and many where the machine has other things to do."""
    for item in items:
        if HERE in item.path.parents and item.get_closest_marker("timeout") is None:
            item.add_marker(pytest.mark.timeout(_TEST_S))
    own = [item for item in items if HERE in item.path.parents]
    if len(own) == len(items):
        items.sort(key=lambda item: list(_GROUPS).index(_name(item.path)))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print what was measured."""
    tell(terminalreporter, "the virtual board")


@pytest.fixture
def report(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """Add a line to the summary."""
    return teller(request.node)


@pytest.fixture(scope="session")
def image() -> Image:
    """The image of all boards; without the programs that build and run it a test is skipped, or fails with CI=true."""
    return Image.build()


@pytest.fixture(scope="session")
def bare(image: Image, shared: Path) -> Board:
    """A board as it comes, a system and a camera, no Eyas, suspended once it was up: begin with its `copy`."""

    def make(folder: Path) -> None:
        with Board(folder, image, cores=_CORES).start() as board:
            board.wait_ssh()
            assert board.wait_running() == "running", board.run("systemctl --failed").stdout
            board.move_image()
            board.suspend()

    return Board(once(shared / "bare", make), image, cores=_CORES)


@pytest.fixture(scope="module")
def bare_board(bare: Board, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Board]:
    """A copy of `bare` that is on; who switches it off switches it on again."""
    with bare.copy(tmp_path_factory.mktemp("board") / "board").start() as board:
        yield board.wait_ssh()


@pytest.fixture(scope="session")
def two_bundles(pristine_bundle: Path, shared: Path) -> tuple[Path, Path]:  # noqa: F811
    """Two bundles of the same network, which differ in their version and by four megabytes of ballast."""
    first, second = sorted(once(shared / "bundles", lambda folder: make_two_bundles(pristine_bundle, folder)).iterdir())
    return first, second


@pytest.fixture(scope="session")
def wheels(image: Image, shared: Path) -> Path:
    """The wheels that boards are flashed from here: with them, a second flash finds its environment there."""
    return once(shared / "wheels", freeze_wheels)


@pytest.fixture(scope="session", params=["native", "emulated"])
def kind(request: pytest.FixtureRequest) -> str:
    """Of a board, where a test needs ssh, systemd and a service, but no kernel of its own: choose one with `-k`."""
    found: str = request.param
    if found == "native":
        needs_namespaces()
    return found


@pytest.fixture(scope="session")
def kind_wheels(kind: str, request: pytest.FixtureRequest, shared: Path) -> Path:
    """The wheels that a board of this kind is flashed from."""
    if kind == "emulated":
        found: Path = request.getfixturevalue("wheels")
        return found
    return once(shared / "native-wheels", lambda folder: freeze_wheels(folder, this_machine()))


@pytest.fixture(scope="session")
def equipped(bare: Board, wheels: Path, shared: Path) -> Board:
    """A bare board whose own Python has the packages that Eyas needs, suspended: begin with its `copy`."""

    def make(folder: Path) -> None:
        with bare.copy(folder).start() as board:
            add_packages(board.wait_ssh(), wheels)
            board.suspend()

    return Board(once(shared / "equipped", make), bare.image, cores=_CORES)


@pytest.fixture(scope="session")
def walked(two_bundles: tuple[Path, Path], wheels: Path, bare: Board, shared: Path) -> Walk:
    """What a reader of the README's fleet section sees: from a bare board to the first bundle's answers."""

    def make(folder: Path) -> None:
        with bare.copy(folder / "board").start() as board, workplace() as place:
            seen = walk(board.wait_ssh(), place, two_bundles[0], wheels)
            board.suspend()
        (folder / "walk.json").write_bytes(msgspec.json.encode(seen))

    return msgspec.json.decode((once(shared / "walk", make) / "walk.json").read_bytes(), type=Walk)


@pytest.fixture(scope="session")
def flashed(walked: Walk, image: Image, shared: Path) -> Board:
    """The board of `walked`: its service runs the first bundle, its broker is gone. Begin with its `copy`."""
    return Board(shared / "walk/board", image, cores=_CORES)


@pytest.fixture(scope="session")
def messages(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Messages]:
    """What the service of `service_board` sends."""
    arrived = Messages(tmp_path_factory.mktemp("broker"))
    yield arrived
    arrived.close()


@pytest.fixture(scope="session")
def service_board(flashed: Board, messages: Messages, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Board]:
    """A flashed board whose service runs and reports to `messages`; a test leaves it so.

    Its watchdog waits for a shorter time than a minute, as does systemd between restarts, and its camera's image moves.
    """
    folder = tmp_path_factory.mktemp("service")
    with flashed.copy(folder / "board").start() as board:
        config = device_toml(folder, messages.port, _SHORT_WINDOWS)
        board.wait_ssh().run(f"cat >{CONFIG}", stdin=config.read_bytes())
        start_again(board, "ExecStartPre=-+/usr/bin/v4l2-ctl --set-ctrl horizontal_movement=6\n")
        yield board


@pytest.fixture(scope="session")
def live_board(
    kind: str,
    messages: Messages,
    two_bundles: tuple[Path, Path],
    kind_wheels: Path,
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Computer]:
    """The `service_board`, or one like it in namespaces."""
    if kind == "emulated":
        yield request.getfixturevalue("service_board")
        return
    with tempfile.TemporaryDirectory(prefix="eyas-board-") as name, NativeBoard(Path(name)) as board:
        config = device_toml(tmp_path_factory.mktemp("live"), messages.port, _SHORT_WINDOWS, board=NativeBoard)
        flash(board.start(), two_bundles[0], "--config", str(config), wheels=kind_wheels)
        start_again(board)
        yield board


def start_again(board: Computer, more: str = "") -> None:
    """Start the service with a short watchdog; what else its unit needs is `more`."""
    drop_in = f"[Service]\nWatchdogSec={WATCHDOG_S}s\nRestartSec=1s\n{more}"
    board.run(f"mkdir -p {DROP_INS} && cat >{DROP_INS}/short.conf", stdin=drop_in)
    board.run(f"systemctl daemon-reload && systemctl restart {SERVICE}", timeout=WAIT_S)
