"""BatchNorm over the whole batch of several processes, as one process has it.

Normalised by its own share alone, each process would train another function: with 16 images of 64 px a last layer has
64 values to estimate a mean from, and a student that reached .97 in one process reached .90 in two.
`torch.nn.SyncBatchNorm` does this on GPUs only; here it is a few sums more on any device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from eyas_host.pipeline import distributed


@contextmanager
def whole_batch_norms(model: nn.Module) -> Iterator[None]:
    """Let the BatchNorm layers of `model` that train use the statistics of all processes' images meanwhile."""
    layers = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    if distributed.world_size() == 1 or not layers:
        yield
        return
    for layer in layers:
        layer.forward = _forward_of(layer)  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def _forward_of(layer: Any) -> Callable[[Tensor], Tensor]:
    own = layer.forward

    def forward(images: Tensor) -> Tensor:
        if not layer.training:
            return own(images)  # type: ignore[no-any-return]
        output, mean, variance, count = _Normalise.apply(images, layer.weight, layer.bias, layer.eps)  # type: ignore[no-untyped-call]
        if layer.track_running_stats:
            layer.num_batches_tracked.add_(1)
            with torch.no_grad():
                unbiased = variance * (count / (count - 1).clamp(min=1))
                layer.running_mean.lerp_(mean.to(layer.running_mean.dtype), layer.momentum)
                layer.running_var.lerp_(unbiased.to(layer.running_var.dtype), layer.momentum)
        for more in ("drop", "act"):  # of timm's BatchNormAct2d
            output = getattr(layer, more)(output) if hasattr(layer, more) else output
        return output  # type: ignore[no-any-return]

    return forward


class _Normalise(torch.autograd.Function):
    """Normalise a shard [n, channels, ...] by mean and variance of all shards, then scale and shift each channel.

    The gradient of a batch that is normalised by its own statistics (Ioffe and Szegedy, "Batch Normalization", 2015,
    section 3) has two sums over the batch, which are those of all shards. Weight and bias get the shard's share of
    their gradients, as every other parameter does.
    """

    @staticmethod
    def forward(
        ctx: Any, images: Tensor, weight: Tensor, bias: Tensor, eps: float
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        values = float(images.numel() // images.shape[1])
        mean, variance = _statistics(images)
        sums = torch.cat([mean * values, (variance + mean**2) * values, mean.new_tensor([values])])
        sums = distributed.sum_numbers(sums).to(images.device)
        count = sums[-1]
        mean, square = (sums[:-1] / count).chunk(2)
        variance = (square - mean**2).clamp(min=0)
        mean, variance = mean.to(images.dtype), variance.to(images.dtype)
        output = torch.native_batch_norm(images, weight, bias, mean, variance, False, 0.0, eps)[0]
        ctx.save_for_backward(images, weight, mean, variance, count)
        ctx.eps = eps
        ctx.mark_non_differentiable(mean, variance, count)
        return output, mean, variance, count

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor, None]:
        images, weight, mean, variance, count = ctx.saved_tensors
        scale = (variance + ctx.eps).rsqrt()
        by_own_sums, of_weight, of_bias = torch.ops.aten.native_batch_norm_backward(
            gradient, images, weight, None, None, mean, scale, True, ctx.eps, [True, True, True]
        )
        own = torch.cat([of_weight, of_bias]).double()
        own_count = images.numel() // images.shape[1]
        missing = own / own_count - distributed.sum_numbers(own).to(images.device) / count
        missing_weight, missing_bias = missing.to(images.dtype).chunk(2)
        slope = weight * scale**2 * missing_weight
        offset = weight * scale * missing_bias - slope * mean
        shape = [1, -1, *[1] * (images.ndim - 2)]
        through = torch.addcmul(by_own_sums, images, slope.view(shape)).add_(offset.view(shape))
        return through, of_weight, of_bias, None


def _statistics(images: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of each channel of a shard, float64 [channels]; torch.var_mean is ten times slower."""
    mean, variance = torch.batch_norm_update_stats(images, None, None, 0.0)
    return mean.double(), variance.double()
