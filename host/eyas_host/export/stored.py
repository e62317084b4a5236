"""Read the integer weights back from a compiled artefact, and compare them with the QAT model's."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import openvino as ov
from ai_edge_litert.schema_py_generated import TensorType
from ai_edge_quantizer.utils import tfl_flatbuffer_utils
from onnx import TensorProto
from torch import nn

from eyas_device.bundle import RuntimeName
from eyas_host.export.litert_ranges import CONVOLUTIONS, kind_of
from eyas_host.export.onnx_layout import original_weights
from eyas_host.quant.graph import layer_name
from eyas_host.quant.integers import weight_integers
from eyas_host.quant.quantizers import affine, weight_quantizers
from eyas_host.support.errors import CompileError

Integers = npt.NDArray[np.int8]


def stored_integers(runtime: RuntimeName, path: Path) -> dict[str, Integers]:
    """Name of the constant -> the int8 weights of each convolution in an artefact, in its runtime's layout."""
    read = {"litert": _in_tflite, "openvino": _in_openvino, "onnx": _in_onnx}[runtime]
    return dict(read(path))


def check_stored(runtime: RuntimeName, path: Path, qat_model: nn.Module) -> None:
    """Check that an artefact stores exactly the integers of the QAT model, none beyond the ends of its grid.

    Layouts differ, so that the values of a layer are compared in ascending order.

    Raises:
        CompileError: a weight lies beyond the grid, or a layer has other integers; the message names it.

    """
    stored = stored_integers(runtime, path)
    high = max((affine(quantizer).high for quantizer in weight_quantizers(qat_model).values()), default=127)
    beyond = {
        name: int(np.abs(values.astype(np.int16)).max())
        for name, values in stored.items()
        if np.abs(values.astype(np.int16)).max() > high
    }
    if beyond:
        name, largest = max(beyond.items(), key=lambda entry: entry[1])
        raise CompileError(
            f"{path.name}: weights of {len(beyond)} layers lie beyond -{high}..{high}, the largest is {largest} "
            f"({name}); [quantize] weight_bits is {high.bit_length() + 1}"
        )
    expected = {
        layer_name(operation): _ascending(values.numpy().astype(np.int8))
        for operation, values in weight_integers(qat_model).items()
    }
    left = Counter(_ascending(values) for values in stored.values())
    wrong = []
    for name, values in expected.items():
        if left[values]:
            left[values] -= 1
        else:
            wrong.append(name)
    if wrong or len(stored) != len(expected):
        raise CompileError(
            f"{path.name}: {len(stored)} layers with int8 weights, the QAT model has {len(expected)}; "
            f"other integers than learned: {', '.join(wrong[:3]) or 'none'}"
        )


def _ascending(values: Integers) -> bytes:
    return np.sort(values, axis=None).tobytes()


def _in_tflite(path: Path) -> Iterator[tuple[str, Integers]]:
    model: Any = tfl_flatbuffer_utils.read_model(path.read_bytes())
    graph = model.subgraphs[0]
    for number, operator in enumerate(graph.operators):
        if kind_of(model, operator) in CONVOLUTIONS:
            tensor = graph.tensors[operator.inputs[1]]
            if tensor.type == TensorType.INT8:
                values = np.frombuffer(bytes(model.buffers[tensor.buffer].data), dtype=np.int8)
                yield f"{number} {tensor.name.decode()}", values


def _in_openvino(path: Path) -> Iterator[tuple[str, Integers]]:
    model: Any = ov.Core().read_model(path)
    for operation in model.get_ops():
        if operation.get_type_name() in ("Convolution", "GroupConvolution"):
            constant = operation.input_value(1).get_node()
            while constant.get_type_name() in ("Convert", "Subtract", "Multiply", "Reshape"):
                constant = constant.input_value(0).get_node()
            if constant.get_type_name() == "Constant" and constant.get_element_type() == ov.Type.i8:
                yield operation.get_friendly_name(), np.array(constant.get_data())


def _in_onnx(path: Path) -> Iterator[tuple[str, Integers]]:
    graph: Any = onnx.load(path).graph
    constants = {tensor.name: tensor for tensor in graph.initializer if tensor.data_type == TensorProto.INT8}
    dequantized = {node.output[0]: node.input[0] for node in graph.node if node.op_type == "DequantizeLinear"}
    for node in graph.node:
        if node.op_type == "Conv" and (name := dequantized.get(node.input[1], "")) in constants:
            yield f"{node.name} {name}", original_weights(constants[name])
