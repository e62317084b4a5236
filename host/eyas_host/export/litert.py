"""LiteRT: torch -> .tflite, float, int8 with the ranges that QAT learned, or int8 weights with int16 activations.

The integer route: weights on their grid -> float .tflite -> ai-edge-quantizer (static) with the learned ranges put in
place of calibrated ones. Hard-swish and the classifier stay float: an int8 hard-swish breaks the graph into dozens of
XNNPACK partitions and costs more than it saves.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import flatbuffers
import litert_torch
import numpy as np
import numpy.typing as npt
import torch
from ai_edge_litert.schema_py_generated import BufferT, TensorType
from ai_edge_quantizer import qtyping, quantizer, recipe_manager
from ai_edge_quantizer.utils import tfl_flatbuffer_utils
from torch import Tensor, nn

from eyas_host.export.litert_ranges import (
    Array,
    Bounds,
    Recorder,
    activation_ranges,
    channels_last,
    kind_of,
    output_name,
    probe,
    tensor_values,
)
from eyas_host.quant.graph import CLAMPS, layer_name, operations
from eyas_host.quant.qdq import bake_weights, replace_activations
from eyas_host.quant.quantizers import affine, float_layers, module_of, weight_quantizers
from eyas_host.support.errors import CompileError
from eyas_host.support.files import write_bytes
from eyas_host.support.quiet import quiet_tools

_FLOAT_KINDS = ("HARD_SWISH", "FULLY_CONNECTED", "OUTPUT")
_SIGNATURE, _ARGUMENT = "serving_default", "args_0"
_CONVOLUTIONS = ("CONV_2D", "DEPTHWISE_CONV_2D")


class _FromPixels(nn.Module):
    """float [1, size, size, 3] -> [1, 3, size, size] -> logits."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, pixels: Tensor) -> Tensor:
        logits: Tensor = self.network(pixels.permute(0, 3, 1, 2))
        return logits


class _ZeroPaddedPool(nn.Module):
    """Max-pooling of values that are not negative: zeros pad as well as minus infinity, which int8 lacks."""

    def __init__(self, pool: nn.MaxPool2d) -> None:
        super().__init__()
        self.pool = copy.copy(pool)
        self.pool.padding = 0
        self.padding = pool.padding

    def forward(self, x: Tensor) -> Tensor:
        """Pooled values, as the pool with its own padding gives."""
        rows, columns = self.padding if isinstance(self.padding, tuple) else (self.padding, self.padding)
        pooled: Tensor = self.pool(nn.functional.pad(x, (columns, columns, rows, rows)))
        return pooled


def compile_litert_fp32(deploy: nn.Module, path: Path, *, input_size: int) -> str:
    """Write a float .tflite: float32 [1, size, size, 3] BGR pixels 0..255 in, float32 logits [1, classes] out.

    Raises `CompileError` if the conversion fails.
    """
    write_bytes(path, _convert(deploy, input_size))
    return ""


def compile_litert_int8(qat_model: nn.Module, path: Path, *, input_size: int) -> str:
    """Write an int8 .tflite: int8 [1, size, size, 3] pixels minus 128 in, float32 logits [1, classes] out.

    Layers that the QAT model leaves float stay so. Raises `CompileError` if the conversion fails or a tensor has no
    learned range; nothing is guessed.
    """
    return _compile_integer(qat_model, path, input_size, 8)


def compile_litert_int16(qat_model: nn.Module, path: Path, *, input_size: int) -> str:
    """Write a .tflite with the int8 weights of `compile_litert_int8` and int16 activations.

    float32 [1, size, size, 3] BGR pixels 0..255 in, float32 logits [1, classes] out. An activation's range is the
    learned one made symmetric, as the kernels want it, in 256 times finer steps. Raises as `compile_litert_int8`.
    """
    return _compile_integer(qat_model, path, input_size, 16)


def _compile_integer(qat_model: nn.Module, path: Path, input_size: int, bits: Literal[8, 16]) -> str:
    image = probe(input_size)
    baked = bake_weights(qat_model)
    network = copy.deepcopy(baked)
    seen: list[Recorder] = []
    recorders = replace_activations(network, lambda grid: Recorder(grid, seen))
    _pad_pools_with_zeros(network, image)
    seen.clear()
    with torch.no_grad():
        network(image)
    recorded = list(seen)
    content = _convert(network, input_size)
    model = tfl_flatbuffer_utils.read_model(content)
    pixels = np.ascontiguousarray(channels_last(image))
    ranges = activation_ranges(model, tensor_values(content, pixels), recorders, recorded)
    weights = _learned_weights(model, baked, qat_model, image)
    float_outputs = _float_outputs(model, ranges, weights, float_pixels=bits == 16)
    missed = _unknown_ranges(model, ranges, float_outputs)
    if missed:
        raise CompileError(
            f"{path.name}: no learned range for {len(missed)} tensors, the first ones {'; '.join(missed[:3])}"
        )
    builder = quantizer.Quantizer(content, _recipe(bits, float_outputs))
    with quiet_tools():
        statistics: Any = builder.calibrate({_SIGNATURE: [{_ARGUMENT: pixels}]}, num_threads=1)
        for name in statistics.keys() & ranges.keys():
            for end, value in zip(("min", "max"), ranges[name], strict=True):
                statistics[name][end] = np.full_like(statistics[name][end], value)
        content = bytes(builder.quantize(statistics, enable_progress_report=False).quantized_model)
    content = _with_weights(content, weights)
    write_bytes(path, content)
    stored = sum(weight is not None for weight in weights)
    return f"{len(recorders)} activation and {stored} weight ranges from QAT"


def _float_outputs(
    model: Any, ranges: Mapping[str, Bounds], weights: Sequence[_Weight | None], *, float_pixels: bool
) -> list[str]:
    """Outputs of the operators that are computed in float beside those of `_FLOAT_KINDS`.

    They are convolutions without learned weights and what has no learned range. With float pixels the mean is taken
    off in float as well: whole numbers minus the mean are exact there.
    """
    learned = iter(weights)
    names = []
    for operator in model.subgraphs[0].operators:
        kind, name = kind_of(model, operator), output_name(model, operator)
        if kind in _CONVOLUTIONS:
            is_float = next(learned) is None
        else:
            is_float = name not in ranges or (float_pixels and kind == "SUB")
        if is_float:
            names.append(name)
    return names


def _unknown_ranges(model: Any, ranges: Mapping[str, Bounds], float_outputs: Collection[str]) -> list[str]:
    """What the integer operators read or write without a learned range."""
    graph = model.subgraphs[0]
    names: list[str] = []
    for operator in graph.operators:
        if kind_of(model, operator) in _FLOAT_KINDS or output_name(model, operator) in float_outputs:
            continue
        for tensor in (graph.tensors[place] for place in (*operator.inputs, *operator.outputs) if place >= 0):
            name = tensor.name.decode()
            if name not in (*ranges, *names) and model.buffers[tensor.buffer].data is None:
                names.append(name)
    return names


def _pad_pools_with_zeros(network: nn.Module, example: Tensor) -> None:
    """Replace the padding of max-pooling behind a clamp, in place."""
    found = operations(network, example)
    for name, operation in found.items():
        source = found.get(operation.source)
        if operation.kind == "max_pool2d" and source is not None and source.kind in CLAMPS:
            path = layer_name(name)
            pool = network.get_submodule(path)
            if isinstance(pool, nn.MaxPool2d):
                network.set_submodule(path, _ZeroPaddedPool(pool))


def _convert(network: nn.Module, input_size: int) -> bytes:
    pixels = torch.zeros(1, input_size, input_size, 3)
    try:
        with quiet_tools():
            converted: Any = litert_torch.convert(_FromPixels(network).eval(), (pixels,))
            return bytes(converted.model_content())
    except (RuntimeError, ValueError, TypeError) as error:
        raise CompileError(f"LiteRT cannot convert the network: {str(error).splitlines()[0]}") from None


def _recipe(bits: Literal[8, 16], float_outputs: Collection[str]) -> Any:
    """Static int8 or int16 for everything but the operations that stay float."""
    manager = recipe_manager.RecipeManager()
    names = qtyping.TFLOperationName
    skip = recipe_manager.AlgorithmName.NO_QUANTIZE
    manager.add_static_config(
        regex=".*", operation_name=names.ALL_SUPPORTED, activation_num_bits=bits, weight_num_bits=8
    )
    for kind in (*_FLOAT_KINDS, *(("INPUT",) if bits == 16 else ())):
        manager.add_quantization_config(regex=".*", operation_name=names[kind], algorithm_key=skip)
    for name in float_outputs:
        manager.add_quantization_config(
            regex=f"^{re.escape(name)};?$", operation_name=names.ALL_SUPPORTED, algorithm_key=skip
        )
    return manager.get_quantization_recipe()


class _Weight(NamedTuple):
    """What a convolution of the .tflite must hold."""

    integers: npt.NDArray[np.int8]
    """As LiteRT lays them out."""
    scale: npt.NDArray[np.float64]
    """One an output channel."""
    bias: Array


def _convolutions(model: Any) -> list[Any]:
    """The convolution operators of the graph, in order."""
    return [operator for operator in model.subgraphs[0].operators if kind_of(model, operator) in _CONVOLUTIONS]


def _learned_weights(model: Any, baked: nn.Module, qat_model: nn.Module, example: Tensor) -> list[_Weight | None]:
    """The learned integers and scales for each convolution of the float .tflite, found by value; None stays float.

    Raises `CompileError` if a convolution is none of the QAT model's.
    """
    scales = {operation: affine(q).scale.numpy() for operation, q in weight_quantizers(qat_model).items()}
    known = [(_filters(module_of(baked, operation)), scale) for operation, scale in scales.items()]
    known_float = [_filters(baked.get_submodule(name)) for name in float_layers(qat_model, example)]
    graph = model.subgraphs[0]
    found: list[_Weight | None] = []
    for operator in _convolutions(model):
        weight, bias = (graph.tensors[place] for place in operator.inputs[1:3])
        stored = _data(model, weight).reshape(weight.shape)
        match = [(value, scale) for value, scale in known if np.array_equal(value, stored)]
        if match:
            value, scale = match[0]
            per_channel = scale if value.shape[0] == 1 and value.shape[-1] == len(scale) else scale.reshape(-1, 1, 1, 1)
            integers = np.rint(value.astype(np.float64) / per_channel).astype(np.int8)
            found.append(_Weight(integers, scale, _data(model, bias)))
        elif any(np.array_equal(value, stored) for value in known_float):
            found.append(None)
        else:
            raise CompileError(f"no learned scales for the weights of {weight.name.decode()}")
    return found


def _filters(module: Any) -> Array:
    """A convolution's weight as LiteRT lays it out."""
    order = (1, 2, 3, 0) if module.groups > 1 else (0, 2, 3, 1)
    return np.asarray(module.weight.detach().permute(order).numpy())


class _SharingBuilder(flatbuffers.Builder):  # type: ignore[misc]
    """Writes equal vectors once: above all the zero points of weights, eight bytes a channel and all zero."""

    def __init__(self, size: int) -> None:
        super().__init__(size)
        self._written: dict[tuple[str, bytes], int] = {}

    def CreateNumpyVector(self, x: npt.NDArray[np.generic]) -> int:  # noqa: N802 - flatbuffers calls it
        """The place of a vector with these values."""
        key = (x.dtype.str, x.tobytes())
        if key not in self._written:
            self._written[key] = super().CreateNumpyVector(x)
        return self._written[key]


def _with_weights(content: bytes, weights: Sequence[_Weight | None]) -> bytes:
    """Store the learned integers and scales in a quantized .tflite.

    ai-edge-quantizer takes a channel's scale from its largest weight and rounds again; training may have learned
    another.
    """
    model = tfl_flatbuffer_utils.read_model(content)
    graph = model.subgraphs[0]
    operators = _convolutions(model)
    if len(operators) != len(weights):
        raise CompileError(f"{len(operators)} convolutions in the quantized model, {len(weights)} in the float one")
    for operator, weight in zip(operators, weights, strict=True):
        source, filters, bias = (graph.tensors[place] for place in operator.inputs[:3])
        if weight is None:
            if filters.type != TensorType.FLOAT32:
                raise CompileError(f"{filters.name.decode()} was to stay float")
            continue
        unit = weight.scale * float(source.quantization.scale[0])
        _store(model, filters, weight.integers, weight.scale)
        width = np.int64 if bias.type == TensorType.INT64 else np.int32  # int16 activations add up in 64 bits
        _store(model, bias, np.rint(weight.bias / unit).astype(width), unit)
    read = {tensor.buffer for tensor in graph.tensors} | {entry.buffer for entry in model.metadata or ()}
    for place, buffer in enumerate(model.buffers):
        if place not in read:
            buffer.data = None
    builder = _SharingBuilder(len(content))
    builder.Finish(model.Pack(builder), b"TFL3")
    return bytes(builder.Output())


def _store(model: Any, tensor: Any, values: npt.NDArray[np.generic], scale: npt.NDArray[np.float64]) -> None:
    """Give a tensor a buffer of its own (others may share the old one) and its scales."""
    model.buffers.append(BufferT(data=np.frombuffer(values.tobytes(), dtype=np.uint8)))
    tensor.buffer = len(model.buffers) - 1
    tensor.quantization.scale = scale.astype(np.float32)
    tensor.quantization.zeroPoint = np.zeros(len(scale), dtype=np.int64)


def _data(model: Any, tensor: Any) -> Array:
    """The stored float32 values of a tensor, flat."""
    return np.frombuffer(bytes(model.buffers[tensor.buffer].data), dtype=np.float32)
