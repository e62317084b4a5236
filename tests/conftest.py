"""What holds for every test: the header names the system parts that are missing."""

from __future__ import annotations

import signal
import sys
import tempfile
from collections.abc import Iterator

import pytest

from tests.support.once import shared  # noqa: F401 - fixture
from tests.support.system_parts import PARTS, is_there

_LONGEST = (
    "test_main_job.py",
    "test_flash.py",
    "test_nothing_is_sent.py",
    "test_placements.py",
    "test_retrain.py",
    "test_constraints.py",
    "test_send.py",
    "test_ready.py",
    "test_team.py",
    "test_agent_update.py",
    "test_rollout_agents.py",
    "test_kill_matrix.py",
    "test_prune.py",
    "test_tune.py",
)
"""Files that take longest start first, in this order, so that no process is left alone with one of them at the end."""


@pytest.fixture(scope="session", autouse=True)
def user_data() -> Iterator[None]:
    """A user data folder for logs that may not lie beside the images."""
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_DATA_HOME", folder)
        yield


@pytest.fixture(autouse=True)
def own_excepthook() -> Iterator[None]:
    """A program that a test runs in this process gives back what it took: the next test would log through it."""
    before = sys.excepthook
    yield
    left, sys.excepthook = sys.excepthook, before  # typer leaves one of its own
    assert not left.__module__.startswith("eyas"), "the hook for uncaught errors is still the program's"


def pytest_configure() -> None:
    """Where SIGINT is ignored, as for a shell's background jobs, tests of Ctrl-C could not see it."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_report_header() -> list[str]:
    """One line on the system parts, before the first test."""
    missing = [part.program for part in PARTS if not is_there(part)]
    return [f"system parts: {'missing ' + ', '.join(missing) + ' (make system-deps)' if missing else 'all there'}"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the longest files first; the order within a file stays."""
    order = {name: place for place, name in enumerate(_LONGEST)}
    items.sort(key=lambda item: order.get(item.path.name, len(order)))
