"""Predict the latency of a pruned network from the measured block times of the dense one.

A small fraction of a block's time is fixed (calls, set-up); the rest scales with its work: multiply-accumulates, and
the values its layers write, which have to be requantized, activated and stored. The two constants were fitted once to
int8 LiteRT on an x86-64 core with AVX2: MobileNetV3-small at 128 and 224 px, 13 networks pruned evenly and unevenly
down to 0.29 of the dense latency, predicted to within 3 %; EfficientNet-Lite0 and MobileNetV3-large came out up to 7 %
faster than predicted. Another processor spends its time differently; where networks are timed on this machine, the
pruned one is measured too.
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
from eyas_device.runtimes import RUNTIMES, artefact_runtime
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
"""Operators with weights in LiteRT, OpenVINO and ONNX Runtime."""
FITTED_TO = "int8 LiteRT on one x86-64 core with AVX2"
"""What the two constants below were fitted to."""
_FIXED = 0.06
"""Fraction of a block's time that no pruning saves."""
_WRITE = 24.0
"""Multiply-accumulates that take as long as writing one value."""
_MAX_BYTES = 16 << 20
_REMEDY = "measure again with `eyas-device bench --blocks FILE`, or leave [prune] table out"


@dataclass(frozen=True)
class LayerShapes:
    """Shapes of a network's convolutions and linear layers in order of execution: arrays with one entry per layer."""

    names: tuple[str, ...]
    """Module paths in the backbone."""
    inputs: Floats
    """Input channels."""
    outputs: Floats
    """Output channels."""
    positions: Floats
    """Height x width of the output."""
    taps: Floats
    """Height x width of the kernel."""
    depthwise: npt.NDArray[np.bool_]
    """Whether each output channel reads one input channel only."""

    @property
    def macs(self) -> Floats:
        """Multiply-accumulates per image."""
        return self.positions * self.taps * self.outputs * np.where(self.depthwise, 1.0, self.inputs)

    @property
    def work(self) -> Floats:
        """Multiply-accumulates plus written values, in multiply-accumulates."""
        return self.macs + _WRITE * self.positions * self.outputs


def layer_shapes(model: PixelClassifier, *, size: int) -> LayerShapes:
    """Record the layer shapes in one forward pass at `size` x `size` pixels."""
    names = {module: name for name, module in model.backbone.named_modules()}
    rows: list[tuple[str, int, int, int, int, bool]] = []

    def record(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        weight: Tensor = module.weight  # type: ignore[assignment]
        groups: int = getattr(module, "groups", 1)
        channels = args[0].shape[1] if groups in (1, weight.shape[0]) else weight.shape[1]
        depthwise = 1 < groups == weight.shape[0]
        rows.append(
            (names[module], channels, weight.shape[0], prod(output.shape[2:]), prod(weight.shape[2:]), depthwise)
        )

    watched = [m for m in model.backbone.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    handles = [module.register_forward_hook(record) for module in watched]
    device = next(model.backbone.parameters()).device
    with torch.no_grad():
        model.backbone(torch.zeros(1, 3, size, size, device=device))
    for handle in handles:
        handle.remove()
    columns = list(zip(*rows, strict=True))
    inputs, outputs, positions, taps = (np.asarray(column, dtype=np.float64) for column in columns[1:5])
    return LayerShapes(columns[0], inputs, outputs, positions, taps, np.asarray(columns[5], dtype=np.bool_))


class LatencyModel:
    """Predicts the latency of pruned variants of one network."""

    def __init__(self, times: BlockTimes, dense: LayerShapes, *, source: str = "the measured blocks") -> None:
        """Fit to a table of block times; `source` names it in errors.

        Raises `CompressError` if the table belongs to another network.
        """
        matched = _match_blocks(times.blocks, dense, source)
        measured = np.maximum([ms for ms, _ in matched], 0.0)
        if not measured.sum() > 0:
            raise CompressError(f"{source}: no block takes any time; {_REMEDY}")
        self.dense_ms: float = times.whole.p50
        """Latency of the full dense network, milliseconds."""
        block = np.repeat(np.arange(len(matched)), [count for _, count in matched])
        per_work = (1 - _FIXED) * measured / np.bincount(block, dense.work)
        self._per_work = self.dense_ms / measured.sum() * per_work[block]

    def ms(self, layers: LayerShapes) -> float:
        """Predicted milliseconds of a variant of the dense network: the same layers with other channel counts."""
        return _FIXED * self.dense_ms + float(self._per_work @ layers.work)


def read_table(path: Path, runtimes: Sequence[str]) -> BlockTimes:
    """Read block times that `eyas-device bench --blocks` wrote for an int8 artefact of one of `runtimes`, one thread.

    Raises `CompressError` that lists everything wrong with the file.
    """
    try:
        data = path.read_bytes() if path.is_file() and path.stat().st_size <= _MAX_BYTES else b""
        if not data:
            raise CompressError(f"[prune] table {path}: no such file, or it is empty or too large; {_REMEDY}")
        schema = msgspec.json.decode(data, type=dict[str, msgspec.Raw]).get("schema", msgspec.Raw(b"null"))
        if msgspec.json.decode(schema) != SCHEMA:
            raise CompressError(f"[prune] table {path}: schema {bytes(schema).decode()}, not {SCHEMA}; {_REMEDY}")
        times = msgspec.json.decode(data, type=BlockTimes)
    except (OSError, msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise CompressError(f"[prune] table {path}: not a table of block times ({error}); {_REMEDY}") from None
    problems = []
    if times.runtime not in RUNTIMES or artefact_runtime(times.runtime) not in runtimes:
        problems.append(f"runtime {times.runtime!r} runs none of [compile] runtimes ({', '.join(runtimes)})")
    if times.precision != "int8":
        problems.append(f"artefact {times.artefact} is {times.precision}, but the device will run int8")
    if times.threads != 1:
        problems.append(f"{times.threads} threads, but latency targets are for one")
    if not times.whole.p50 > 0 or not all(isfinite(block.ms) for block in times.blocks):
        problems.append("block times that are not positive finite numbers")
    if problems:
        raise CompressError(f"[prune] table {path}: {'; '.join(problems)}; {_REMEDY}")
    return times


def _match_blocks(blocks: Sequence[Block], layers: LayerShapes, source: str) -> list[tuple[float, int]]:
    """Map measured blocks to layers in order: (milliseconds, number of layers) of each block with layers.

    The time of a block without layers is added to the previous one. Raises `CompressError` unless every layer is found
    once and each block's output has its last layer's channels.
    """
    matched: list[tuple[float, int]] = []
    ahead, end = 0.0, 0
    for block in blocks:
        count = sum(operator in _WEIGHTED for operator in block.operators)
        if count:
            matched.append((ahead + block.ms, count))
            ahead, end = 0.0, end + count
            _check_output(block, layers, end - 1, source)
        elif matched:
            matched[-1] = (matched[-1][0] + block.ms, matched[-1][1])
        else:
            ahead += block.ms
    if end != len(layers.names):
        raise CompressError(
            f"{source}: {end} convolutions and linear layers in {len(blocks)} blocks, {len(layers.names)} in the "
            f"student; it is of another network; {_REMEDY}"
        )
    return matched


def _check_output(block: Block, layers: LayerShapes, last: int, source: str) -> None:
    """Raise `CompressError` unless a block's output has the size of its last layer's output, pooled or not."""
    if last >= len(layers.names) or not block.outputs:
        return
    channels, positions = int(layers.outputs[last]), int(layers.positions[last])
    if prod(block.outputs[0]) not in (channels * positions, channels):
        raise CompressError(
            f"{source}: {block.name} puts out {'x'.join(map(str, block.outputs[0]))}, the student's "
            f"{layers.names[last]} {channels} channels at {positions} positions; it is of another network "
            f"or image size; {_REMEDY}"
        )
