"""Sizes of the network's layers, and of constants and graph in each artefact."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import onnx
from ai_edge_quantizer.utils import tfl_flatbuffer_utils
from onnx import numpy_helper
from torch import nn

from eyas_device.bundle import RuntimeName
from eyas_host.quant.quantizers import weight_quantizers

_SCALE = _BIAS = 4
"""Bytes per scale and per bias, at any precision of the weights."""


class LayerSize(msgspec.Struct, frozen=True):
    """Size of a layer with weights."""

    name: str
    shape: tuple[int, ...]
    """Shape of the weights, output channels first."""
    parameters: int
    fp32_bytes: int
    int8_bytes: int
    """One byte per weight and a scale per output channel; as fp32 for a layer in float."""


class ArtefactSize(msgspec.Struct, frozen=True):
    """Size of a compiled model."""

    constants: int
    """Bytes of weights, biases and other constants."""
    graph: int
    """All other bytes: operators, names, scales, padding."""


def layer_sizes(qat_model: nn.Module) -> tuple[LayerSize, ...]:
    """Sizes of the layers of a QAT model, in order of definition."""
    quantized = {".".join(operation.split("/")[:-2]) for operation in weight_quantizers(qat_model)}
    layers = []
    for name, module in qat_model.named_modules():
        if not isinstance(module, nn.Conv2d | nn.Linear):
            continue
        weights = module.weight.numel()
        biases = 0 if module.bias is None else module.bias.numel()
        fp32 = 4 * weights + _BIAS * biases
        int8 = weights + _SCALE * module.weight.shape[0] + _BIAS * biases if name in quantized else fp32
        layers.append(LayerSize(name, tuple(module.weight.shape), weights + biases, fp32, int8))
    return tuple(layers)


def artefact_size(runtime: RuntimeName, files: list[Path]) -> ArtefactSize:
    """Bytes of constants and of the rest of an artefact's files; the first file is the one to load."""
    constants = {"litert": _tflite, "openvino": _openvino, "onnx": _onnx}[runtime](files)
    return ArtefactSize(constants, sum(file.stat().st_size for file in files) - constants)


def _tflite(files: list[Path]) -> int:
    model = tfl_flatbuffer_utils.read_model(files[0].read_bytes())
    used = {tensor.buffer for tensor in model.subgraphs[0].tensors}
    return sum(len(model.buffers[index].data) for index in used if model.buffers[index].data is not None)


def _openvino(files: list[Path]) -> int:
    return files[1].stat().st_size


def _onnx(files: list[Path]) -> int:
    graph = onnx.load(files[0]).graph
    return sum(int(np.asarray(numpy_helper.to_array(tensor)).nbytes) for tensor in graph.initializer)
