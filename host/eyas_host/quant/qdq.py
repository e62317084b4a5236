"""A QAT model as plain quantize-dequantize pairs, and as exact integer arithmetic.

NNCF's fake quantizers cannot be exported (their guards depend on data), so each is replaced by the pair that an int8
backend understands: `real = scale * (integer - zero_point)`.
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
    feeding_quantizers,
    module_of,
    quantizer_places,
    weight_quantizers,
)

_OPS = torch.ops.quantized_decomposed


class ActivationPair(nn.Module):
    """Rounds an activation to int8 and back, one scale for the tensor."""

    def __init__(self, grid: Affine) -> None:
        super().__init__()
        self.scale, self.zero_point = float(grid.scale), int(grid.zero_point)

    def forward(self, x: Tensor) -> Tensor:
        """The nearest values on the int8 grid; same shape."""
        integers = _OPS.quantize_per_tensor(x, self.scale, self.zero_point, -128, 127, torch.int8)
        values: Tensor = _OPS.dequantize_per_tensor(integers, self.scale, self.zero_point, -128, 127, torch.int8)
        return values


class WeightPair(nn.Module):
    """Rounds a weight to int8 and back, one scale an output channel, zero point 0."""

    scale: Tensor
    zero_point: Tensor

    def __init__(self, grid: Affine) -> None:
        super().__init__()
        self.register_buffer("scale", grid.scale.float())
        self.register_buffer("zero_point", grid.zero_point)

    def forward(self, weight: Tensor) -> Tensor:
        """The nearest values on the int8 grid; same shape."""
        integers = _OPS.quantize_per_channel(weight, self.scale, self.zero_point, 0, -127, 127, torch.int8)
        values: Tensor = _OPS.dequantize_per_channel(integers, self.scale, self.zero_point, 0, -127, 127, torch.int8)
        return values


class ExactRound(nn.Module):
    """Rounds half to even on the int8 grid in float64."""

    def __init__(self, grid: Affine) -> None:
        super().__init__()
        self.scale, self.zero_point = float(grid.scale), int(grid.zero_point)

    def forward(self, x: Tensor) -> Tensor:
        """The nearest values on the int8 grid; same shape."""
        integers = torch.clamp(torch.round(x / self.scale) + self.zero_point, -128, 127)
        return (integers - self.zero_point) * self.scale


class Float64(nn.Module):
    """Runs a float64 network on float32 pixels and hands back float32 logits."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, pixels: Tensor) -> Tensor:
        """Logits [n, classes] of float pixels [n, 3, h, w], 0..255."""
        logits: Tensor = self.network(pixels.double())
        return logits.float()


def to_qdq(qat_model: nn.Module) -> nn.Module:
    """A copy of the QAT model with a quantize-dequantize pair for each quantizer: what is exported.

    Raises `CompressError` for a quantizer that int8 backends cannot follow.
    """
    model = copy.deepcopy(qat_model).cpu().eval()
    replace_activations(model, ActivationPair)
    _replace(model, weight_quantizers(model), WeightPair)
    return model


@torch.no_grad()
def bake_weights(qat_model: nn.Module) -> nn.Module:
    """A copy of the QAT model whose convolution weights lie on their int8 grid and are no longer quantized."""
    model = copy.deepcopy(qat_model).cpu().eval()
    quantizers = weight_quantizers(model)
    for operation, quantizer in quantizers.items():
        module: Any = module_of(model, operation)
        module.weight.copy_(WeightPair(affine(quantizer))(module.weight))
    _replace(model, quantizers, lambda grid: nn.Identity())
    return model


@torch.no_grad()
def exact_int8(qat_model: nn.Module, *, input_size: int) -> nn.Module:
    """The QAT model in exact integer arithmetic: the floor of what a comparison with an int8 backend can show.

    Sums of products of integers below 2^53 are exact in float64; biases are rounded to the scale of the accumulator, as
    int8 kernels hold them; activations between convolutions are rounded from float64.
    """
    feeds = feeding_quantizers(qat_model, torch.zeros(1, 3, input_size, input_size))
    scales = {operation: affine(q).scale for operation, q in activation_quantizers(qat_model).items()}
    model = bake_weights(qat_model).double()
    for operation, quantizer in weight_quantizers(qat_model).items():
        module: Any = module_of(model, operation)
        if module.bias is not None:
            unit = affine(quantizer).scale * scales[feeds[operation]]
            module.bias.copy_(torch.round(module.bias / unit) * unit)
    replace_activations(model, ExactRound)
    return Float64(model).eval()


_Module = TypeVar("_Module", bound=nn.Module)


def replace_activations(model: nn.Module, make: Callable[[Affine], _Module]) -> dict[str, _Module]:
    """Put `make(grid)` in the place of each activation quantizer; returns operation -> what stands there now."""
    return _replace(model, activation_quantizers(model), make)


def _replace(
    model: nn.Module, quantizers: Mapping[str, nn.Module], make: Callable[[Affine], _Module]
) -> dict[str, _Module]:
    places = quantizer_places(get_hook_storage(model))
    replaced = {}
    for operation, quantizer in quantizers.items():
        parent, name = places[id(quantizer)]
        replaced[operation] = make(affine(quantizer))
        setattr(parent, name, replaced[operation])
    return replaced
