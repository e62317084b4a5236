"""Rewrite a Q/DQ graph so that ONNX Runtime's CPU kernels compute it with integers.

ONNX Runtime looks for patterns of operators and quantize-dequantize pairs. What the exporter writes misses them in
some places, and each miss costs a round trip through float32, mostly with transposes around it:

- int8 activations of which two operators read one: only uint8 activations are matched everywhere;
- a mean over height and width, where `GlobalAveragePool` has an integer kernel;
- a hard-sigmoid between a convolution and its quantizer. It is linear between two limits: scale and offset go into the
  convolution's weights and bias, and the quantizer's own limits, or a `Clip` of the integers, replace the others;
- a hard-swish between two quantizers (`onnx_swish`);
- shapes that the fast kernels do not take (`onnx_layout`).

None of it changes a value by more than the rounding of a sum in another order.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from onnx import helper

from eyas_host.export.onnx_graph import Graph, attributes
from eyas_host.export.onnx_layout import drop_copies, fill_depthwise, read_bytes, widen_stem
from eyas_host.export.onnx_swish import multiply_hard_swishes

_SIGNED_TO_UNSIGNED = 128
_SPATIAL = [2, 3]
_HARD_SIGMOID = {"alpha": 0.2, "beta": 0.5}
"""ONNX's defaults of its attributes."""


def use_integers(model: Any) -> None:
    """Rewrite the graph of an ONNX model with int8 weights in place.

    Activations that are all symmetric (zero point 0) stay int8, and shapes as they are: TensorRT takes no others.
    """
    graph = Graph(model.graph)
    _pool_by_average(graph)
    activations = [
        node
        for node in graph.nodes
        if node.op_type in ("QuantizeLinear", "DequantizeLinear") and not graph.is_constant(node.input[0])
    ]
    if any(graph.constant(node.input[2]).any() for node in activations):
        for node in activations:
            zero = graph.constant(node.input[2]).astype(np.int16) + _SIGNED_TO_UNSIGNED
            node.input[2] = graph.add(f"{node.input[2]}_uint8", zero.astype(np.uint8))
        _absorb_hard_sigmoids(graph)
        multiply_hard_swishes(graph)
        drop_copies(graph)
        read_bytes(graph)
        widen_stem(graph)
        fill_depthwise(graph)
    graph.remove_unused()


def _pool_by_average(graph: Graph) -> None:
    """Write means over height and width as average pooling."""
    for node in graph.nodes:
        if node.op_type != "ReduceMean" or len(node.input) != 2:
            continue
        axes = sorted(int(axis) % 4 for axis in graph.constant(node.input[1]))
        if axes == _SPATIAL and attributes(node).get("keepdims", 1):
            node.op_type = "GlobalAveragePool"
            del node.input[1:]
            del node.attribute[:]


def _absorb_hard_sigmoids(graph: Graph) -> None:
    """Put each hard-sigmoid between a convolution and a quantizer into both."""
    for node in graph.nodes:
        if node.op_type != "HardSigmoid":
            continue
        convolution, quantizer = graph.writer(node.input[0]), graph.only_reader(node.output[0])
        if (
            convolution is not None
            and convolution.op_type == "Conv"
            and graph.only_reader(convolution.output[0]) is not None
            and quantizer is not None
            and quantizer.op_type == "QuantizeLinear"
        ):
            _absorb(graph, node, convolution, quantizer)


def _absorb(graph: Graph, sigmoid: Any, convolution: Any, quantizer: Any) -> None:
    found = {**_HARD_SIGMOID, **attributes(sigmoid)}
    alpha, beta = np.float32(found["alpha"]), np.float32(found["beta"])
    weight = graph.writer(convolution.input[1])
    assert weight is not None
    scale = graph.constant(weight.input[1]) * alpha
    bias = np.full(graph.constant(weight.input[0]).shape[0], beta, dtype=np.float32)
    if len(convolution.input) > 2:
        bias += graph.constant(convolution.input[2]) * alpha
    name = convolution.output[0]
    weight.input[1] = graph.add(f"{name}_scale", scale.astype(np.float32))
    del convolution.input[2:]
    convolution.input.append(graph.add(f"{name}_bias", bias))
    quantizer.input[0] = name
    graph.remove(sigmoid)
    _clip(graph, quantizer)


def _clip(graph: Graph, quantizer: Any) -> None:
    """Limit a quantizer's integers to those of 0 and 1, where it has others."""
    scale, zero = float(graph.constant(quantizer.input[1])), int(graph.constant(quantizer.input[2]))
    low, high = zero, round(1 / scale) + zero
    if low <= 0 and high >= 255:
        return
    name = quantizer.output[0]
    limits = [
        graph.add(f"{name}_{end}", np.array(value, np.uint8)) for end, value in (("low", low), ("high", min(high, 255)))
    ]
    quantizer.output[0] = f"{name}_unlimited"
    clip = helper.make_node("Clip", [quantizer.output[0], *limits], [name], name=f"{name}_clip")
    following = graph.nodes[graph.nodes.index(quantizer) + 1]
    graph.place([clip], before=following)
