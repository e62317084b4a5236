"""Proofs that run only when their folder is named, and what they print at the end."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

_SEEN = pytest.StashKey[list[str]]()


def unless_named(folder: Path, config: pytest.Config) -> bool | None:
    """What `pytest_ignore_collect` returns so that the tests of `folder` wait to be named on the command line."""
    named = [Path(word.split("::")[0]).resolve() for word in map(str, config.invocation_params.args)]
    return None if any(path == folder or folder in path.parents for path in named) else True


def teller(config: pytest.Config) -> Callable[[str], None]:
    """A function that adds a line to the summary."""
    return config.stash.setdefault(_SEEN, []).append


def tell(terminalreporter: pytest.TerminalReporter, config: pytest.Config, title: str) -> None:
    """Print what was added."""
    if lines := config.stash.get(_SEEN, []):
        terminalreporter.section(title)
        for line in lines:
            terminalreporter.line(line)
