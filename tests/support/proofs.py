"""Proofs that run only when their folder is named, and what they print at the end."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

_LINE = "proof"
"""Name of a test's property that is printed: properties also reach the summary from another process."""


def unless_named(folder: Path, config: pytest.Config) -> bool | None:
    """What `pytest_ignore_collect` returns so that the tests of `folder` wait to be named on the command line."""
    named = [Path(word.split("::")[0]).resolve() for word in map(str, config.invocation_params.args)]
    return None if any(path == folder or folder in path.parents for path in named) else True


def teller(test: pytest.Item) -> Callable[[str], None]:
    """A function that adds a line to the summary."""
    return lambda line: test.user_properties.append((_LINE, line))


def tell(terminalreporter: pytest.TerminalReporter, title: str) -> None:
    """Print what was added."""
    reports = [report for reports in terminalreporter.stats.values() for report in reports]
    called = [report for report in reports if isinstance(report, pytest.TestReport) and report.when == "call"]
    if lines := [value for report in called for name, value in report.user_properties if name == _LINE]:
        terminalreporter.section(title)
        for line in lines:
            terminalreporter.line(str(line))
