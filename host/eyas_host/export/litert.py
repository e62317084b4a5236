"""Export to LiteRT (.tflite): float, int8 with the ranges learned in QAT, or int8 weights with int16 activations.

The integer route: weights rounded to their grid -> float .tflite -> ai-edge-quantizer (static) with the learned ranges
instead of calibrated ones. Hard-swish and the classifier stay in float: an int8 hard-swish splits the graph into dozens
of XNNPACK partitions and costs more than it saves.
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

from eyas_host.export.litert_names import class_paths, modules_of
from eyas_host.export.litert_ranges import (
    CONVOLUTIONS,
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
from eyas_host.quant.quantizers import affine, float_layers, weight_quantizers
from eyas_host.support.errors import CompileError
from eyas_host.support.files import write_bytes
from eyas_host.support.quiet import quiet_tools

_FLOAT_KINDS = ("HARD_SWISH", "FULLY_CONNECTED", "OUTPUT")
_SIGNATURE, _ARGUMENT = "serving_default", "args_0"


class _FromPixels(nn.Module):
    """float [1, size, size, 3] -> [1, 3, size, size] -> logits."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, pixels: Tensor) -> Tensor:
        logits: Tensor = self.network(pixels.permute(0, 3, 1, 2))
        return logits


class _ZeroPaddedPool(nn.Module):
    """Max-pooling of nonnegative values: pads with zeros instead of minus infinity, which int8 lacks."""

    def __init__(self, pool: nn.MaxPool2d) -> None:
        super().__init__()
        self.pool = copy.copy(pool)
        self.pool.padding = 0
        self.padding = pool.padding

    def forward(self, x: Tensor) -> Tensor:
        rows, columns = self.padding if isinstance(self.padding, tuple) else (self.padding, self.padding)
        pooled: Tensor = self.pool(nn.functional.pad(x, (columns, columns, rows, rows)))
        return pooled


def compile_litert_fp32(deploy: nn.Module, path: Path, *, input_size: int) -> str:
    """Write a float .tflite: float32 [1, size, size, 3] BGR pixels 0..255 in, float32 logits [1, classes] out.

    Returns an empty note. Raises `CompileError` if the conversion fails.
    """
    write_bytes(path, _convert(deploy, input_size))
    return ""


def compile_litert_int8(qat_model: nn.Module, path: Path, *, input_size: int) -> str:
    """Write an int8 .tflite: int8 [1, size, size, 3] pixels minus 128 in, float32 logits [1, classes] out.

    Layers that the QAT model keeps in float stay so. Returns a note on the file. Raises `CompileError` if the
    conversion fails or a tensor has no learned range; nothing is guessed.
    """
    return _compile_integer(qat_model, path, input_size, 8)


def compile_litert_int16(qat_model: nn.Module, path: Path, *, input_size: int) -> str:
    """Write a .tflite with the int8 weights of `compile_litert_int8` and int16 activations.

    float32 [1, size, size, 3] BGR pixels 0..255 in, float32 logits [1, classes] out. An activation's range is the
    learned one made symmetric, as the kernels require, in 256 times finer steps. Returns and raises as
    `compile_litert_int8`.
    """
    return _compile_integer(qat_model, path, input_size, 16)


def _compile_integer(qat_model: nn.Module, path: Path, input_size: int, bits: Literal[8, 16]) -> str:
    image = probe(input_size)
    baked = bake_weights(qat_model)
    network = copy.deepcopy(baked)
    order: list[Recorder] = []
    recorders = replace_activations(network, lambda grid: Recorder(grid, order))
    _pad_pools_with_zeros(network, image)
    order.clear()
    with torch.no_grad():
        network(image)
    recorded = list(order)
    content = _convert(network, input_size)
    model = tfl_flatbuffer_utils.read_model(content)
    pixels = np.ascontiguousarray(channels_last(image))
    values = tensor_values(content, pixels)
    ranges = activation_ranges(model, values, recorders, recorded, _module_paths(network))
    weights = _learned_weights(model, baked, qat_model, image)
    float_outputs = _float_outputs(model, ranges, weights, float_pixels=bits == 16)
    missing = _tensors_without_range(model, ranges, float_outputs)
    if missing:
        raise CompileError(f"{path.name}: no learned range for {len(missing)} tensors, first {'; '.join(missing[:3])}")
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
    """Outputs of the operators computed in float, besides those of `_FLOAT_KINDS`.

    These are convolutions without learned weights and operators without a learned range. With float pixels the mean is
    subtracted in float as well, which is exact for integer pixels.
    """
    learned = iter(weights)
    names = []
    for operator in model.subgraphs[0].operators:
        kind, name = kind_of(model, operator), output_name(model, operator)
        if kind in CONVOLUTIONS:
            is_float = next(learned) is None
        else:
            is_float = name not in ranges or (float_pixels and kind == "SUB")
        if is_float:
            names.append(name)
    return names


def _tensors_without_range(model: Any, ranges: Mapping[str, Bounds], float_outputs: Collection[str]) -> list[str]:
    """Tensors that integer operators read or write and that have no learned range."""
    graph = model.subgraphs[0]
    names: list[str] = []
    for operator in graph.operators:
        if kind_of(model, operator) in _FLOAT_KINDS or output_name(model, operator) in float_outputs:
            continue
        for tensor in (graph.tensors[index] for index in (*operator.inputs, *operator.outputs) if index >= 0):
            name = tensor.name.decode()
            if name not in (*ranges, *names) and model.buffers[tensor.buffer].data is None:
                names.append(name)
    return names


def _pad_pools_with_zeros(network: nn.Module, example: Tensor) -> None:
    """Pad max-pooling after a clamp with zeros, in place."""
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
    """Quantization recipe: static int8 or int16 for everything but the operations that stay in float."""
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
    """The stored weight and bias of a convolution in the .tflite."""

    integers: npt.NDArray[np.int8]
    """Integer weights in LiteRT's layout."""
    scale: npt.NDArray[np.float64]
    """One per output channel."""
    bias: Array


def _convolutions(model: Any) -> list[Any]:
    """The convolution operators of the graph, in order."""
    return [operator for operator in model.subgraphs[0].operators if kind_of(model, operator) in CONVOLUTIONS]


def _learned_weights(model: Any, baked: nn.Module, qat_model: nn.Module, example: Tensor) -> list[_Weight | None]:
    """Learned integers and scales of each convolution of the float .tflite, found by its layer; None for one in float.

    Raises `CompileError` if a convolution is of no layer, has other weights than its layer, or a layer is missing.
    """
    scales = {layer_name(operation): affine(q).scale.numpy() for operation, q in weight_quantizers(qat_model).items()}
    layers = _layers(model, baked)
    expected = {*scales, *float_layers(qat_model, example)}
    if sorted(layers) != sorted(expected):
        raise CompileError(
            f"the convolutions of the .tflite are not the layers of the network: missing "
            f"{sorted(expected - set(layers))[:3]}, {len(layers)} of {len(expected)}"
        )
    graph = model.subgraphs[0]
    weights: list[_Weight | None] = []
    for operator, layer in zip(_convolutions(model), layers, strict=True):
        weight, bias = (graph.tensors[index] for index in operator.inputs[1:3])
        value = _filters(baked.get_submodule(layer))
        if not np.array_equal(value, _data(model, weight).reshape(weight.shape)):
            raise CompileError(f"the .tflite has other weights than {layer}: {weight.name.decode()}")
        scale = scales.get(layer)
        if scale is None:
            weights.append(None)
            continue
        per_channel = scale if value.shape[0] == 1 and value.shape[-1] == len(scale) else scale.reshape(-1, 1, 1, 1)
        integers = np.rint(value.astype(np.float64) / per_channel).astype(np.int8)
        weights.append(_Weight(integers, scale, _data(model, bias)))
    return weights


def _layers(model: Any, network: nn.Module) -> list[str]:
    """The layer of each convolution of the .tflite. Equal weights of several layers are one tensor there."""
    convolutions = {name for name, module in network.named_modules() if isinstance(module, nn.Conv2d)}
    paths = _module_paths(network)
    layers = []
    for operator in _convolutions(model):
        name = output_name(model, operator)
        found = [module for module in modules_of(name, paths) if module in convolutions]
        if not found:
            raise CompileError(f"a convolution of the .tflite is of no layer: {name}")
        layers.append(found[-1])
    return layers


def _module_paths(network: nn.Module) -> dict[str, str]:
    """Path of classes as in the converter's tensor names -> path of the module in `network`."""
    return {classes: path.removeprefix("network.") for classes, path in class_paths(_FromPixels(network)).items()}


def _filters(module: Any) -> Array:
    """A convolution's weight in LiteRT's layout."""
    order = (1, 2, 3, 0) if module.groups > 1 else (0, 2, 3, 1)
    return np.asarray(module.weight.detach().permute(order).numpy())


class _SharingBuilder(flatbuffers.Builder):  # type: ignore[misc]
    """Writes equal vectors only once, above all the zero points of weights: eight zero bytes per channel."""

    def __init__(self, size: int) -> None:
        super().__init__(size)
        self._written: dict[tuple[str, bytes], int] = {}

    def CreateNumpyVector(self, x: npt.NDArray[np.generic]) -> int:  # noqa: N802 - flatbuffers calls it
        """Offset of a vector with these values."""
        key = (x.dtype.str, x.tobytes())
        if key not in self._written:
            self._written[key] = super().CreateNumpyVector(x)
        return self._written[key]


def _with_weights(content: bytes, weights: Sequence[_Weight | None]) -> bytes:
    """Store the learned integers and scales in a quantized .tflite.

    ai-edge-quantizer derives a channel's scale from its largest weight and rounds again; training may have learned
    another scale.
    """
    model = tfl_flatbuffer_utils.read_model(content)
    graph = model.subgraphs[0]
    operators = _convolutions(model)
    if len(operators) != len(weights):
        raise CompileError(f"{len(operators)} convolutions in the quantized model, {len(weights)} in the float one")
    stored: set[int] = set()
    for operator, weight in zip(operators, weights, strict=True):
        for port in (1, 2):
            if operator.inputs[port] in stored:  # equal constants of two layers are one tensor
                graph.tensors.append(copy.deepcopy(graph.tensors[operator.inputs[port]]))
                operator.inputs[port] = len(graph.tensors) - 1
            stored.add(int(operator.inputs[port]))
        source, filters, bias = (graph.tensors[index] for index in operator.inputs[:3])
        if weight is None:
            if filters.type != TensorType.FLOAT32:
                raise CompileError(f"{filters.name.decode()} should have stayed in float")
            continue
        unit = weight.scale * float(source.quantization.scale[0])
        _store(model, filters, weight.integers, weight.scale)
        width = np.int64 if bias.type == TensorType.INT64 else np.int32  # int16 activations accumulate in 64 bits
        steps = np.rint(weight.bias / unit)
        if not (np.abs(steps) <= np.iinfo(width).max).all():
            channel = int(np.argmax(np.abs(steps)))
            raise CompileError(f"{filters.name.decode()}, channel {channel}: the bias does not fit {width.__name__}")
        _store(model, bias, steps.astype(width), unit)
    used = {tensor.buffer for tensor in graph.tensors} | {entry.buffer for entry in model.metadata or ()}
    for index, buffer in enumerate(model.buffers):
        if index not in used:
            buffer.data = None
    builder = _SharingBuilder(len(content))
    builder.Finish(model.Pack(builder), b"TFL3")
    return bytes(builder.Output())


def _store(model: Any, tensor: Any, values: npt.NDArray[np.generic], scale: npt.NDArray[np.float64]) -> None:
    """Store values and scales in a new buffer for this tensor; others may share the old one."""
    model.buffers.append(BufferT(data=np.frombuffer(values.tobytes(), dtype=np.uint8)))
    tensor.buffer = len(model.buffers) - 1
    tensor.quantization.scale = scale.astype(np.float32)
    tensor.quantization.zeroPoint = np.zeros(len(scale), dtype=np.int64)


def _data(model: Any, tensor: Any) -> Array:
    """The stored float32 values of a tensor, flattened."""
    return np.frombuffer(bytes(model.buffers[tensor.buffer].data), dtype=np.float32)
