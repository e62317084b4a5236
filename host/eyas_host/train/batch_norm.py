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
    rest = [getattr(layer, name) for name in ("drop", "act") if hasattr(layer, name)]  # of timm's BatchNormAct2d

    def forward(images: Tensor) -> Tensor:
        if not layer.training:
            return own(images)  # type: ignore[no-any-return]
        output, mean, unbiased = _Normalise.apply(images, layer.weight, layer.bias, layer.eps)  # type: ignore[no-untyped-call]
        if layer.track_running_stats:
            layer.num_batches_tracked.add_(1)
            layer.running_mean.lerp_(mean.to(layer.running_mean.dtype), layer.momentum)
            layer.running_var.lerp_(unbiased.to(layer.running_var.dtype), layer.momentum)
        for more in rest:
            output = more(output)
        return output  # type: ignore[no-any-return]

    return forward


class _Normalise(torch.autograd.Function):
    """Normalise a shard [n, channels, ...] by mean and variance of all shards, then scale and shift each channel.

    The gradient of a batch that is normalised by its own statistics (Ioffe and Szegedy, "Batch Normalization", 2015,
    section 3) has two sums over the batch, which are those of all shards. Weight and bias get the shard's share of
    their gradients, as every other parameter does.
    """

    @staticmethod
    def forward(ctx: Any, images: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
        mean, variance = _statistics(images)
        sums = torch.cat([mean, torch.addcmul(variance, mean, mean), mean.new_ones(1)])
        sums = distributed.sum_numbers(sums.mul_(images.numel() // images.shape[1])).to(images.device)
        count = sums[-1]
        mean, square = sums[:-1].div_(count).chunk(2)
        variance = torch.addcmul(square, mean, mean, value=-1.0).clamp_(min=0)
        unbiased = variance * (count / (count - 1).clamp_(min=1))
        mean, variance = mean.to(weight.dtype), variance.to(weight.dtype)
        output = torch.native_batch_norm(images, weight, bias, mean, variance, False, 0.0, eps)[0]
        ctx.save_for_backward(images, weight, mean, variance, count)
        ctx.eps = eps
        ctx.mark_non_differentiable(mean, unbiased)
        return output, mean, unbiased

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor, None]:
        images, weight, mean, variance, count = ctx.saved_tensors
        scale = (variance + ctx.eps).rsqrt()
        _, of_weight, of_bias = torch.ops.aten.native_batch_norm_backward(
            gradient, images, weight, None, None, mean, scale, True, ctx.eps, [False, True, True]
        )
        own = torch.cat([of_weight, of_bias])
        means = (distributed.sum_numbers(own).to(images.device) / count).to(weight.dtype)
        factor = weight * scale
        of_product, of_gradient = (-means).chunk(2)
        # factor * (gradient - its mean - normalised images * mean of their product), in two passes over the images
        through = torch.native_batch_norm(
            images, factor * of_product, factor * of_gradient, mean, variance, False, 0.0, ctx.eps
        )[0]
        through.addcmul_(gradient, factor.view(1, -1, *[1] * (images.ndim - 2)))
        return through, of_weight, of_bias, None


def _statistics(images: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of each channel of a shard, float64 [channels]; torch.var_mean is ten times slower."""
    mean, variance = torch.batch_norm_update_stats(images, None, None, 0.0)
    return mean.double(), variance.double()
