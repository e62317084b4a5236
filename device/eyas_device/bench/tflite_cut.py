"""Cutting a `.tflite` after its blocks: each prefix is a model of its own, whose last tensor is the answer.

A place is a boundary only if a single activation crosses it, so that a prefix does no work that the whole would not do
there: after a residual addition, after the narrow end of a bottleneck, after the first convolution that shrinks the
image, before the classifier.
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

MOST_BLOCKS = 20
_MALFORMED = (AttributeError, IndexError, KeyError, OSError, OverflowError, TypeError, ValueError, struct.error)
_QUIET = ("DEQUANTIZE", "QUANTIZE")
"""Operators that only change how numbers are stored: they belong to the block before them."""
_WEIGHTED = ("CONV_2D", "DEPTHWISE_CONV_2D", "TRANSPOSE_CONV", "FULLY_CONNECTED")
"""A block has at least one of them."""


@dataclass(frozen=True)
class Part:
    """The operators of one block, and what goes in and out."""

    operators: tuple[str, ...]
    inputs: tuple[int, ...]
    """Shape of the tensor that crosses into it."""
    outputs: tuple[int, ...]
    end: int
    """Number of the first operator behind it."""


@dataclass(frozen=True)
class _Place:
    """Behind an operator, where one activation alone goes on."""

    index: int
    """Of the operator."""
    name: str
    tensor: int
    elements: int


class Graph:
    """A `.tflite` with one graph, cut into parts."""

    def __init__(self, path: Path) -> None:
        """Raises `BenchError` if the model cannot be cut, saying why."""
        self._path = path
        try:
            from ai_edge_litert import schema_py_generated as schema
        except ImportError as error:
            raise BenchError(
                f"{path.name}: the blocks of a .tflite need LiteRT's schema ({error}): pip install eyas-device"
            ) from None
        kinds = {number: name for name, number in vars(schema.BuiltinOperator).items() if isinstance(number, int)}
        try:
            self._model: Any = schema.ModelT.InitFromPackedBuf(path.read_bytes(), 0)
            if len(self._model.subgraphs) != 1:
                raise BenchError(f"{path.name}: {len(self._model.subgraphs)} graphs; only a model of one can be cut")
            self._graph: Any = self._model.subgraphs[0]
            codes = [max(code.builtinCode, code.deprecatedBuiltinCode) for code in self._model.operatorCodes]
            self._names = [kinds.get(codes[op.opcodeIndex], "unknown") for op in self._graph.operators]
            if len(self._graph.inputs) != 1 or len(self._graph.outputs) != 1:
                raise BenchError(f"{path.name}: only a model with one input and one output can be cut")
            self.parts = self._parts()
        except BenchError:
            raise
        except _MALFORMED as error:
            raise BenchError(f"{path.name}: cannot be cut: not a model of the known kind ({error})") from None

    def prefix(self, part: Part) -> bytes:
        """A model that ends where `part` ends; the last part's is the whole model, packed again."""
        import flatbuffers

        kept = self._graph.operators[: part.end]
        graph, model = copy(self._graph), copy(self._model)
        graph.operators, graph.outputs = kept, [int(kept[-1].outputs[0])]
        model.subgraphs, model.signatureDefs = [graph], None
        # Weights of what was cut off would take memory in each prefix.
        used = {graph.tensors[tensor].buffer for operator in kept for tensor in operator.inputs if tensor >= 0}
        empty = type(model.buffers[0])()
        model.buffers = [buffer if number in used else empty for number, buffer in enumerate(model.buffers)]
        builder = flatbuffers.Builder(1 << 20)
        builder.Finish(model.Pack(builder), b"TFL3")
        return bytes(builder.Output())

    def _parts(self) -> tuple[Part, ...]:
        ends = _thinned([place.index + 1 for place in self._boundaries()], len(self._names))
        parts, begin = [], 0
        source = int(self._graph.inputs[0])
        for end in ends:
            tensor = int(self._graph.operators[end - 1].outputs[0])
            parts.append(Part(tuple(self._names[begin:end]), self._shape(source), self._shape(tensor), end))
            begin, source = end, tensor
        return tuple(parts)

    def _boundaries(self) -> list[_Place]:
        """The places that end a block, without the end of the model."""
        places = [place for place in self._places() if place.name not in ("PAD", "PADV2", "MIRROR_PAD")]
        chosen: list[_Place] = []
        stem = True
        for number, place in enumerate(places[:-1]):
            following = places[number + 1]
            before = places[number - 1].elements if number else place.elements
            narrow = place.elements <= before and place.elements < following.elements
            first = stem and place.elements > following.elements and self._shrank(chosen, place)
            added = place.name == "ADD" and following.name not in _QUIET
            begin = chosen[-1].index + 1 if chosen else 0
            if not any(name in _WEIGHTED for name in self._names[begin : place.index + 1]):
                continue
            if narrow or added or first or following.name == "ADD":  # what an addition will need again is a block's end
                chosen.append(place)
                stem = False
        return chosen

    def _places(self) -> list[_Place]:
        """Where a single activation crosses, in order: computed by when each tensor is used last."""
        operators = self._graph.operators
        last: dict[int, int] = {}
        for index, operator in enumerate(operators):
            for tensor in operator.inputs:
                last[int(tensor)] = index
        last[int(self._graph.outputs[0])] = len(operators)
        live = {int(self._graph.inputs[0])}
        places = []
        for index, operator in enumerate(operators):
            live |= {int(tensor) for tensor in operator.outputs}
            live = {tensor for tensor in live if last.get(tensor, -1) > index}
            if len(live) == 1 and live == {int(tensor) for tensor in operator.outputs}:
                tensor = next(iter(live))
                places.append(_Place(index, self._names[index], tensor, prod(self._shape(tensor))))
        return places

    def _shrank(self, chosen: Sequence[_Place], place: _Place) -> bool:
        """Whether an ordinary convolution between the last boundary and `place` made the image smaller."""
        begin = chosen[-1].index + 1 if chosen else 0
        for index in range(begin, place.index + 1):
            operator = self._graph.operators[index]
            before, after = self._shape(int(operator.inputs[0])), self._shape(int(operator.outputs[0]))
            if self._names[index] == "CONV_2D" and after[1:3] < before[1:3] and min(after[1:3]) > 1:
                return True
        return False

    def _shape(self, tensor: int) -> tuple[int, ...]:
        shape = self._graph.tensors[tensor].shape
        return () if shape is None else tuple(int(side) for side in shape)


def _thinned(boundaries: Sequence[int], end: int) -> list[int]:
    """At most `MOST_BLOCKS` ends, evenly chosen; the last is the model's."""
    inner = [boundary for boundary in boundaries if boundary < end]
    if len(inner) >= MOST_BLOCKS:
        step = len(inner) / (MOST_BLOCKS - 1)
        inner = [inner[int(number * step)] for number in range(MOST_BLOCKS - 1)]
    return [*inner, end]
