"""LiteRT: torch -> .tflite, float or int8 with the ranges that QAT learned.

The int8 route: weights on their grid -> float .tflite -> ai-edge-quantizer (static, int8 weights and activations) with
the learned ranges put in place of calibrated ones. Hard-swish and the classifier stay float: an int8 hard-swish breaks
the graph into dozens of XNNPACK partitions and costs more than it saves.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import flatbuffers
import litert_torch
import numpy as np
import numpy.typing as npt
import torch
from ai_edge_litert.interpreter import Interpreter, OpResolverType
from ai_edge_litert.schema_py_generated import BufferT, BuiltinOperator
from ai_edge_quantizer import qtyping, quantizer, recipe_manager
from ai_edge_quantizer.utils import tfl_flatbuffer_utils
from torch import Tensor, nn

from eyas_host.compile.artefact import Compiled
from eyas_host.compile.qdq import bake_weights, replace_activations
from eyas_host.compress.quantizers import Affine, affine, module_of, weight_quantizers
from eyas_host.errors import CompileError
from eyas_host.files import write_bytes
from eyas_host.quiet import quiet_tools

Array = npt.NDArray[np.float32]

_FLOAT_OPS = ("HARD_SWISH", "FULLY_CONNECTED", "OUTPUT")
_HARD_SIGMOID_TOP = 6.0
"""A hard-sigmoid is compiled as relu6(x + 3) times one sixth: the inner tensor is six times the outer one."""
_SIGNATURE, _ARGUMENT = "serving_default", "args_0"
_SAME_AS_INPUT = frozenset({"PAD", "RESHAPE"})
_CONVOLUTIONS = (BuiltinOperator.CONV_2D, BuiltinOperator.DEPTHWISE_CONV_2D)
_PIXELS = (0.0, 255.0)
_WITHOUT_DELEGATES = {"experimental_op_resolver_type": OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES}


class _FromPixels(nn.Module):
    """float [1, size, size, 3] -> [1, 3, size, size] -> logits."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, pixels: Tensor) -> Tensor:
        logits: Tensor = self.network(pixels.permute(0, 3, 1, 2))
        return logits


def compile_litert_fp32(deploy: nn.Module, path: Path, *, input_size: int) -> Compiled:
    """Write a float .tflite: float32 [1, size, size, 3] BGR pixels 0..255 in, float32 logits [1, classes] out.

    Raises `CompileError` if the conversion fails.
    """
    content = _convert(deploy, input_size)
    write_bytes(path, content)
    return Compiled(path, len(content))


def compile_litert_int8(qat_model: nn.Module, path: Path, *, input_size: int) -> Compiled:
    """Write an int8 .tflite: int8 [1, size, size, 3] pixels minus 128 in, float32 logits [1, classes] out.

    Raises `CompileError` if the conversion fails or a tensor has no learned range; nothing is guessed.
    """
    baked = bake_weights(qat_model)
    network = copy.deepcopy(baked)
    recorders = replace_activations(network, _Recorder)
    probe = _probe(input_size)
    with torch.no_grad():
        network(probe)
    content = _convert(network, input_size)
    model = tfl_flatbuffer_utils.read_model(content)
    pixels = np.ascontiguousarray(_channels_last(probe))
    activations = _activation_ranges(model, _tensor_values(content, pixels), recorders)
    weights = _learned_weights(model, baked, qat_model)
    builder = quantizer.Quantizer(content, _recipe())
    with quiet_tools():
        statistics = builder.calibrate({_SIGNATURE: [{_ARGUMENT: pixels}]}, num_threads=1)
        missed = _inject(statistics, activations, model)
        if missed:
            raise CompileError(
                f"{path.name}: no learned range for {len(missed)} tensors, the first ones {'; '.join(missed[:3])}"
            )
        content = bytes(builder.quantize(statistics, enable_progress_report=False).quantized_model)
    content = _with_weights(content, weights)
    write_bytes(path, content)
    return Compiled(path, len(content), f"{len(activations)} activation and {len(weights)} weight ranges from QAT")


def _inject(statistics: dict[str, Any], activations: Mapping[str, tuple[float, float]], model: Any) -> list[str]:
    """Put the learned ranges over the calibrated ones; returns the tensors that have none."""
    graph = model.subgraphs[0]
    logits = {graph.tensors[place].name.decode() for place in graph.outputs}
    missed = []
    for name, entry in statistics.items():
        if name in activations:
            low, high = activations[name]
            entry["min"], entry["max"] = np.full_like(entry["min"], low), np.full_like(entry["max"], high)
        elif entry and name not in logits and not _constant(model, name):
            missed.append(name)
    return missed


def _convert(network: nn.Module, input_size: int) -> bytes:
    pixels = torch.zeros(1, input_size, input_size, 3)
    try:
        with quiet_tools():
            converted: Any = litert_torch.convert(_FromPixels(network).eval(), (pixels,))
            return bytes(converted.model_content())
    except (RuntimeError, ValueError, TypeError) as error:
        raise CompileError(f"LiteRT cannot convert the network: {str(error).splitlines()[0]}") from None


def _recipe() -> Any:
    """Static int8 for everything but the operations that stay float."""
    manager = recipe_manager.RecipeManager()
    operations = qtyping.TFLOperationName
    manager.add_static_config(
        regex=".*", operation_name=operations.ALL_SUPPORTED, activation_num_bits=8, weight_num_bits=8
    )
    for name in _FLOAT_OPS:
        manager.add_quantization_config(
            regex=".*",
            operation_name=operations[name],
            algorithm_key=recipe_manager.AlgorithmName.NO_QUANTIZE,
        )
    return manager.get_quantization_recipe()


def _probe(size: int) -> Tensor:
    """A picture that tells tensors apart: float [1, 3, size, size], whole numbers 0..255."""
    return torch.randint(0, 256, (1, 3, size, size), generator=torch.Generator().manual_seed(1)).float()


class _Recorder(nn.Module):
    """Passes a tensor on and keeps it, with the range it would be rounded in."""

    def __init__(self, grid: Affine) -> None:
        super().__init__()
        self.bounds = grid.bounds
        self.value = torch.empty(0)

    def forward(self, x: Tensor) -> Tensor:
        self.value = x.detach().clone()
        return x


def _channels_last(value: Tensor) -> Array:
    """A tensor as LiteRT lays it out."""
    return np.asarray((value.permute(0, 2, 3, 1) if value.ndim == 4 else value).numpy())


def _tensor_values(content: bytes, pixels: Array) -> dict[str, Array]:
    """Name -> value of every activation of the float model for one picture."""
    interpreter: Any = Interpreter(
        model_content=content, experimental_preserve_all_tensors=True, num_threads=1, **_WITHOUT_DELEGATES
    )
    interpreter.allocate_tensors()
    interpreter.set_tensor(interpreter.get_input_details()[0]["index"], pixels)
    interpreter.invoke()
    return {d["name"]: interpreter.get_tensor(d["index"]) for d in interpreter.get_tensor_details() if d["name"]}


def _activation_ranges(
    model: Any, tensors: Mapping[str, Array], recorders: Mapping[str, _Recorder]
) -> dict[str, tuple[float, float]]:
    """Name of each activation tensor -> learned range, found by value."""
    graph = model.subgraphs[0]
    names = [tensor.name.decode() for tensor in graph.tensors]
    known = [(_channels_last(r.value), r.bounds) for r in recorders.values()]
    known += [
        (_HARD_SIGMOID_TOP * value, (_HARD_SIGMOID_TOP * low, _HARD_SIGMOID_TOP * high))
        for operation, r in recorders.items()
        if "hardsigmoid" in operation
        for value, (low, high) in [(_channels_last(r.value), r.bounds)]
    ]
    matched = {names[graph.inputs[0]]: _PIXELS}
    for operator in graph.operators:
        kind = tfl_flatbuffer_utils.TFL_OP_CODE_TO_NAME.get(model.operatorCodes[operator.opcodeIndex].builtinCode)
        output = names[operator.outputs[0]]
        if kind is not None and kind.name in _SAME_AS_INPUT and names[operator.inputs[0]] in matched:
            matched[output] = matched[names[operator.inputs[0]]]
            continue
        for value, bounds in known:
            if value.size == tensors[output].size and np.allclose(
                value.reshape(-1), tensors[output].reshape(-1), rtol=1e-3, atol=1e-4 * (1e-3 + np.abs(value).max())
            ):
                matched[output] = bounds
                break
    return matched


class _Weight(NamedTuple):
    """What a convolution of the .tflite must hold."""

    integers: npt.NDArray[np.int8]
    """As LiteRT lays them out."""
    scale: npt.NDArray[np.float64]
    """One an output channel."""
    bias: Array


def _convolutions(model: Any) -> list[Any]:
    """The convolution operators of the graph, in order."""
    codes = [max(code.builtinCode, code.deprecatedBuiltinCode) for code in model.operatorCodes]
    return [operator for operator in model.subgraphs[0].operators if codes[operator.opcodeIndex] in _CONVOLUTIONS]


def _learned_weights(model: Any, baked: nn.Module, qat_model: nn.Module) -> list[_Weight]:
    """The learned integers and scales for each convolution of the float .tflite, found by value.

    Raises `CompileError` if a convolution has none.
    """
    known = []
    for operation, q in weight_quantizers(qat_model).items():
        module: Any = module_of(baked, operation)
        order = (1, 2, 3, 0) if module.groups > 1 else (0, 2, 3, 1)
        value = module.weight.detach().permute(order).numpy()
        known.append((value, affine(q).scale.numpy()))
    graph = model.subgraphs[0]
    found = []
    for operator in _convolutions(model):
        weight, bias = (graph.tensors[place] for place in operator.inputs[1:3])
        stored = _data(model, weight).reshape(weight.shape)
        match = [(v, scale) for v, scale in known if v.shape == stored.shape and np.array_equal(v, stored)]
        if not match:
            raise CompileError(f"no learned scales for the weights of {weight.name.decode()}")
        value, scale = match[0]
        per_channel = scale if value.shape[0] == 1 and value.shape[-1] == len(scale) else scale.reshape(-1, 1, 1, 1)
        integers = np.rint(value.astype(np.float64) / per_channel).astype(np.int8)
        found.append(_Weight(integers, scale, _data(model, bias)))
    return found


def _with_weights(content: bytes, weights: Sequence[_Weight]) -> bytes:
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
        unit = weight.scale * float(source.quantization.scale[0])
        _store(model, filters, weight.integers, weight.scale)
        _store(model, bias, np.rint(weight.bias / unit).astype(np.int32), unit)
    read = {tensor.buffer for tensor in graph.tensors} | {entry.buffer for entry in model.metadata or ()}
    for place, buffer in enumerate(model.buffers):
        if place not in read:
            buffer.data = None
    builder = flatbuffers.Builder(len(content))
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


def _constant(model: Any, name: str) -> bool:
    """Whether a tensor is stored in the file (a bias, a small constant)."""
    tensors = model.subgraphs[0].tensors
    return any(t.name.decode() == name and model.buffers[t.buffer].data is not None for t in tensors)
