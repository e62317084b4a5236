"""Convert a QAT model to quantize-dequantize (Q/DQ) pairs, or bake its weights.

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
        self.low, self.high = grid.low, grid.high

    def forward(self, weight: Tensor) -> Tensor:
        """Quantize and dequantize; same shape."""
        scale, zero, ends = self.scale, self.zero_point, (self.low, self.high)
        integers = _OPS.quantize_per_channel(weight, scale, zero, 0, *ends, torch.int8)
        values: Tensor = _OPS.dequantize_per_channel(integers, scale, zero, 0, *ends, torch.int8)
        return values


def to_qdq(qat_model: nn.Module) -> nn.Module:
    """A copy of the QAT model with a Q/DQ pair in place of each quantizer, ready for export.

    Raises `CompressError` for a quantizer that int8 backends cannot represent.
    """
    model = round_weights(qat_model)
    replace_activations(model, ActivationPair)
    _replace(model, weight_quantizers(model), WeightPair)
    return model


@torch.no_grad()
def round_weights(qat_model: nn.Module) -> nn.Module:
    """A copy of the QAT model with its weights rounded to their grid, so that every backend stores the same integers.

    Backends round in float32 with steps of their own, and a weight halfway between two integers would fall either way.
    """
    model = copy.deepcopy(qat_model).cpu().eval()
    for operation, quantizer in weight_quantizers(model).items():
        module: Any = module_of(model, operation)
        grid = affine(quantizer)
        module.weight.copy_(
            grid.integers(module.weight) * grid.scale.reshape(-1, *(1 for _ in module.weight.shape[1:]))
        )
    return model


def bake_weights(qat_model: nn.Module) -> nn.Module:
    """A copy of the QAT model with convolution weights rounded to their grid and without weight quantizers."""
    model = round_weights(qat_model)
    _replace(model, weight_quantizers(model), lambda grid: nn.Identity())
    return model


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
