"""A fixture for tests that install packages."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.system_parts import unavailable


@pytest.fixture
def index(tmp_path: Path) -> None:
    """A package index that can be reached from here."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command += ["--dest", str(tmp_path / "probe"), "paho-mqtt"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    if done.returncode:
        unavailable(f"no package index can be reached: {done.stderr.strip()}")
