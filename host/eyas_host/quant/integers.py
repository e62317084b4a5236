"""The integers of a QAT model: what an int8 backend stores, and whether its 32-bit sums can hold them."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from eyas_host.quant.graph import layer_name
from eyas_host.quant.quantizers import (
    activation_quantizers,
    affine,
    input_quantizers,
    module_of,
    weight_of,
    weight_quantizers,
)
from eyas_host.support.errors import CompressError

INT32_MAX = 2**31 - 1
_MAX_NAMED = 3


def weight_integers(qat_model: nn.Module) -> dict[str, Tensor]:
    """Operation -> the integer weights that every backend stores: int64, the weight's shape."""
    return {
        operation: affine(quantizer).integers(weight_of(qat_model, operation))
        for operation, quantizer in weight_quantizers(qat_model).items()
    }


def bias_units(qat_model: nn.Module, *, input_size: int, activation_bits: Literal[8, 16] = 8) -> dict[str, Tensor]:
    """Operation -> the value of one step of each channel's accumulator: weight scale x input scale, float64 [channels].

    With 16 bits an activation's range is the learned one made symmetric, in 2^15 - 1 steps.
    """
    grids = {operation: affine(quantizer) for operation, quantizer in activation_quantizers(qat_model).items()}
    sources = input_quantizers(qat_model, torch.zeros(1, 3, input_size, input_size))
    units = {}
    for operation, quantizer in weight_quantizers(qat_model).items():
        grid = grids[sources[operation]]
        scale = float(grid.scale) if activation_bits == 8 else max(map(abs, grid.bounds)) / (2**15 - 1)
        units[operation] = affine(quantizer).scale * scale
    return units


def check_accumulators(qat_model: nn.Module, *, input_size: int, activation_bits: Literal[8, 16] = 8) -> None:
    """Check that no sum of a layer leaves its accumulator: int32, with 16-bit activations int64.

    The bound holds for every image: the bias plus the largest activation times the sum of the absolute weights. A bias
    is stored in steps of the accumulator, so a channel with a bias but hardly any weight needs the most.

    Raises:
        CompressError: a channel does not fit; the message names the layer, the channel and the way out.

    """
    limit, largest_input = (INT32_MAX, 255) if activation_bits == 8 else (2**63 - 1, 2**15 - 1)
    units = bias_units(qat_model, input_size=input_size, activation_bits=activation_bits)
    problems, layers = [], []
    for operation, weights in weight_integers(qat_model).items():
        module: Any = module_of(qat_model, operation)
        if module.bias is None:
            continue
        bias = module.bias.detach().double()
        steps = bias / units[operation]
        reach = steps.abs() + largest_input * weights.abs().flatten(1).sum(1).double()
        for channel in torch.nonzero(~(reach <= limit)).flatten().tolist():
            layers.append(layer_name(operation))
            problems.append(
                f"{layers[-1]}, channel {channel}: bias {float(bias[channel]):g} is {float(steps[channel]):.3g} "
                f"steps of {float(units[operation][channel]):.3g}"
            )
    if problems:
        shown = "; ".join(problems[:_MAX_NAMED]) + (f"; {len(problems)} in all" if len(problems) > _MAX_NAMED else "")
        names = ", ".join(f'"{name}"' for name in dict.fromkeys(layers))
        raise CompressError(
            f"int{32 if activation_bits == 8 else 64} accumulators hold sums up to {limit}: {shown}; "
            f"[quantize] keep_float = [{names}] keeps them in float"
        )
