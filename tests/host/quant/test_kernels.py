"""NNCF's kernels are loaded by one process at a time, whatever a killed process left behind."""

from __future__ import annotations

import fcntl
import threading
import time
from pathlib import Path

import pytest

from eyas_host.quant import kernels


@pytest.fixture
def seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether torch's lock file existed at each load of the kernels."""
    found: list[bool] = []
    for name in ("NNCF_EXTENSION_LOAD_TIMEOUT", "TORCH_EXTENSIONS_DIR"):  # restored after the test
        monkeypatch.setenv(name, "")
    monkeypatch.setattr(kernels.QuantizedFunctionsCPULoader, "get_build_dir", classmethod(lambda cls: str(tmp_path)))
    monkeypatch.setattr(kernels.QuantizedFunctionsCPU, "get", lambda name: found.append((tmp_path / "lock").exists()))
    monkeypatch.setattr(kernels.torch.cuda, "is_available", lambda: False)
    return found


def test_a_stale_lock_file_is_ignored(tmp_path: Path, seen: list[bool]) -> None:
    (tmp_path / "lock").touch()
    kernels.load_kernels.__wrapped__()
    assert seen == [False]


def test_a_compiling_process_is_waited_for(tmp_path: Path, seen: list[bool]) -> None:
    with (tmp_path / ".eyas.lock").open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        (tmp_path / "lock").touch()
        waiting = threading.Thread(target=kernels.load_kernels.__wrapped__)
        waiting.start()
        time.sleep(0.3)
        assert waiting.is_alive() and (tmp_path / "lock").exists() and not seen
    waiting.join(10)
    assert seen == [False]
