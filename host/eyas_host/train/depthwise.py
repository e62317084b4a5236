"""Faster weight gradients of depthwise convolutions on a processor.

For channels-last images oneDNN has no depthwise kernel for them where weights are 5 x 5: it takes the one of dense
convolutions, on blocks of 16 x 16 channels of which a 16th is used, or a matrix product for each channel. A MobileNet
spent a fifth of its step there. But such a gradient is a depthwise convolution itself, and for that oneDNN has one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._C import DispatchKey, DispatchKeySet

_MIN_KERNEL, _MAX_OUTPUT = 5, 8
"""Sides of weights and of outputs between which it is faster: by 1.6 to 10 times, measured with AVX2 and AVX-512."""
_MEASURED = ("AVX2", "AVX512")
_USUAL = DispatchKeySet(DispatchKey.CompositeExplicitAutograd)


@contextmanager
def fast_depthwise_gradients() -> Iterator[None]:
    """Compute the weight gradients of depthwise convolutions on a processor as convolutions, where that is faster."""
    if torch.backends.cpu.get_cpu_capability() not in _MEASURED or not torch.backends.mkldnn.is_available():
        yield
        return
    library = torch.library.Library("aten", "IMPL")
    library.impl("convolution_backward", _convolution_backward, "CPU", with_keyset=True)
    try:
        yield
    finally:
        del library  # which takes it back


def depthwise_weight_gradient(
    gradient: Tensor,
    images: Tensor,
    sides: Sequence[int],
    *,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    """Gradient [c, 1, *sides] of the weight of a depthwise convolution with these settings.

    It is the sum over images and positions of the output's `gradient` [n, c, h, w] times the pixels of `images` that
    the weight met there. In one channel of one image that is a convolution of the pixels, whose weight is the gradient
    and whose dilation is the stride; channels and images together are the channels of one depthwise convolution.
    """
    (count, channels, height, width), (rows, columns) = gradient.shape, sides
    together = count * channels
    signal = images.permute(2, 3, 0, 1).reshape(1, *images.shape[2:], together).permute(0, 3, 1, 2)
    weight = gradient.permute(2, 3, 0, 1).reshape(1, height, width, together).permute(3, 0, 1, 2)
    each = F.conv2d(signal, weight, stride=dilation, padding=padding, dilation=stride, groups=together)
    each = each[0, :, :rows, :columns].permute(1, 2, 0).reshape(rows, columns, count, channels)
    return each.sum(2).permute(2, 0, 1).unsqueeze(1)


def _convolution_backward(
    _keys: DispatchKeySet,
    gradient: Tensor,
    images: Tensor,
    weight: Tensor,
    bias_sizes: Sequence[int] | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
    wanted: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """`aten::convolution_backward`: gradients of images, weight and bias, as far as `wanted`."""
    faster = wanted[1] and not transposed and _is_faster(gradient, images, weight, groups)
    settings: Any = (
        gradient,
        images,
        weight,
        bias_sizes,
        stride,
        padding,
        dilation,
        transposed,
        output_padding,
        groups,
    )
    rest = [wanted[0], wanted[1] and not faster, wanted[2]]
    of_images, of_weight, of_bias = torch.ops.aten.convolution_backward.default.redispatch(_USUAL, *settings, rest)
    if faster:
        of_weight = depthwise_weight_gradient(
            gradient, images, weight.shape[2:], stride=stride, padding=padding, dilation=dilation
        )
    return of_images, of_weight, of_bias


def _is_faster(gradient: Tensor, images: Tensor, weight: Tensor, groups: int) -> bool:
    return (
        weight.ndim == 4
        and len(images) > 0  # a process's shard of a last batch may be empty
        and weight.shape[1] == 1
        and groups == len(weight) == images.shape[1]
        and min(weight.shape[2:]) >= _MIN_KERNEL
        and max(gradient.shape[2:]) <= _MAX_OUTPUT
        and {gradient.dtype, images.dtype} == {torch.float32}
        and images.is_contiguous(memory_format=torch.channels_last)
    )
