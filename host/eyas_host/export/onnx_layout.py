"""Shapes that ONNX Runtime's fast integer kernels accept, with the same values.

- Pixels whose quantizer gives each byte itself are read as they are, without float32 between.
- The first convolution reads four pixels of a row as one with twelve channels: the fast kernels take channels by four,
  and three of them would be copied into a matrix of patches first. Both reshapes around it only rename bytes.
- Depthwise convolutions need channels by sixteen; others are filled up with weights of zero, so that the additional
  channels are zero on every image.
- A copy of a pooled vector in its own order is left out.

Constants that are stored in another shape have their original one as a note, for `original_weights`.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
from onnx import helper, numpy_helper

from eyas_host.export.onnx_graph import Array, Graph, attributes, set_attributes
from eyas_host.support.errors import CompileError

PIXELS = "pixels"
_TO_NCHW, _TO_NHWC = [0, 3, 1, 2], [0, 2, 3, 1]
_BLOCK = 4
"""Pixels of a row that the first convolution reads as one."""
_STRIDE = 2
_ALIGNED = 16
_SAME_CHANNELS = frozenset(
    {"QuantizeLinear", "DequantizeLinear", "Clip", "Mul", "Add", "Relu", "HardSwish", "GlobalAveragePool"}
)
"""Operators whose output has the channels of their input."""


def read_bytes(graph: Graph) -> None:
    """Leave the conversion of pixels out where its quantizer gives each byte itself."""
    chain: list[Any] = []
    value = PIXELS
    while not chain or chain[-1].op_type != "QuantizeLinear":
        node = graph.only_reader(value)
        if node is None or node.op_type not in ("Cast", "Transpose", "Sub", "QuantizeLinear"):
            return
        chain.append(node)
        value = node.output[0]
    scale, zero = (graph.constant(name) for name in chain[-1].input[1:3])
    channels = graph.inputs[PIXELS][-1]
    every = np.broadcast_to(np.arange(256, dtype=np.float32)[:, None, None, None], (256, channels, 1, 1))
    values: Array = every.copy()
    for node in chain:
        if node.op_type == "Sub":
            values = values - graph.constant(node.input[1])
    transposes = [attributes(node)["perm"] for node in chain if node.op_type == "Transpose"]
    if transposes != [_TO_NCHW] or zero.dtype != np.uint8 or values.shape != every.shape:
        return
    if (np.clip(np.rint(values / scale) + zero, 0, 255) == every).all():
        turn = helper.make_node("Transpose", [PIXELS], [value], perm=_TO_NCHW, name=f"{value}_bytes")
        graph.place([turn], before=chain[0])
        graph.remove(*chain)


def widen_stem(graph: Graph) -> None:
    """Let the first convolution read several pixels of a row at once, if it has three by three taps in steps of two."""
    stem = next((node for node in graph.nodes if node.op_type == "Conv"), None)
    if stem is None or PIXELS not in graph.inputs:
        return
    source, weight = graph.writer(stem.input[0]), graph.writer(stem.input[1])
    target = graph.only_reader(stem.output[0])
    rows, columns = graph.inputs[PIXELS][1:3]
    if (
        source is None
        or source.op_type != "DequantizeLinear"
        or weight is None
        or weight.op_type != "DequantizeLinear"
        or target is None
        or target.op_type != "QuantizeLinear"
        or len(graph.readers(source.output[0])) != 1
        or graph.constant(weight.input[0]).shape[1:] != (3, 3, 3)
        or not _steps_by_two(stem)
        or rows % _STRIDE
        or columns % _BLOCK
    ):
        return
    integers = graph.constant(weight.input[0])
    name, together = weight.input[0], _BLOCK // _STRIDE
    weight.input[0] = graph.add(f"{name}_wide", _wide(integers))
    graph.note(weight.input[0], json.dumps({"pixels": _BLOCK, "shape": integers.shape}))
    for position in (1, 2):
        weight.input[position] = _tiled(graph, weight.input[position], together)
    if len(stem.input) > 2:
        stem.input[2] = _tiled(graph, stem.input[2], together)
    set_attributes(stem, pads=[1, 1, 0, 0], strides=[_STRIDE, 1], kernel_shape=[3, 2])
    bytes_in, bytes_out = source.input[0], target.output[0]
    source.input[0], target.output[0] = f"{bytes_in}_wide", f"{bytes_out}_wide"
    wide = [1, rows, columns // _BLOCK, _BLOCK * integers.shape[1]]
    graph.place(_reshaped(graph, bytes_in, f"{bytes_in}_wide", wide), before=source)
    narrow = [1, rows // _STRIDE, columns // _STRIDE, len(integers)]
    following = graph.nodes[graph.nodes.index(target) + 1]
    graph.place(_reshaped(graph, f"{bytes_out}_wide", bytes_out, narrow), before=following)


def fill_depthwise(graph: Graph) -> None:
    """Give depthwise convolutions channels by sixteen."""
    group = _Channels(graph)
    convolutions = [node for node in graph.nodes if node.op_type == "Conv"]
    for node in convolutions:
        weight = graph.writer(node.input[1])
        if weight is None or weight.op_type != "DequantizeLinear":
            continue
        added_in, added_out = group.added(node.input[0]), group.added(node.output[0])
        if not added_in and not added_out:
            continue
        integers = graph.constant(weight.input[0])
        groups = int(attributes(node).get("group", 1))
        if groups > 1:
            set_attributes(node, group=groups + added_out)
            added_in = 0
        filled = np.pad(integers, ((0, added_out), (0, added_in), (0, 0), (0, 0)))
        weight.input[0] = graph.add(f"{weight.input[0]}_filled", filled)
        graph.note(weight.input[0], json.dumps({"shape": integers.shape}))
        if added_out:
            for position, fill in ((1, 1), (2, 0)):
                weight.input[position] = _filled(graph, weight.input[position], added_out, fill)
            if len(node.input) > 2:
                node.input[2] = _filled(graph, node.input[2], added_out, 0)


def drop_copies(graph: Graph) -> None:
    """Leave out a reshape to a vector and a gather that brings all of it back in the same order and shape."""
    for gather in [node for node in graph.nodes if node.op_type == "Gather"]:
        reshape = graph.writer(gather.input[0])
        if reshape is None or reshape.op_type != "Reshape" or not graph.is_constant(gather.input[1]):
            continue
        pool = graph.writer(reshape.input[0])
        order = graph.constant(gather.input[1])
        whole = order.ndim == 4 and order.shape[2:] == (1, 1) and (order.ravel() == np.arange(order.size)).all()
        if whole and len(order) == 1 and pool is not None and pool.op_type == "GlobalAveragePool":
            graph.bypass(gather, reshape.input[0])


def original_weights(tensor: Any) -> Array:
    """The weights of a stored constant without what was added to its shape.

    Raises `CompileError` if what was added is not zero, or not the same weights.
    """
    values: Array = numpy_helper.to_array(tensor)
    if not tensor.doc_string:
        return values
    note = json.loads(tensor.doc_string)
    filters, channels = note["shape"][:2]
    if "pixels" in note:
        blocks = values[:filters].transpose(0, 3, 1, 2).reshape(filters, 2 * note["pixels"], channels, -1)
        first = note["pixels"] - 1
        original = np.ascontiguousarray(blocks[:, first : first + 3].transpose(0, 2, 3, 1))
        stored = _wide(original)
    else:
        original = values[:filters, :channels]
        added = [(0, have - want) for have, want in zip(values.shape, original.shape, strict=True)]
        stored = np.pad(original, added)
    if not np.array_equal(stored, values):
        raise CompileError(f"{tensor.name}: the weights were not only moved and filled up")
    return original


class _Channels:
    """Values that have the same channels, and how many are added to each."""

    def __init__(self, graph: Graph) -> None:
        self._parents: dict[str, str] = {}
        depthwise: set[str] = set()
        fixed: set[str] = set()
        widths: dict[str, int] = {}
        for node in graph.nodes:
            read = [name for name in node.input if not graph.is_constant(name)]
            if node.op_type == "Conv":
                weight = graph.writer(node.input[1])
                stored = weight is not None and weight.op_type == "DequantizeLinear"
                if not stored or weight is None:
                    fixed |= {node.input[0], node.output[0]}
                    continue
                filters, channels = graph.constant(weight.input[0]).shape[:2]
                groups = int(attributes(node).get("group", 1))
                widths |= {node.output[0]: filters, node.input[0]: channels * groups}
                if groups == 1:
                    continue
                self._join(node.input[0], node.output[0])
                (depthwise if (filters, channels) == (groups, 1) else fixed).add(node.output[0])
            elif node.op_type in _SAME_CHANNELS and not _by_channel(graph, node):
                for name in read:
                    self._join(name, node.output[0])
            elif read:
                fixed |= {*read, *node.output}
        roots = {self._root(name) for name in depthwise} - {self._root(name) for name in fixed}
        by_root = {self._root(name): width for name, width in widths.items()}
        self._added: dict[str, int] = {root: -by_root[root] % _ALIGNED for root in roots}

    def added(self, name: str) -> int:
        """The number of channels that are added to a value."""
        return self._added.get(self._root(name), 0)

    def _join(self, one: str, other: str) -> None:
        self._parents[self._root(one)] = self._root(other)

    def _root(self, name: str) -> str:
        while (parent := self._parents.get(name, name)) != name:
            name = parent
        return name


def _by_channel(graph: Graph, node: Any) -> bool:
    """Whether a node reads a constant with a value for each channel, or is the quantizer of such a constant."""
    constants = [graph.constant(name) for name in node.input if graph.is_constant(name)]
    return any(values.size > 1 for values in constants)


def _steps_by_two(node: Any) -> bool:
    found = attributes(node)
    return (
        found.get("strides") == [_STRIDE, _STRIDE]
        and found.get("pads") == [1, 1, 1, 1]
        and found.get("group", 1) == 1
        and found.get("dilations", [1, 1]) == [1, 1]
    )


def _wide(weights: Array) -> Array:
    """Filters [n, c, 3, 3] over pixels -> [2 n, 4 c, 3, 2] over blocks of four pixels.

    Each block gives two results, of the pixels -1..1 and 1..3 from its first one: -1 is the last of the block before.
    """
    filters, channels, high, taps = weights.shape
    together = _BLOCK // _STRIDE
    wide = np.zeros((together, filters, 2 * _BLOCK, channels, high), weights.dtype)
    for result in range(together):
        first = _BLOCK + _STRIDE * result - 1
        wide[result, :, first : first + taps] = weights.transpose(0, 3, 1, 2)
    blocks = wide.reshape(together * filters, 2, _BLOCK * channels, high)
    return np.ascontiguousarray(blocks.transpose(0, 2, 3, 1))


def _tiled(graph: Graph, name: str, times: int) -> str:
    return graph.add(f"{name}_wide", np.tile(graph.constant(name), times))


def _filled(graph: Graph, name: str, added: int, fill: int) -> str:
    return graph.add(f"{name}_filled_{added}", np.pad(graph.constant(name), (0, added), constant_values=fill))


def _reshaped(graph: Graph, source: str, target: str, shape: list[int]) -> list[Any]:
    """Nodes that reshape an NCHW value in NHWC order."""
    size = graph.add(f"{target}_shape", np.array(shape))
    return [
        helper.make_node("Transpose", [source], [f"{target}_rows"], perm=_TO_NHWC, name=f"{target}_to_rows"),
        helper.make_node("Reshape", [f"{target}_rows", size], [f"{target}_reshaped"], name=f"{target}_reshape"),
        helper.make_node("Transpose", [f"{target}_reshaped"], [target], perm=_TO_NCHW, name=f"{target}_from_rows"),
    ]
