"""Whether TensorRT would take a quantize-dequantize ONNX as it is, judged by the file alone.

*Not measured*: no TensorRT ran here. The rules are those of NVIDIA's documents for TensorRT 10: "Explicit Quantization"
in the developer guide (zero points 0, int8, one scale an activation, one an output channel of a weight), the operator
table of its ONNX parser (opsets 9 to 20 in 10.0; a quantization axis exists since 13), and `DataType` in the API (uint8
only as a network's input, to be cast before anything else).
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
_MOVES = frozenset({"MaxPool", "Reshape", "Transpose"})
"""Operations that TensorRT moves quantization across: they choose or move values."""

Constants = Mapping[str, npt.NDArray[Any]]
Makers = Mapping[str, Any]


class TensorRtFit(msgspec.Struct, frozen=True):
    """What was counted in a file that passed."""

    opset: int
    activations: int
    """QuantizeLinear nodes."""
    weights: int
    """Int8 weights with a scale for each output channel."""
    float_convolutions: int


def check_tensorrt(path: Path, *, float_convolutions: int = 0) -> TensorRtFit:
    """Check the structure of an int8 .onnx, of which `float_convolutions` may have a float weight.

    Raises `CompileError` that lists every violation with the node it is at, or says why the file cannot be read.
    """
    try:
        model: Any = onnx.load(path)
    except Exception as error:  # protobuf's errors have no base of their own
        raise CompileError(f"{path}: not an ONNX file ({str(error).splitlines()[0]})") from None
    graph = model.graph
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    makers = {name: node for node in graph.node for name in node.output}
    opset = max((entry.version for entry in model.opset_import if not entry.domain), default=0)
    faults = [] if FIRST_OPSET <= opset <= LAST_OPSET else [f"opset {opset}, {FIRST_OPSET} to {LAST_OPSET} is allowed"]
    faults += _input_faults(graph)
    activations = weights = floats = 0
    for node in graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            is_weight = node.input[0] in constants
            activations += node.op_type == "QuantizeLinear"
            weights += is_weight
            faults += [f"{node.output[0]}: {fault}" for fault in _pair_faults(node, constants, makers, is_weight)]
        elif node.op_type == "Conv":
            floats += node.input[1] in constants
            if node.input[1] not in constants:
                faults += [f"{node.output[0]}: {fault}" for fault in _convolution_faults(node, makers)]
    if floats > float_convolutions:
        faults.append(f"{floats} convolutions have float weights, {float_convolutions} may")
    if not weights:
        faults.append("there is no int8 weight")
    if faults:
        raise CompileError(f"{path.name}: TensorRT would not take it as int8: {'; '.join(faults)}")
    return TensorRtFit(opset, activations, weights, floats)


def _input_faults(graph: Any) -> Iterator[str]:
    for entry in graph.input:
        if entry.type.tensor_type.elem_type != TensorProto.UINT8:
            continue
        others = sorted({node.op_type for node in graph.node if entry.name in node.input and node.op_type != "Cast"})
        if others:
            yield f"input {entry.name} is uint8 and read by {', '.join(others)}; only Cast may"


def _pair_faults(node: Any, constants: Constants, makers: Makers, is_weight: bool) -> Iterator[str]:
    """What is wrong with a QuantizeLinear or DequantizeLinear."""
    if len(node.input) > 2 and node.input[2]:
        zero = constants.get(node.input[2])
        if zero is None:
            yield "the zero point is no constant"
        elif zero.dtype != np.int8:
            yield f"quantized to {zero.dtype}, int8 is needed"
        elif zero.any():
            yield f"zero point {int(zero.reshape(-1)[np.flatnonzero(zero)[0]])}, 0 is needed"
    elif node.op_type == "QuantizeLinear":
        yield "without a zero point it quantizes to uint8, int8 is needed"
    scale = constants.get(node.input[1])
    if scale is None:
        yield "the scale is no constant"
    elif not (np.isfinite(scale).all() and (scale > 0).all()):
        yield "scales must be above 0"
    elif is_weight:
        yield from _weight_faults(node, constants[node.input[0]], scale)
    elif scale.size != 1:
        yield f"{scale.size} scales for an activation, 1 is needed"
    if node.op_type == "DequantizeLinear" and not is_weight:
        maker = makers.get(node.input[0])
        if maker is None or maker.op_type != "QuantizeLinear" or maker.input[1] != node.input[1]:
            yield "reads no QuantizeLinear of the same scale"


def _weight_faults(node: Any, weight: npt.NDArray[Any], scale: npt.NDArray[Any]) -> Iterator[str]:
    axis = next((attribute.i for attribute in node.attribute if attribute.name == "axis"), 1)
    if weight.dtype != np.int8 or node.op_type != "DequantizeLinear":
        yield f"a weight of {weight.dtype} before {node.op_type}, stored int8 is needed"
    elif scale.ndim != 1 or axis != 0 or scale.size != weight.shape[0]:
        yield f"{scale.size} scales along axis {axis} for a weight {list(weight.shape)}, one an output is needed"


def _convolution_faults(node: Any, makers: Makers) -> Iterator[str]:
    """What a convolution reads that is not behind a DequantizeLinear."""
    maker: Callable[[str], Any] = makers.get
    source = maker(node.input[0])
    while source is not None and source.op_type in _MOVES:
        source = maker(source.input[0])
    for what, made_by in (("input", source), ("weight", maker(node.input[1]))):
        if made_by is None or made_by.op_type != "DequantizeLinear":
            yield f"its {what} is behind {'nothing' if made_by is None else made_by.op_type}, not DequantizeLinear"
