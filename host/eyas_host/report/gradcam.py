"""Where a network looked: Grad-CAM at its last convolution that still has a place in the image.

Source: Selvaraju et al., "Grad-CAM: Visual Explanations from Deep Networks via Gradient-based Localization", 2017.
"""

from __future__ import annotations

import cv2
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from eyas_host.data.transforms import Batch
from eyas_host.evaluate.inference import to_tensor

Heat = npt.NDArray[np.float32]
"""float32 [images, side, side], 0..1."""

_STRENGTH = 0.55


def grad_cam(network: nn.Module, pixels: Batch, classes: list[int]) -> Heat:
    """What speaks for `classes` [n] in prepared pixels uint8 [n, side, side, 3]; each image's largest value is 1.

    relu(sum_k a_k A_k) with a_k the mean over all places of d logit / d A_k. An image in which nothing speaks for its
    class is all 0. Raises `ValueError` for a network without a convolution whose output has places.
    """
    network.eval()
    layer = last_convolution(network, pixels[:1])
    kept: list[Tensor] = []
    handle = layer.register_forward_hook(lambda _module, _given, output: kept.append(output))
    try:
        with torch.enable_grad():
            logits = network(to_tensor(pixels, torch.device("cpu")).float().requires_grad_())
            chosen = logits[torch.arange(len(classes)), torch.tensor(classes)].sum()
            (slope,) = torch.autograd.grad(chosen, kept[-1])
    finally:
        handle.remove()
    maps = (slope.mean(dim=(2, 3), keepdim=True) * kept[-1]).sum(dim=1).relu().detach().numpy()
    top = maps.max(axis=(1, 2), keepdims=True)
    maps = np.divide(maps, top, out=np.zeros_like(maps), where=top > 0)
    side = pixels.shape[1]
    return np.stack([cv2.resize(one, (side, side), interpolation=cv2.INTER_LINEAR) for one in maps])


def last_convolution(network: nn.Module, pixels: Batch) -> nn.Conv2d:
    """The convolution that runs last among those with more than one place in their output.

    Raises `ValueError` if there is none.
    """
    found: list[nn.Conv2d] = []

    def ran(module: nn.Module, _given: tuple[Tensor, ...], output: Tensor) -> None:
        if isinstance(module, nn.Conv2d) and output.ndim == 4 and output.shape[2] * output.shape[3] > 1:
            found.append(module)

    handles = [module.register_forward_hook(ran) for module in network.modules() if isinstance(module, nn.Conv2d)]
    try:
        with torch.no_grad():
            network(to_tensor(pixels, torch.device("cpu")).float())
    finally:
        for handle in handles:
            handle.remove()
    if not found:
        raise ValueError("no convolution of this network has places in its output; Grad-CAM needs one")
    return found[-1]


def overlay(image: npt.NDArray[np.uint8], heat: Heat) -> npt.NDArray[np.uint8]:
    """Heat [side, side] in colours over an image uint8 [side, side, 3] BGR; what is cold stays as it is."""
    colours = cv2.applyColorMap((255 * heat).astype(np.uint8), cv2.COLORMAP_INFERNO).astype(np.float32)
    share = (_STRENGTH * heat)[..., None]
    return np.asarray((1 - share) * image + share * colours, dtype=np.uint8)
