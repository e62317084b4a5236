"""A QAT model in exact integer arithmetic, the noise floor of any comparison with an int8 backend.

A convolution multiplies and adds integers. float32 holds all integers up to 2^24, so its fast kernels compute such sums
exactly, in whatever order they add, as long as no partial sum can be larger; other layers take float64. Everything
between two convolutions is computed in float64.
"""

from __future__ import annotations

from typing import Any

import torch
from nncf.torch.function_hook import get_hook_storage, register_post_function_hook, register_pre_function_hook
from torch import Tensor, nn

from eyas_host.quant.integers import INT32_MAX, bias_units, weight_integers
from eyas_host.quant.qdq import bake_weights, replace_activations, round_weights
from eyas_host.quant.quantizers import Affine, activation_quantizers, affine, hook_owners, input_quantizers, module_of

_FLOAT32_INTEGERS = 2**24


class ExactRound(nn.Module):
    """Quantizes to the int8 grid in float64, rounding half to even."""

    def __init__(self, grid: Affine) -> None:
        super().__init__()
        self.scale, self.zero_point = float(grid.scale), int(grid.zero_point)

    def forward(self, x: Tensor) -> Tensor:
        """Quantize and dequantize; same shape."""
        integers = (x / self.scale).round_().add_(self.zero_point).clamp_(-128, 127)
        return integers.sub_(self.zero_point).mul_(self.scale)


class _Integers(nn.Module):
    """The integers of values on an activation's grid, without its zero point, in the type of the convolution."""

    kind: Tensor

    def __init__(self, scale: float, kind: torch.dtype) -> None:
        super().__init__()
        self.scale = scale
        self.register_buffer("kind", torch.zeros((), dtype=kind))

    def forward(self, x: Tensor) -> Tensor:
        return (x / self.scale).round_().to(self.kind.dtype)


class _Accumulators(nn.Module):
    """Adds a convolution's bias to its sums, saturates them in 32 bits, and returns their float64 values."""

    bias: Tensor
    unit: Tensor

    def __init__(self, bias: Tensor, unit: Tensor) -> None:
        super().__init__()
        self.register_buffer("bias", bias.double().reshape(1, -1, 1, 1))
        self.register_buffer("unit", unit.double().reshape(1, -1, 1, 1))

    def forward(self, sums: Tensor) -> Tensor:
        return (sums.double() + self.bias).clamp_(-INT32_MAX, INT32_MAX).mul_(self.unit)


class ExactNetwork(nn.Module):
    """Runs a network of exact integer arithmetic on float32 pixels and returns float32 logits."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, pixels: Tensor) -> Tensor:
        """Return logits [n, classes] for float pixels [n, 3, h, w], 0..255."""
        logits: Tensor = self.network(pixels.double())
        return logits.float()

    def place(self, device: torch.device) -> ExactNetwork:
        """Move the network; a GPU's fast convolutions transform their inputs, so that there all sums are float64."""
        return self.to(device, torch.float64) if device.type == "cuda" else self.to(device)


@torch.no_grad()
def exact_int8(qat_model: nn.Module, *, input_size: int) -> ExactNetwork:
    """The QAT model in exact integer arithmetic.

    Biases are rounded to the accumulator's scale and, like the sums, held within 32 bits, as in int8 kernels;
    activations between convolutions are quantized from float64.
    """
    rounded = round_weights(qat_model)
    model = bake_weights(rounded).double()
    weights, units = weight_integers(rounded), bias_units(rounded, input_size=input_size)
    sources = input_quantizers(rounded, torch.zeros(1, 3, input_size, input_size))
    grids = {operation: affine(quantizer) for operation, quantizer in activation_quantizers(rounded).items()}
    quantizers = replace_activations(model, ExactRound)
    for operation, integers in weights.items():
        module: Any = module_of(model, operation)
        grid, unit = grids[sources[operation]], units[operation]
        kind = _sum_type(integers, grid)
        bias = torch.zeros(len(integers)) if module.bias is None else module.bias
        accumulators = _Accumulators((bias.double() / unit).round().clamp(-INT32_MAX, INT32_MAX), unit)
        module.weight, module.bias = nn.Parameter(integers.to(kind)), None
        register_pre_function_hook(model, operation, 0, _Integers(float(grid.scale), kind))
        if operation in quantizers:
            parent, name = hook_owners(get_hook_storage(model))[id(quantizers[operation])]
            setattr(parent, name, nn.Sequential(accumulators, quantizers[operation]))
        else:
            register_post_function_hook(model, operation, 0, accumulators)
    return ExactNetwork(model).eval()


def _sum_type(weights: Tensor, grid: Affine) -> torch.dtype:
    """float32 if it holds every partial sum of a filter's products [channels, ...], else float64."""
    largest = max(grid.high - int(grid.zero_point), int(grid.zero_point) - grid.low)
    reach = int(weights.abs().flatten(1).sum(1).max()) * largest
    return torch.float32 if reach <= _FLOAT32_INTEGERS else torch.float64
