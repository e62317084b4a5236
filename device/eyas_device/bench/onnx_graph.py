"""Tensor shapes of an `.onnx` file, for operators that ONNX Runtime has fused or converted to another layout.

The optimised graph that a profile describes depends on the processor: on x86, blocked layouts (NCHWc) pad channels to a
multiple of 8 with AVX2 and of 16 with AVX-512. So shapes are taken from one run of the graph without optimisation.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from eyas_device.bench.result import BenchError

Shapes = tuple[tuple[int, ...], ...]

_GRAPH, _NODE = 7, 1
"""Field numbers of onnx.proto: ModelProto.graph, GraphProto.node; those of NodeProto follow."""
_INPUT, _OUTPUT, _NAME, _OP_TYPE = 1, 2, 3, 4
_BLOCKED = "_nchwc"
_GENERATED = re.compile(rf"(_token_\d+)?({_BLOCKED})?(_token_\d+)?$")
"""Suffixes of the names of operators that ONNX Runtime replaces."""


class Ports(NamedTuple):
    """Shapes of an operator's inputs and outputs."""

    inputs: Shapes
    outputs: Shapes


class Node(NamedTuple):
    """One operator of the file."""

    name: str
    kind: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


class OnnxGraph:
    """The operators of an `.onnx` and the shapes of their tensors."""

    def __init__(self, nodes: Sequence[Node], ports: dict[str, Ports]) -> None:
        """`ports` are the shapes by operator name, of a run without optimisation."""
        self._nodes = {node.name: node for node in nodes}
        self._producers = {tensor: node for node in nodes for tensor in node.outputs}
        self._ports = ports

    def ports(self, name: str, kind: str, profiled: Ports) -> Ports:
        """Shapes of the operator that a profile calls `name`; `profiled` for one that the file does not have.

        A blocked operator has the name of the last tensor that it computes: `relu_1_nchwc` of kind Conv has the
        inputs of the convolution and the output of the activation after it.
        """
        core = _GENERATED.sub("", name)
        last = self._nodes.get(name) or self._nodes.get(core) or self._producers.get(core)
        if last is None or last.name not in self._ports:
            return profiled
        first: Node | None = last
        if _BLOCKED in name.removeprefix(core):
            while first is not None and first.kind != kind:
                first = self._producers.get(first.inputs[0]) if first.inputs else None
        start = self._ports.get((first or last).name, self._ports[last.name])
        return Ports(start.inputs, self._ports[last.name].outputs)


def read_nodes(path: Path) -> list[Node]:
    """The operators of an `.onnx`, in order. Raises `BenchError` if the file is damaged.

    Does not need the onnx package, which devices do not have.
    """
    try:
        return [
            _node(node) for graph in _values(memoryview(path.read_bytes()), _GRAPH) for node in _values(graph, _NODE)
        ]
    except (IndexError, TypeError, ValueError) as error:
        raise BenchError(f"{path}: not an ONNX model ({error}); its blocks were not measured") from None


def _node(data: Any) -> Node:
    text: dict[int, list[str]] = {}
    for number, value in _fields(data):
        if number in (_INPUT, _OUTPUT, _NAME, _OP_TYPE):
            text.setdefault(number, []).append(bytes(value).decode())
    name, kind = (text.get(number, [""])[-1] for number in (_NAME, _OP_TYPE))
    return Node(name, kind, tuple(text.get(_INPUT, ())), tuple(text.get(_OUTPUT, ())))


def _values(data: Any, field: int) -> Iterator[Any]:
    return (value for number, value in _fields(data) if number == field)


def _fields(data: Any) -> Iterator[tuple[int, Any]]:
    """Number and value of each field of a protobuf message; the value of a nested one is its bytes."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        wire = key & 7
        if wire == 0:
            value, at = _varint(data, at)
            yield key >> 3, value
            continue
        if wire not in (1, 2, 5):
            raise ValueError(f"wire type {wire}")
        size, at = _varint(data, at) if wire == 2 else ({1: 8, 5: 4}[wire], at)
        if at + size > len(data):
            raise ValueError("truncated")
        yield key >> 3, data[at : at + size]
        at += size


def _varint(data: Any, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            return value, at
