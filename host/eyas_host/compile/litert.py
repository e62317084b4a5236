"""LiteRT: torch -> .tflite, float or int8 with the ranges that QAT learned.

The int8 route: weights on their grid -> float .tflite -> ai-edge-quantizer (static, int8 weights and activations) with
the learned ranges put in place of calibrated ones. Hard-swish and the classifier stay float: an int8 hard-swish breaks
the graph into dozens of XNNPACK partitions and costs more than it saves.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import litert_torch
import numpy as np
import numpy.typing as npt
import torch
from ai_edge_litert.interpreter import Interpreter, OpResolverType
from ai_edge_litert.schema_py_generated import TensorType
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
    weights = _weight_scales(model, baked, qat_model)
    builder = quantizer.Quantizer(content, _recipe())
    with quiet_tools():
        statistics = builder.calibrate({_SIGNATURE: [{_ARGUMENT: pixels}]}, num_threads=1)
        missed = _inject(statistics, activations, weights, model)
        if missed or len(weights) < len(weight_quantizers(qat_model)):
            raise CompileError(
                f"{path.name}: no learned range for {len(missed)} tensors ({'; '.join(missed[:3])}); "
                f"{len(weights)} of {len(weight_quantizers(qat_model))} weights found"
            )
        content = bytes(builder.quantize(statistics, enable_progress_report=False).quantized_model)
    write_bytes(path, content)
    return Compiled(path, len(content), f"{len(activations)} activation and {len(weights)} weight ranges from QAT")


def _inject(
    statistics: dict[str, Any], activations: Mapping[str, tuple[float, float]], weights: Mapping[str, Array], model: Any
) -> list[str]:
    """Put the learned ranges over the calibrated ones; returns the tensors that have none."""
    graph = model.subgraphs[0]
    logits = {graph.tensors[place].name.decode() for place in graph.outputs}
    missed = []
    for name, entry in statistics.items():
        if name in activations:
            low, high = activations[name]
            entry["min"], entry["max"] = np.full_like(entry["min"], low), np.full_like(entry["max"], high)
        elif name in weights:
            top = weights[name].reshape(np.shape(entry["max"]))
            entry["min"], entry["max"] = -top, top
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


def _weight_scales(model: Any, baked: nn.Module, qat_model: nn.Module) -> dict[str, Array]:
    """Name of each convolution weight tensor -> 127 scales, one an output channel, found by value."""
    graph = model.subgraphs[0]
    scales: dict[str, Array] = {}
    wanted = []
    for operation, q in weight_quantizers(qat_model).items():
        module: Any = module_of(baked, operation)
        weight = module.weight.detach()
        depthwise = module.groups > 1
        order = (1, 2, 3, 0) if depthwise else (0, 2, 3, 1)
        wanted.append((weight.permute(order).numpy(), 127 * affine(q).scale.numpy()))
    for tensor in graph.tensors:
        data = model.buffers[tensor.buffer].data
        if data is None or tensor.type != TensorType.FLOAT32 or len(tensor.shape) != 4:
            continue
        value = np.frombuffer(data, dtype=np.float32).reshape(tensor.shape)
        for weight, top in wanted:
            if weight.shape == value.shape and np.array_equal(weight, value):
                scales[tensor.name.decode()] = top.astype(np.float32)
                break
    return scales


def _constant(model: Any, name: str) -> bool:
    """Whether a tensor is stored in the file (a bias, a small constant)."""
    tensors = model.subgraphs[0].tensors
    return any(t.name.decode() == name and model.buffers[t.buffer].data is not None for t in tensors)
