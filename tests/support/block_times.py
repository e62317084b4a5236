"""Block times as a board might write them."""

from __future__ import annotations

from collections.abc import Sequence

from eyas_device.bench.blocks import Block, BlockTimes
from eyas_device.bench.result import Quantiles
from eyas_device.board import Board


def block_times(blocks: Sequence[Block], whole: Quantiles) -> BlockTimes:
    """Block times of an int8 LiteRT model at one thread."""
    return BlockTimes(
        board=Board(model="a board"),
        bundle="b",
        bundle_version="1.0.0",
        runtime="litert",
        runtime_version="2",
        artefact="litert-int8",
        precision="int8",
        threads=1,
        method="",
        blocks=tuple(blocks),
        whole=whole,
        sum_ms=sum(block.ms for block in blocks),
    )
