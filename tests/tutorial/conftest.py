"""The tutorial takes minutes: only `make test-tutorial`, which names this folder, runs it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.fleet_parts import open_folder  # noqa: F401 - fixture
from tests.support.proofs import unless_named

HERE = Path(__file__).parent


def pytest_ignore_collect(config: pytest.Config) -> bool | None:
    """Leave these tests out unless the folder is named."""
    return unless_named(HERE, config)
