"""The arithmetic of simulated int8: rounding to a grid, and its gradient, as torch operations.

NNCF compiles kernels for both at their first use, which takes half a minute and a C++ compiler. These give the same
values, to the bit where they round; the gradient of a tensor with one grid takes a quarter of the time on a processor.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

_LOWEST, _HIGHEST = np.float32(-np.inf), np.float32(np.inf)


class FakeQuantize:
    """NNCF's two functions, by their names there."""

    @staticmethod
    def Quantize_forward(x: Tensor, low: Tensor, span: Tensor, levels: int) -> Tensor:  # noqa: N802 - NNCF's name
        """Round `x` to one of `levels` values from `low` to `low + span`, of which one is 0; same shape.

        `low` and `span` have one value, or one for each channel, [channels, 1, ...].
        """
        grid = low, low + span, *_steps(low, span, levels)
        return _rounded(x, *(value.item() for value in grid)) if _is_one_grid(x, span) else _rounded(x, *grid)

    @staticmethod
    def Quantize_backward(  # noqa: N802 - NNCF's name
        gradient: Tensor, x: Tensor, low: Tensor, span: Tensor, levels: int, level_low: int, level_high: int, *_: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of `x`, `low` and `span` for the `gradient` of the rounded values.

        Rounding counts as the identity (Bengio, Léonard and Courville, "Estimating or Propagating Gradients Through
        Stochastic Neurons", 2013). Values outside of the grid have no gradient; they move its ends, whose gradient is
        exactly 0 where there are none: an optimizer that divides by a gradient's size makes a step of any remainder.
        """
        error = FakeQuantize.Quantize_forward(x, low, span, levels).sub_(x)
        high = low + span
        if _is_one_grid(x, span):
            first, last = low.item(), high.item()
            ends = float(np.nextafter(np.float32(first), _LOWEST)), float(np.nextafter(np.float32(last), _HIGHEST))
            inside = torch.ops.aten.hardtanh_backward(gradient, x, *ends)
            above = torch.ops.aten.threshold_backward(gradient, x, last)
        else:
            inside = torch.where((x < low) | (x > high), 0.0, gradient)
            above = torch.where(x > high, gradient, 0.0)
        outside = gradient - inside
        of_low = outside.sum_to_size(low.shape)
        of_span = error.mul_(inside).sum_to_size(span.shape) / span + above.sum_to_size(span.shape)
        if level_low:
            of_span += outside.sub_(above).sum_to_size(span.shape) * (level_low / level_high)
        return inside, of_low, of_span


def _steps(low: Tensor, span: Tensor, levels: int) -> tuple[Tensor, Tensor]:
    """Steps of the grid for 1, and the step of 0.

    The number of steps is a tensor: torch divides a Python number by a tensor through its reciprocal.
    """
    steps = span.new_tensor(levels - 1) / span
    return steps, (-low * steps).round_()


def _rounded(x: Tensor, low: Any, high: Any, steps: Any, zero: Any) -> Tensor:
    """Round `x` to a grid of numbers, or of tensors that fit to it."""
    return torch.clamp(x, low, high).sub_(low).mul_(steps).sub_(zero).round_().div_(steps)


def _is_one_grid(x: Tensor, span: Tensor) -> bool:
    """Whether numbers can take the place of tensors, which is faster where it needs no transfer from a GPU."""
    return span.numel() == 1 and x.dtype == torch.float32 and x.device.type == "cpu"
