"""Check by its structure whether TensorRT would accept a quantize-dequantize (Q/DQ) ONNX file.

*Not measured*: TensorRT was not run. The rules are from NVIDIA's documentation of TensorRT 10: "Explicit Quantization"
in the developer guide (int8, zero point 0, one scale per activation, one per output channel of a weight), the operator
table of its ONNX parser (opsets 9 to 20 in 10.0; the quantization axis exists since 13), and `DataType` in the API
(uint8 only as a network's input, to be cast before anything else).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, numpy_helper

from eyas_host.support.errors import CompileError

FIRST_OPSET, LAST_OPSET = 13, 20
_TRANSPARENT = frozenset({"MaxPool", "Reshape", "Transpose"})
"""Operations that TensorRT moves quantization across: they only select or move values."""

Constants = Mapping[str, npt.NDArray[Any]]
Producers = Mapping[str, Any]


class TensorRtFit(msgspec.Struct, frozen=True):
    """Counts of a file that passed."""

    opset: int
    activations: int
    """QuantizeLinear nodes."""
    weights: int
    """int8 weights with a scale per output channel."""
    float_convolutions: int


def check_tensorrt(path: Path, *, float_convolutions: int = 0) -> TensorRtFit:
    """Check the structure of an int8 .onnx file in which `float_convolutions` convolutions may have float weights.

    Raises `CompileError` that lists every violation with its node, or why the file cannot be read.
    """
    try:
        model: Any = onnx.load(path)
    except Exception as error:  # protobuf's errors have no base of their own
        raise CompileError(f"{path}: not an ONNX file ({str(error).splitlines()[0]})") from None
    graph = model.graph
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    producers = {name: node for node in graph.node for name in node.output}
    opset = max((entry.version for entry in model.opset_import if not entry.domain), default=0)
    problems = (
        [] if FIRST_OPSET <= opset <= LAST_OPSET else [f"opset {opset}, {FIRST_OPSET} to {LAST_OPSET} is allowed"]
    )
    problems += _input_problems(graph)
    activations = weights = floats = 0
    for node in graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            is_weight = node.input[0] in constants
            activations += node.op_type == "QuantizeLinear"
            weights += is_weight
            problems += [
                f"{node.output[0]}: {problem}" for problem in _pair_problems(node, constants, producers, is_weight)
            ]
        elif node.op_type == "Conv":
            floats += node.input[1] in constants
            if node.input[1] not in constants:
                problems += [f"{node.output[0]}: {problem}" for problem in _convolution_problems(node, producers)]
    if floats > float_convolutions:
        problems.append(f"{floats} convolutions have float weights, {float_convolutions} may")
    if not weights:
        problems.append("there is no int8 weight")
    if problems:
        raise CompileError(f"{path.name}: TensorRT would refuse it as int8: {'; '.join(problems)}")
    return TensorRtFit(opset, activations, weights, floats)


def _input_problems(graph: Any) -> Iterator[str]:
    for entry in graph.input:
        if entry.type.tensor_type.elem_type != TensorProto.UINT8:
            continue
        others = sorted({node.op_type for node in graph.node if entry.name in node.input and node.op_type != "Cast"})
        if others:
            yield f"input {entry.name} is uint8 and read by {', '.join(others)}; only Cast may"


def _pair_problems(node: Any, constants: Constants, producers: Producers, is_weight: bool) -> Iterator[str]:
    """Problems of a QuantizeLinear or DequantizeLinear node."""
    if len(node.input) > 2 and node.input[2]:
        zero = constants.get(node.input[2])
        if zero is None:
            yield "the zero point is not a constant"
        elif zero.dtype != np.int8:
            yield f"quantized to {zero.dtype}, int8 is needed"
        elif zero.any():
            yield f"zero point {int(zero.reshape(-1)[np.flatnonzero(zero)[0]])}, 0 is needed"
    elif node.op_type == "QuantizeLinear":
        yield "without a zero point it quantizes to uint8, int8 is needed"
    scale = constants.get(node.input[1])
    if scale is None:
        yield "the scale is not a constant"
    elif not (np.isfinite(scale).all() and (scale > 0).all()):
        yield "scales must be above 0"
    elif is_weight:
        yield from _weight_problems(node, constants[node.input[0]], scale)
    elif scale.size != 1:
        yield f"{scale.size} scales for an activation, 1 is needed"
    if node.op_type == "DequantizeLinear" and not is_weight:
        producer = producers.get(node.input[0])
        if producer is None or producer.op_type != "QuantizeLinear" or producer.input[1] != node.input[1]:
            yield "does not read a QuantizeLinear of the same scale"


def _weight_problems(node: Any, weight: npt.NDArray[Any], scale: npt.NDArray[Any]) -> Iterator[str]:
    axis = next((attribute.i for attribute in node.attribute if attribute.name == "axis"), 1)
    if weight.dtype != np.int8 or node.op_type != "DequantizeLinear":
        yield f"a weight of {weight.dtype} before {node.op_type}, int8 storage is needed"
    elif scale.ndim != 1 or axis != 0 or scale.size != weight.shape[0]:
        yield f"{scale.size} scales along axis {axis} for a weight {list(weight.shape)}, one per output is needed"


def _convolution_problems(node: Any, producers: Producers) -> Iterator[str]:
    """Inputs of a convolution that do not come from a DequantizeLinear."""
    producer: Callable[[str], Any] = producers.get
    source = producer(node.input[0])
    while source is not None and source.op_type in _TRANSPARENT:
        source = producer(source.input[0])
    for what, origin in (("input", source), ("weight", producer(node.input[1]))):
        if origin is None or origin.op_type != "DequantizeLinear":
            yield f"its {what} comes from {'nothing' if origin is None else origin.op_type}, not DequantizeLinear"
