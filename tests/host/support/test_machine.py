"""How many threads suit what a process may use of the machine."""

from __future__ import annotations

import os

import pytest

from eyas_host.support import machine
from eyas_host.support.machine import decoding_threads, limit_threads


@pytest.mark.parametrize(("cores", "memory", "threads"), [(8, 16e9, 8), (2, 1.5e9, 2), (8, 1.6e9, 3), (1, 0.0, 1)])
def test_threads_that_decode(cores: int, memory: float, threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "usable_cores", lambda root: cores)
    monkeypatch.setattr(machine, "usable_memory", lambda root: memory)
    assert decoding_threads() == threads


def test_libraries_get_the_quota(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    monkeypatch.setattr(machine, "usable_cores", lambda: 1)
    limit_threads()
    assert os.environ["OMP_NUM_THREADS"] == "3", "what the user set stays"
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr(machine, "usable_cores", lambda: 2)
    limit_threads()
    assert "OMP_NUM_THREADS" not in os.environ
    monkeypatch.setattr(machine, "usable_cores", lambda: 1)
    limit_threads()
    assert os.environ["OMP_NUM_THREADS"] == "1"
