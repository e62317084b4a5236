"""Cut a `.tflite` after its blocks: each prefix is a model whose output is the last tensor.

A block ends only where a single activation is live, so that a prefix does the same work as that part of the whole
model: after a residual addition, after the narrow end of a bottleneck, after the first convolution that reduces the
resolution, before the classifier.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from eyas_device.bench.result import BenchError
from eyas_device.support.packages import install_line

MAX_BLOCKS = 20
_MALFORMED = (AttributeError, IndexError, KeyError, OSError, OverflowError, TypeError, ValueError, struct.error)
_STORAGE_OPERATORS = ("DEQUANTIZE", "QUANTIZE")
"""Operators that only convert the storage type: they belong to the previous block."""
_WEIGHTED = ("CONV_2D", "DEPTHWISE_CONV_2D", "TRANSPOSE_CONV", "FULLY_CONNECTED")
"""A block has at least one of these operators."""


@dataclass(frozen=True)
class GraphBlock:
    """The operators of one block, with its input and output shape."""

    operators: tuple[str, ...]
    inputs: tuple[int, ...]
    """Shape of the tensor that enters the block."""
    outputs: tuple[int, ...]
    end: int
    """Index of the first operator after the block."""


@dataclass(frozen=True)
class _CutPoint:
    """Position after an operator where a single activation is live."""

    index: int
    """Index of the operator."""
    name: str
    tensor: int
    elements: int


class Graph:
    """A `.tflite` with one graph, cut into blocks."""

    def __init__(self, path: Path) -> None:
        """Raises `BenchError` with the reason if the model cannot be cut."""
        self._path = path
        try:
            from ai_edge_litert import schema_py_generated as schema
        except ImportError as error:
            raise BenchError(
                f"{path.name}: the blocks of a .tflite need LiteRT's schema ({error}): {install_line()}"
            ) from None
        kinds = {number: name for name, number in vars(schema.BuiltinOperator).items() if isinstance(number, int)}
        try:
            self._model: Any = schema.ModelT.InitFromPackedBuf(path.read_bytes(), 0)
            if len(self._model.subgraphs) != 1:
                raise BenchError(f"{path.name}: {len(self._model.subgraphs)} graphs; only a model with one can be cut")
            self._graph: Any = self._model.subgraphs[0]
            codes = [max(code.builtinCode, code.deprecatedBuiltinCode) for code in self._model.operatorCodes]
            self._names = [kinds.get(codes[op.opcodeIndex], "unknown") for op in self._graph.operators]
            if len(self._graph.inputs) != 1 or len(self._graph.outputs) != 1:
                raise BenchError(f"{path.name}: only a model with one input and one output can be cut")
            self.blocks = self._split()
        except BenchError:
            raise
        except _MALFORMED as error:
            raise BenchError(f"{path.name}: cannot be cut: unknown model format ({error})") from None

    def prefix(self, block: GraphBlock) -> bytes:
        """The model up to the end of `block`; for the last block the whole model, serialised again."""
        import flatbuffers

        kept = self._graph.operators[: block.end]
        graph, model = copy(self._graph), copy(self._model)
        graph.operators, graph.outputs = kept, [int(kept[-1].outputs[0])]
        model.subgraphs, model.signatureDefs = [graph], None
        # Weights after the cut would take memory in each prefix.
        used = {graph.tensors[tensor].buffer for operator in kept for tensor in operator.inputs if tensor >= 0}
        empty = type(model.buffers[0])()
        model.buffers = [buffer if number in used else empty for number, buffer in enumerate(model.buffers)]
        builder = flatbuffers.Builder(1 << 20)
        builder.Finish(model.Pack(builder), b"TFL3")
        return bytes(builder.Output())

    def _split(self) -> tuple[GraphBlock, ...]:
        ends = _limit_blocks([point.index + 1 for point in self._boundaries()], len(self._names))
        blocks, begin = [], 0
        source = int(self._graph.inputs[0])
        for end in ends:
            tensor = int(self._graph.operators[end - 1].outputs[0])
            blocks.append(GraphBlock(tuple(self._names[begin:end]), self._shape(source), self._shape(tensor), end))
            begin, source = end, tensor
        return tuple(blocks)

    def _boundaries(self) -> list[_CutPoint]:
        """The cut points that end a block, without the end of the model."""
        points = [point for point in self._cut_points() if point.name not in ("PAD", "PADV2", "MIRROR_PAD")]
        boundaries: list[_CutPoint] = []
        stem = True
        for number, point in enumerate(points[:-1]):
            following = points[number + 1]
            before = points[number - 1].elements if number else point.elements
            narrow = point.elements <= before and point.elements < following.elements
            first = stem and point.elements > following.elements and self._is_downsampled(boundaries, point)
            added = point.name == "ADD" and following.name not in _STORAGE_OPERATORS
            begin = boundaries[-1].index + 1 if boundaries else 0
            if not any(name in _WEIGHTED for name in self._names[begin : point.index + 1]):
                continue
            if narrow or added or first or following.name == "ADD":  # the input of a residual addition ends a block
                boundaries.append(point)
                stem = False
        return boundaries

    def _cut_points(self) -> list[_CutPoint]:
        """All positions where a single activation is live, in order: from the last use of each tensor."""
        operators = self._graph.operators
        last: dict[int, int] = {}
        for index, operator in enumerate(operators):
            for tensor in operator.inputs:
                last[int(tensor)] = index
        last[int(self._graph.outputs[0])] = len(operators)
        live = {int(self._graph.inputs[0])}
        points = []
        for index, operator in enumerate(operators):
            live |= {int(tensor) for tensor in operator.outputs}
            live = {tensor for tensor in live if last.get(tensor, -1) > index}
            if len(live) == 1 and live == {int(tensor) for tensor in operator.outputs}:
                tensor = next(iter(live))
                points.append(_CutPoint(index, self._names[index], tensor, prod(self._shape(tensor))))
        return points

    def _is_downsampled(self, boundaries: Sequence[_CutPoint], point: _CutPoint) -> bool:
        """Whether an ordinary convolution between the last boundary and `point` reduced the resolution."""
        begin = boundaries[-1].index + 1 if boundaries else 0
        for index in range(begin, point.index + 1):
            operator = self._graph.operators[index]
            before, after = self._shape(int(operator.inputs[0])), self._shape(int(operator.outputs[0]))
            if self._names[index] == "CONV_2D" and after[1:3] < before[1:3] and min(after[1:3]) > 1:
                return True
        return False

    def _shape(self, tensor: int) -> tuple[int, ...]:
        shape = self._graph.tensors[tensor].shape
        return () if shape is None else tuple(int(side) for side in shape)


def _limit_blocks(boundaries: Sequence[int], end: int) -> list[int]:
    """At most `MAX_BLOCKS` block ends, evenly selected; the last is the end of the model."""
    inner = [boundary for boundary in boundaries if boundary < end]
    if len(inner) >= MAX_BLOCKS:
        step = len(inner) / (MAX_BLOCKS - 1)
        inner = [inner[int(number * step)] for number in range(MAX_BLOCKS - 1)]
    return [*inner, end]
