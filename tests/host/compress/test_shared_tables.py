"""Every latency table that somebody shared can be used, and says on which board and how it was measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest

from eyas_device.bench.blocks import Block, BlockTimes
from eyas_device.bench.result import CpuPressure, Quantiles, write
from eyas_device.board import Pressure
from eyas_host.compress.prune.latency_model import read_table
from eyas_host.support.errors import CompressError
from tests.support.block_times import block_times
from tests.support.paths import ROOT

TABLES = ROOT / "benchmarks/results/boards"
MAX_PRESSURE = 20.0
"""Percent of the minute before in which a process waited for a core."""


BUSY = Pressure(avg10=90.0, avg60=90.0, avg300=90.0, total_us=1)


def check(path: Path) -> BlockTimes:
    """Read a shared table as the recipe's. Raises `CompressError` or `AssertionError` if it cannot be shared."""
    times = read_table(path, ("litert", "openvino", "onnx"))
    assert path.stem.replace("-", "").isalnum() and path.stem == path.stem.lower(), "a board's name, in lower case"
    assert times.board.model and times.runtime_version and times.time > 0
    assert 0.8 <= times.sum_ms / times.whole.p50 <= 1.2, "the blocks do not add up to the model: measure again"
    pressure = times.pressure.before
    assert pressure is None or pressure.avg60 <= MAX_PRESSURE, "the board was busy"
    return times


def test_the_folder_says_how_to_make_one() -> None:
    text = (TABLES / "README.md").read_text()
    assert "eyas-device bench" in text and "--blocks" in text and "eyas prune" in text and "--table" in text
    assert {path.suffix for path in TABLES.iterdir()} <= {".md", ".json"}


def shared(folder: Path, name: str = "pi5.json", **changes: Any) -> Path:
    """A table as a board might share it."""
    blocks = [
        Block(name=str(n), operators=("CONV_2D",), inputs=(), outputs=((8,),), ms=1.0, p10=0.9, p90=1.1)
        for n in range(4)
    ]
    times = block_times(blocks, Quantiles(count=9, p10=4.0, p50=4.1, p90=4.2, p99=4.3, max=5.0))
    write(folder / name, msgspec.structs.replace(times, time=1.8e9, **changes))
    return folder / name


def test_a_table_that_eyas_device_writes_can_be_shared(tmp_path: Path) -> None:
    assert check(shared(tmp_path)).board.model == "a board"


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        ("Pi 5.json", {}, "a board's name"),
        ("pi5.json", {"precision": "fp32"}, "will run int8"),
        ("pi5.json", {"threads": 4}, "latency targets are for one"),
        ("pi5.json", {"schema": 99}, "schema 99"),
        ("pi5.json", {"runtime": "mine"}, "runs none of"),
        ("pi5.json", {"sum_ms": 9.0}, "do not add up"),
        ("pi5.json", {"pressure": CpuPressure(before=BUSY)}, "the board was busy"),
    ],
)
def test_a_table_that_cannot_be_shared(tmp_path: Path, name: str, changes: dict[str, Any], words: str) -> None:
    with pytest.raises((CompressError, AssertionError), match=words):
        check(shared(tmp_path, name, **changes))


def test_every_shared_table_can_be_used() -> None:
    for path in sorted(TABLES.glob("*.json")):
        check(path)
