"""Export to ONNX: float32 or quantize-dequantize (Q/DQ), with uint8 pixels as input."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from torch import Tensor, nn

from eyas_device.bundle import Precision
from eyas_host.export.onnx_integers import use_integers
from eyas_host.quant.qdq import to_qdq
from eyas_host.support.errors import CompileError
from eyas_host.support.files import atomic_write
from eyas_host.support.quiet import quiet_tools

OPSET = 18
_MIN_WEIGHT = -127
"""int8 weights exclude -128, so that they are symmetric."""


class _FromPixels(nn.Module):
    """uint8 [1, size, size, 3] -> float [1, 3, size, size] -> logits."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, pixels: Tensor) -> Tensor:
        logits: Tensor = self.network(pixels.float().permute(0, 3, 1, 2))  # TensorRT transposes no uint8
        return logits


def compile_onnx(model: nn.Module, path: Path, *, input_size: int, precision: Precision) -> str:
    """Write a checked .onnx: uint8 `pixels` [1, size, size, 3] BGR in, float32 `logits` [1, classes] out.

    `model` is the folded network (fp32) or the QAT model (int8: its weights are stored as int8). Raises `CompileError`
    if the export fails or the result is not valid ONNX.
    """
    network = _FromPixels(to_qdq(model) if precision == "int8" else model).eval()
    pixels = torch.zeros(1, input_size, input_size, 3, dtype=torch.uint8)
    try:
        with quiet_tools():
            program: Any = torch.onnx.export(
                network,
                (pixels,),
                input_names=["pixels"],
                output_names=["logits"],
                opset_version=OPSET,
                dynamo=True,
                optimize=True,
                verbose=False,
            )
        graph = program.model_proto
    except (RuntimeError, torch.onnx.errors.OnnxExporterError) as error:
        reason = str(_first_cause(error)).splitlines()[0]
        raise CompileError(f"{path.name}: torch cannot export the network: {reason}") from None
    for entry in (*graph.graph.node, *graph.graph.initializer, *graph.graph.value_info):
        del entry.metadata_props[:]  # stack traces with this machine's paths, and a third of the file
    stored = 0
    if precision == "int8":
        stored = _store_int8_weights(graph)
        use_integers(graph)
    try:
        onnx.checker.check_model(graph, full_check=True)
    except onnx.checker.ValidationError as error:
        raise CompileError(f"{path.name}: not valid ONNX: {error}") from None
    with atomic_write(path) as temporary:
        onnx.save(graph, str(temporary))
    return f"{stored} weights stored as int8" if stored else ""


def _first_cause(error: BaseException) -> BaseException:
    """The original error: the exporter's own message only lists its steps."""
    return _first_cause(error.__cause__) if error.__cause__ else error


def _store_int8_weights(model: Any) -> int:
    """Replace the quantization of constants (QuantizeLinear, Clip) by their int8 values; returns their number.

    Each weight gets its own zero point: ONNX Runtime's exact mode for CPUs whose int8 instructions saturate rewrites
    weights together with their zero points, which fails for shared ones.
    """
    graph = model.graph
    constants = {tensor.name: tensor for tensor in graph.initializer}
    clips = {node.input[0]: node for node in graph.node if node.op_type == "Clip"}
    readers = {node.input[0]: node for node in graph.node if node.op_type == "DequantizeLinear"}
    stored = 0
    for node in list(graph.node):
        if node.op_type != "QuantizeLinear" or node.input[0] not in constants:
            continue
        weight, scale, zero = (numpy_helper.to_array(constants[name]) for name in node.input[:3])
        shape = (-1, *(1 for _ in weight.shape[1:]))
        integers = np.rint(weight / scale.reshape(shape)) + zero.reshape(shape)
        name = node.output[0]
        graph.node.remove(node)
        if clip := clips.get(name):
            name = clip.output[0]
            graph.node.remove(clip)
        stored += 1
        values = np.clip(integers, _MIN_WEIGHT, 127).astype(np.int8)
        graph.initializer.append(numpy_helper.from_array(values, name))
        graph.initializer.append(numpy_helper.from_array(zero, f"{name}_zero_point"))
        readers[name].input[2] = f"{name}_zero_point"
    del graph.value_info[:]
    return stored
