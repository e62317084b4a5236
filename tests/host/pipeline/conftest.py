"""What the tests of the runner share."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def _no_collection(monkeypatch: pytest.MonkeyPatch) -> None:
    """Collecting the garbage of this process before each toy stage would take most of the time."""
    monkeypatch.setattr("eyas_host.pipeline.runner.give_back_memory", lambda: None)
