"""Rewrite a Q/DQ graph so that ONNX Runtime's CPU kernels compute all of its convolutions with integers.

ONNX Runtime looks for patterns of operators and quantize-dequantize pairs. What the exporter writes misses them in
three places, and each miss costs a round trip through float32, mostly with transposes around it:

- int8 activations of which two operators read one: only uint8 activations are matched everywhere;
- a mean over height and width, where `GlobalAveragePool` has an integer kernel;
- a hard-sigmoid between a convolution and its quantizer. It is linear between two limits: scale and offset go into the
  convolution's weights and bias, and the quantizer's own limits, or a `Clip` of the integers, replace the others.

None of it changes a value by more than the rounding of a sum in another order. What stays in float32 is hard-swish:
ONNX Runtime has no integer kernel for it.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import numpy as np
import numpy.typing as npt
from onnx import helper, numpy_helper

_SIGNED_TO_UNSIGNED = 128
_SPATIAL = [2, 3]
_HARD_SIGMOID = {"alpha": 0.2, "beta": 0.5}
"""ONNX's defaults of its attributes."""


def use_integers(model: Any) -> None:
    """Rewrite the graph of an ONNX model with int8 weights in place.

    Activations that are all symmetric (zero point 0) stay int8: TensorRT takes no others.
    """
    graph = _Graph(model.graph)
    graph.pool_by_average()
    if not graph.symmetric:
        graph.use_unsigned_activations()
        graph.absorb_hard_sigmoids()
    graph.remove_unused()


class _Graph:
    """A graph with its constants, and who writes and reads each value."""

    def __init__(self, graph: Any) -> None:
        self._graph = graph
        self._constants = {tensor.name: tensor for tensor in graph.initializer}
        self._writers = {name: node for node in graph.node for name in node.output}
        self._readers: dict[str, list[Any]] = defaultdict(list)
        for node in graph.node:
            for name in node.input:
                self._readers[name].append(node)
        self._activations = [
            node
            for node in graph.node
            if node.op_type in ("QuantizeLinear", "DequantizeLinear") and node.input[0] not in self._constants
        ]

    @property
    def symmetric(self) -> bool:
        """Whether no activation has a zero point."""
        return not any(self._constant(node.input[2]).any() for node in self._activations)

    def use_unsigned_activations(self) -> None:
        """Shift activations from int8 to uint8: the values that the integers stand for stay the same."""
        for node in self._activations:
            zero = self._constant(node.input[2]).astype(np.int16) + _SIGNED_TO_UNSIGNED
            node.input[2] = self._add(f"{node.input[2]}_uint8", zero.astype(np.uint8))

    def pool_by_average(self) -> None:
        """Write means over height and width as average pooling."""
        for node in self._graph.node:
            if node.op_type != "ReduceMean" or len(node.input) != 2:
                continue
            axes = sorted(int(axis) % 4 for axis in self._constant(node.input[1]))
            if axes == _SPATIAL and _attributes(node).get("keepdims", 1):
                node.op_type = "GlobalAveragePool"
                del node.input[1:]
                del node.attribute[:]

    def absorb_hard_sigmoids(self) -> None:
        """Put each hard-sigmoid between a convolution and a quantizer into both."""
        for node in list(self._graph.node):
            convolution, quantizer = self._writers.get(node.input[0]), self._only_reader(node.output[0])
            if (
                node.op_type == "HardSigmoid"
                and convolution is not None
                and convolution.op_type == "Conv"
                and self._only_reader(convolution.output[0]) is node
                and quantizer is not None
                and quantizer.op_type == "QuantizeLinear"
            ):
                self._absorb(node, convolution, quantizer)

    def _absorb(self, sigmoid: Any, convolution: Any, quantizer: Any) -> None:
        found = {**_HARD_SIGMOID, **_attributes(sigmoid)}
        alpha, beta = np.float32(found["alpha"]), np.float32(found["beta"])
        weight = self._writers[convolution.input[1]]
        scale = self._constant(weight.input[1]) * alpha
        channels = self._constant(weight.input[0]).shape[0]
        bias = np.full(channels, beta, dtype=np.float32)
        if len(convolution.input) > 2:
            bias += self._constant(convolution.input[2]) * alpha
        name = convolution.output[0]
        weight.input[1] = self._add(f"{name}_scale", scale.astype(np.float32))
        del convolution.input[2:]
        convolution.input.append(self._add(f"{name}_bias", bias))
        quantizer.input[0] = name
        self._graph.node.remove(sigmoid)
        self._clip(quantizer)

    def _clip(self, quantizer: Any) -> None:
        """Limit a quantizer's integers to those of 0 and 1, where it has others."""
        scale, zero = float(self._constant(quantizer.input[1])), int(self._constant(quantizer.input[2]))
        low, high = zero, round(1 / scale) + zero
        if low <= 0 and high >= 255:
            return
        name = quantizer.output[0]
        limits = [
            self._add(f"{name}_{end}", np.array(value, np.uint8))
            for end, value in (("low", low), ("high", min(high, 255)))
        ]
        quantizer.output[0] = f"{name}_unlimited"
        clip = helper.make_node("Clip", [quantizer.output[0], *limits], [name], name=f"{name}_clip")
        nodes = list(self._graph.node)
        self._graph.node.insert(nodes.index(quantizer) + 1, clip)

    def remove_unused(self) -> None:
        """Remove the constants that nothing reads any more."""
        used = {name for node in self._graph.node for name in node.input}
        for tensor in [tensor for tensor in self._graph.initializer if tensor.name not in used]:
            self._graph.initializer.remove(tensor)

    def _only_reader(self, name: str) -> Any | None:
        readers = self._readers[name]
        return readers[0] if len(readers) == 1 else None

    def _constant(self, name: str) -> npt.NDArray[Any]:
        values: npt.NDArray[Any] = numpy_helper.to_array(self._constants[name])
        return values

    def _add(self, name: str, values: npt.NDArray[Any]) -> str:
        """Add a constant, unless it is there, and return its name."""
        if name not in self._constants:
            self._constants[name] = numpy_helper.from_array(values, name)
            self._graph.initializer.append(self._constants[name])
        return name


def _attributes(node: Any) -> dict[str, Any]:
    return {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
