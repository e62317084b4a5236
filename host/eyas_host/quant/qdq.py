"""Convert a QAT model to quantize-dequantize (Q/DQ) pairs, or to exact integer arithmetic.

NNCF's fake quantizers cannot be exported (their guards depend on data), so each is replaced by the pair that int8
backends understand: `real = scale * (integer - zero_point)`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from nncf.torch.function_hook import get_hook_storage
from torch import Tensor, nn
from torch.ao.quantization.fx._decomposed import quantized_decomposed_lib  # noqa: F401 - registers the operators

from eyas_host.quant.quantizers import (
    Affine,
    activation_quantizers,
    affine,
    hook_owners,
    input_quantizers,
    module_of,
    weight_quantizers,
)

_OPS = torch.ops.quantized_decomposed


class ActivationPair(nn.Module):
    """Quantizes an activation to int8 and back, per tensor."""

    def __init__(self, grid: Affine) -> None:
        super().__init__()
        self.scale, self.zero_point = float(grid.scale), int(grid.zero_point)

    def forward(self, x: Tensor) -> Tensor:
        """Quantize and dequantize; same shape."""
        integers = _OPS.quantize_per_tensor(x, self.scale, self.zero_point, -128, 127, torch.int8)
        values: Tensor = _OPS.dequantize_per_tensor(integers, self.scale, self.zero_point, -128, 127, torch.int8)
        return values


class WeightPair(nn.Module):
    """Quantizes a weight to int8 and back, per output channel with zero point 0."""

    scale: Tensor
    zero_point: Tensor

    def __init__(self, grid: Affine) -> None:
        super().__init__()
        self.register_buffer("scale", grid.scale.float())
        self.register_buffer("zero_point", grid.zero_point)

    def forward(self, weight: Tensor) -> Tensor:
        """Quantize and dequantize; same shape."""
        integers = _OPS.quantize_per_channel(weight, self.scale, self.zero_point, 0, -127, 127, torch.int8)
        values: Tensor = _OPS.dequantize_per_channel(integers, self.scale, self.zero_point, 0, -127, 127, torch.int8)
        return values


class ExactRound(nn.Module):
    """Quantizes to the int8 grid in float64, rounding half to even."""

    def __init__(self, grid: Affine) -> None:
        super().__init__()
        self.scale, self.zero_point = float(grid.scale), int(grid.zero_point)

    def forward(self, x: Tensor) -> Tensor:
        """Quantize and dequantize; same shape."""
        integers = torch.clamp(torch.round(x / self.scale) + self.zero_point, -128, 127)
        return (integers - self.zero_point) * self.scale


class Float64(nn.Module):
    """Runs a float64 network on float32 pixels and returns float32 logits."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, pixels: Tensor) -> Tensor:
        """Return logits [n, classes] for float pixels [n, 3, h, w], 0..255."""
        logits: Tensor = self.network(pixels.double())
        return logits.float()


def to_qdq(qat_model: nn.Module) -> nn.Module:
    """A copy of the QAT model with a Q/DQ pair in place of each quantizer, ready for export.

    Raises `CompressError` for a quantizer that int8 backends cannot represent.
    """
    model = copy.deepcopy(qat_model).cpu().eval()
    replace_activations(model, ActivationPair)
    _replace(model, weight_quantizers(model), WeightPair)
    return model


@torch.no_grad()
def bake_weights(qat_model: nn.Module) -> nn.Module:
    """A copy of the QAT model with convolution weights rounded to their int8 grid and without weight quantizers."""
    model = copy.deepcopy(qat_model).cpu().eval()
    quantizers = weight_quantizers(model)
    for operation, quantizer in quantizers.items():
        module: Any = module_of(model, operation)
        module.weight.copy_(WeightPair(affine(quantizer))(module.weight))
    _replace(model, quantizers, lambda grid: nn.Identity())
    return model


@torch.no_grad()
def exact_int8(qat_model: nn.Module, *, input_size: int) -> nn.Module:
    """The QAT model in exact integer arithmetic: the noise floor of any comparison with an int8 backend.

    Sums of products of integers below 2^53 are exact in float64; biases are rounded to the accumulator's scale, as in
    int8 kernels; activations between convolutions are quantized from float64.
    """
    sources = input_quantizers(qat_model, torch.zeros(1, 3, input_size, input_size))
    scales = {operation: affine(q).scale for operation, q in activation_quantizers(qat_model).items()}
    model = bake_weights(qat_model).double()
    for operation, quantizer in weight_quantizers(qat_model).items():
        module: Any = module_of(model, operation)
        if module.bias is not None:
            unit = affine(quantizer).scale * scales[sources[operation]]
            module.bias.copy_(torch.round(module.bias / unit) * unit)
    replace_activations(model, ExactRound)
    return Float64(model).eval()


_Module = TypeVar("_Module", bound=nn.Module)


def replace_activations(model: nn.Module, make: Callable[[Affine], _Module]) -> dict[str, _Module]:
    """Replace each activation quantizer by `make(grid)`; returns operation -> the new module."""
    return _replace(model, activation_quantizers(model), make)


def _replace(
    model: nn.Module, quantizers: Mapping[str, nn.Module], make: Callable[[Affine], _Module]
) -> dict[str, _Module]:
    owners = hook_owners(get_hook_storage(model))
    replaced = {}
    for operation, quantizer in quantizers.items():
        parent, name = owners[id(quantizer)]
        replaced[operation] = make(affine(quantizer))
        setattr(parent, name, replaced[operation])
    return replaced
