"""Peak memory: of this process and of those that it started, while they live."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np

from eyas_host.pipeline.memory import PeakMemory, give_back_memory, memory_mb

MB = 10**6
HOLD = """
import sys
held = bytearray({bytes})
held[::4096] = bytes([1]) * len(held[::4096])
print("held", flush=True)
sys.stdin.read()
"""


def test_memory_of_a_child_counts_while_it_lives_and_no_longer() -> None:
    give_back_memory()
    before = memory_mb(os.getpid())
    child = subprocess.Popen(
        [sys.executable, "-c", HOLD.format(bytes=200 * MB)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert child.stdin is not None and child.stdout is not None
    with PeakMemory() as first:
        assert child.stdout.readline() == b"held\n"
        held = memory_mb(os.getpid())
    child.stdin.close()
    child.stdout.close()
    child.wait()
    with PeakMemory() as later:
        pass
    assert 195 <= held - before <= 260
    assert first.mb >= held - 20
    assert later.mb < held - 100, "a child that has ended is not counted in later stages"


def test_memory_of_a_grandchild_counts() -> None:
    before = memory_mb(os.getpid())
    hold = HOLD.format(bytes=100 * MB)
    nested = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {hold!r}])"
    child = subprocess.Popen([sys.executable, "-c", nested], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert child.stdin is not None and child.stdout is not None
    assert child.stdout.readline() == b"held\n"
    held = memory_mb(os.getpid()) - before
    child.stdin.close()
    child.stdout.close()
    child.wait()
    assert 100 <= held <= 180


def test_a_peak_of_its_own_between_two_looks_counts() -> None:
    give_back_memory()
    before = memory_mb(os.getpid())
    with PeakMemory() as memory:
        values = np.ones(150 * MB, dtype=np.uint8)
        del values
    assert memory.mb >= before + 140


def test_a_process_that_is_not_there_needs_nothing() -> None:
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    assert memory_mb(child.pid) == 0
