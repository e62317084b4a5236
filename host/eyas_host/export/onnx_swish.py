"""Hard-swish between two 8-bit quantizers as a product of two integers.

`x * relu6(x + 3) / 6` is the product of x and of a gate. On a grid on which -3 and 3 lie
(`quantizers.fit_hard_swishes`) the gate is x itself, limited to the integers of -3 and 3, on a grid shifted by 3: a
`Clip` of bytes, and a product for which ONNX Runtime has an integer kernel. Computed in float32 it takes four passes
over four times the bytes.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from onnx import helper

from eyas_host.export.onnx_graph import Graph

_LIMIT = 3
"""Hard-swish is 0 at and below -3, and the identity at and above 3."""
_TOLERANCE = 1 / 256
"""Steps by which the product may differ from hard-swish before rounding; float32 needs a few thousandths."""


def multiply_hard_swishes(graph: Graph) -> None:
    """Replace each hard-swish between two uint8 quantizers whose product of integers gives the same values."""
    for node in graph.nodes:
        source, target = graph.writer(node.input[0]) if node.input else None, graph.only_reader(node.output[0])
        if (
            node.op_type == "HardSwish"
            and source is not None
            and source.op_type == "DequantizeLinear"
            and target is not None
            and target.op_type == "QuantizeLinear"
        ):
            _multiply(graph, node, source, target)


def _multiply(graph: Graph, swish: Any, source: Any, target: Any) -> None:
    scale, zero, out_scale, out_zero = (
        graph.constant(name) for quantizer in (source, target) for name in quantizer.input[1:3]
    )
    steps = round(_LIMIT / float(scale))
    low, high = int(zero) - steps, int(zero) + steps
    if low < 0 or zero.dtype != np.uint8:
        return
    gate_scale = np.float32(scale / np.float32(2 * _LIMIT))
    ratio = np.float32(scale) * gate_scale / np.float32(out_scale)
    integers = np.arange(256)
    product = (integers - int(zero)) * (np.clip(integers, low, high) - low)
    found = product.astype(np.float32) * ratio + np.float32(out_zero)
    if np.abs(_limited(found) - _limited(_positions(scale, zero, out_scale, out_zero))).max() > _TOLERANCE:
        return
    name = swish.output[0]
    gate, nodes = source.input[0], []
    if low > 0 or high < 255:
        limits = [
            graph.add(f"{name}_{end}", np.array(max(min(value, 255), 0), np.uint8))
            for end, value in (("low", low), ("high", high))
        ]
        nodes.append(helper.make_node("Clip", [gate, *limits], [f"{name}_limited"], name=f"{name}_clip"))
        gate = f"{name}_limited"
    grid = [
        graph.add(f"{name}_gate_scale", np.array(gate_scale)),
        graph.add(f"{name}_gate_zero", np.array(low, np.uint8)),
    ]
    nodes += [
        helper.make_node("DequantizeLinear", [gate, *grid], [f"{name}_gate"], name=f"{name}_dequantize"),
        helper.make_node("Mul", [source.output[0], f"{name}_gate"], [name], name=f"{name}_product"),
    ]
    graph.place(nodes, before=swish)
    graph.remove(swish)


def _positions(scale: Any, zero: Any, out_scale: Any, out_zero: Any) -> npt.NDArray[np.float64]:
    """Hard-swish of the 256 integers on the target's grid, before rounding."""
    x = float(scale) * (np.arange(256) - int(zero))
    positions: npt.NDArray[np.float64] = x * np.clip(x + _LIMIT, 0, 2 * _LIMIT) / (2 * _LIMIT) / float(out_scale)
    return positions + int(out_zero)


def _limited(positions: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Positions within a step of the 256 integers: beyond them all are saturated alike."""
    limited: npt.NDArray[Any] = np.clip(positions, -1, 256)
    return limited
