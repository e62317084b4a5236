"""Milliseconds of a network that was not built yet, from the measured block times of the dense one.

A small part of a block's time is fixed (calls, set-up); the rest shrinks with its work: multiply-accumulates, and what
its layers write, which has to be rounded, activated and stored. The two constants were fitted once to int8 LiteRT on an
x86-64 core with AVX2: MobileNetV3-small at 128 and 224 px, 13 networks pruned evenly and unevenly down to 0.29 of the
dense time, predicted to within 3 % of their own; EfficientNet-Lite0 and MobileNetV3-large came out up to 7 % faster
than predicted. Another processor divides its time otherwise; where networks are timed here, the pruned one is timed
again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite, prod
from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from eyas_device.bench.blocks import Block, BlockTimes
from eyas_device.bench.result import SCHEMA
from eyas_device.runtimes import RUNTIMES, runs
from eyas_host.compress.prune.channels import Floats
from eyas_host.models.factory import PixelClassifier
from eyas_host.support.errors import CompressError

_WEIGHTED = frozenset(
    (
        *("CONV_2D", "DEPTHWISE_CONV_2D", "TRANSPOSE_CONV", "FULLY_CONNECTED"),
        *("Convolution", "GroupConvolution", "Deconvolution", "FullyConnected", "MatMul"),
        *("Conv", "FusedConv", "NhwcFusedConv", "QLinearConv", "NhwcConv", "Gemm", "FusedGemm", "QGemm", "FusedMatMul"),
    )
)
"""Operators of LiteRT, OpenVINO and ONNX Runtime that are a layer with weights."""
_FIXED = 0.06
"""Part of a block's time that no pruning saves."""
_WRITE = 24.0
"""Multiply-accumulates that take as long as one written value."""
_MOST_BYTES = 16 << 20
_MEASURE = "measure again with `eyas-device bench --blocks FILE`, or leave [prune] table out"


@dataclass(frozen=True)
class Layers:
    """A network's convolutions and linear layers in order of execution; one entry of each array a layer."""

    names: tuple[str, ...]
    """Below the backbone."""
    inputs: Floats
    """Channels."""
    outputs: Floats
    positions: Floats
    """Height x width of the output."""
    taps: Floats
    """Height x width of the kernel."""
    depthwise: npt.NDArray[np.bool_]
    """One input channel for each output channel."""

    @property
    def macs(self) -> Floats:
        """Multiply-accumulates an image."""
        return self.positions * self.taps * self.outputs * np.where(self.depthwise, 1.0, self.inputs)

    @property
    def work(self) -> Floats:
        """Multiply-accumulates, and written values in the same unit."""
        return self.macs + _WRITE * self.positions * self.outputs


def layers_of(model: PixelClassifier, *, size: int) -> Layers:
    """Look at one run at `size` x `size` pixels."""
    names = {module: name for name, module in model.backbone.named_modules()}
    rows: list[tuple[str, int, int, int, int, bool]] = []

    def seen(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        weight: Tensor = module.weight  # type: ignore[assignment]
        groups: int = getattr(module, "groups", 1)
        channels = args[0].shape[1] if groups in (1, weight.shape[0]) else weight.shape[1]
        depthwise = 1 < groups == weight.shape[0]
        rows.append(
            (names[module], channels, weight.shape[0], prod(output.shape[2:]), prod(weight.shape[2:]), depthwise)
        )

    watched = [m for m in model.backbone.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    handles = [module.register_forward_hook(seen) for module in watched]
    device = next(model.backbone.parameters()).device
    with torch.no_grad():
        model.backbone(torch.zeros(1, 3, size, size, device=device))
    for handle in handles:
        handle.remove()
    columns = list(zip(*rows, strict=True))
    inputs, outputs, positions, taps = (np.asarray(column, dtype=np.float64) for column in columns[1:5])
    return Layers(columns[0], inputs, outputs, positions, taps, np.asarray(columns[5], dtype=np.bool_))


class LatencyModel:
    """Predicts milliseconds of pruned variants of one network."""

    def __init__(self, times: BlockTimes, dense: Layers, *, where: str = "the measured blocks") -> None:
        """Raises `CompressError` if the table, called `where`, belongs to another network."""
        runs_of = _matched(times.blocks, dense, where)
        measured = np.maximum([ms for ms, _ in runs_of], 0.0)
        if not measured.sum() > 0:
            raise CompressError(f"{where}: no block takes any time; {_MEASURE}")
        self.dense_ms: float = times.whole.p50
        """The whole dense network."""
        block = np.repeat(np.arange(len(runs_of)), [count for _, count in runs_of])
        per_work = (1 - _FIXED) * measured / np.bincount(block, dense.work)
        self._per_work = self.dense_ms / measured.sum() * per_work[block]

    def ms(self, layers: Layers) -> float:
        """Of a variant of the dense network: the same layers with other channel counts."""
        return _FIXED * self.dense_ms + float(self._per_work @ layers.work)


def read_table(path: Path, runtimes: Sequence[str]) -> BlockTimes:
    """What `eyas-device bench --blocks` wrote about an int8 artefact of one of `runtimes` at one thread.

    Raises `CompressError` that says what is wrong with the file.
    """
    try:
        data = path.read_bytes() if path.is_file() and path.stat().st_size <= _MOST_BYTES else b""
        if not data:
            raise CompressError(f"[prune] table {path}: there is no such file of block times; {_MEASURE}")
        schema = msgspec.json.decode(data, type=dict[str, msgspec.Raw]).get("schema", msgspec.Raw(b"null"))
        if msgspec.json.decode(schema) != SCHEMA:
            raise CompressError(f"[prune] table {path}: schema {bytes(schema).decode()}, not {SCHEMA}; {_MEASURE}")
        times = msgspec.json.decode(data, type=BlockTimes)
    except (OSError, msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise CompressError(f"[prune] table {path}: not a table of block times ({error}); {_MEASURE}") from None
    faults = []
    if times.runtime not in RUNTIMES or runs(times.runtime) not in runtimes:
        faults.append(f"runtime {times.runtime!r} runs none of [compile] runtimes ({', '.join(runtimes)})")
    if times.precision != "int8":
        faults.append(f"artefact {times.artefact} is {times.precision}: int8 is what the device is to run")
    if times.threads != 1:
        faults.append(f"{times.threads} threads: latency targets mean one")
    if not times.whole.p50 > 0 or not all(isfinite(block.ms) for block in times.blocks):
        faults.append("times that are none")
    if faults:
        raise CompressError(f"[prune] table {path}: {'; '.join(faults)}; {_MEASURE}")
    return times


def _matched(blocks: Sequence[Block], layers: Layers, where: str) -> list[tuple[float, int]]:
    """Milliseconds and count of layers of each block that has some, by order; others are added to the one before.

    Raises `CompressError` unless every layer is found once and each block puts out its last layer's channels.
    """
    found: list[tuple[float, int]] = []
    ahead, end = 0.0, 0
    for block in blocks:
        count = sum(operator in _WEIGHTED for operator in block.operators)
        if count:
            found.append((ahead + block.ms, count))
            ahead, end = 0.0, end + count
            _check_output(block, layers, end - 1, where)
        elif found:
            found[-1] = (found[-1][0] + block.ms, found[-1][1])
        else:
            ahead += block.ms
    if end != len(layers.names):
        raise CompressError(
            f"{where}: {end} convolutions and linear layers in {len(blocks)} blocks, {len(layers.names)} in the "
            f"student: another network; {_MEASURE}"
        )
    return found


def _check_output(block: Block, layers: Layers, last: int, where: str) -> None:
    """Raise `CompressError` if a block's output has not the size of its last layer's, nor of that pooled."""
    if last >= len(layers.names) or not block.outputs:
        return
    channels, positions = int(layers.outputs[last]), int(layers.positions[last])
    if prod(block.outputs[0]) not in (channels * positions, channels):
        raise CompressError(
            f"{where}: {block.name} puts out {'x'.join(map(str, block.outputs[0]))}, the student's "
            f"{layers.names[last]} {channels} channels at {positions} places: another network or image size; "
            f"{_MEASURE}"
        )
