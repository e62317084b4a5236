"""Grad-CAM at a network's last convolution with a spatial output.

Source: Selvaraju et al., "Grad-CAM: Visual Explanations from Deep Networks via Gradient-based Localization", 2017.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import cv2
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from eyas_device.errors import ImageError
from eyas_device.preprocess import Pixels, Preprocessing, prepare
from eyas_host.data.image_bytes import read_pixels
from eyas_host.data.transforms import Batch
from eyas_host.evaluation.inference import full_float32, to_tensor
from eyas_host.report.model import Explanations, Mistake

Heat = npt.NDArray[np.float32]
"""float32 [n, side, side], 0..1."""

_STRENGTH = 0.55
_MIN_CELLS = 4
"""Rows and columns below which a map shows no place in the image."""
_BATCH = 16
"""Images whose activations and gradients are in memory together."""
_CPU = torch.device("cpu")


def explain_mistakes(
    network: nn.Module,
    mistakes: Sequence[Mistake],
    labels: Sequence[str],
    spec: Preprocessing,
    device: torch.device = _CPU,
) -> Explanations:
    """The images as the model sees them with the evidence for their wrong predictions; unreadable ones are left out.

    A reason instead, for a network that Grad-CAM cannot explain or whose last map is too coarse to show a place.
    """
    images: dict[str, Pixels] = {}
    for mistake in mistakes:
        with contextlib.suppress(ImageError, ValueError):  # ValueError: a path with a null byte
            images[mistake.path] = prepare(read_pixels(mistake.path, spec), spec)
    if not images:
        return Explanations()
    predictions = {mistake.path: labels.index(mistake.prediction) for mistake in mistakes}
    try:
        height, width = map_cells(network, np.stack(list(images.values()))[:1], device)
        if min(height, width) < _MIN_CELLS:
            reason = f"at {spec.size} px the last convolution has {height} × {width} cells, too few to show a place"  # noqa: RUF001
            return Explanations(reason=reason)
        heat = grad_cam(network, np.stack(list(images.values())), [predictions[path] for path in images], device)
    except ValueError as error:
        return Explanations(reason=str(error))
    return Explanations({path: overlay(image, own) for (path, image), own in zip(images.items(), heat, strict=True)})


def grad_cam(network: nn.Module, pixels: Batch, classes: list[int], device: torch.device = _CPU) -> Heat:
    """Evidence for `classes` [n] in prepared pixels uint8 [n, side, side, 3]; the maximum of each image is 1.

    relu(sum_k a_k A_k) with a_k the mean over all positions of d logit / d A_k. An image without evidence for its class
    is all 0. The network is moved to `device`. Raises `ValueError` for a network without a convolution with a spatial
    output.
    """
    network = network.to(device).eval()
    layer = last_convolution(network, pixels[:1], device)
    batches = [slice(first, first + _BATCH) for first in range(0, len(pixels), _BATCH)]
    maps = np.concatenate([_evidence(network, layer, to_tensor(pixels[b], device), classes[b]) for b in batches])
    maximum = maps.max(axis=(1, 2), keepdims=True)
    maps = np.divide(maps, maximum, out=np.zeros_like(maps), where=maximum > 0)
    side = pixels.shape[1]
    return np.stack([cv2.resize(own, (side, side), interpolation=cv2.INTER_LINEAR) for own in maps])


def _evidence(network: nn.Module, layer: nn.Module, pixels: Tensor, classes: list[int]) -> Heat:
    """Unscaled Grad-CAM maps [n, h, w] of pixels uint8 [n, 3, side, side] at `layer`."""
    outputs: list[Tensor] = []
    handle = layer.register_forward_hook(lambda _module, _inputs, output: outputs.append(output))
    try:
        with torch.enable_grad(), full_float32():
            logits = network(pixels.float().requires_grad_())
            chosen = logits[torch.arange(len(classes)), torch.tensor(classes)].sum()
            (gradient,) = torch.autograd.grad(chosen, outputs[-1])
    finally:
        handle.remove()
    maps = (gradient.mean(dim=(2, 3), keepdim=True) * outputs[-1]).sum(dim=1).relu().detach()
    return np.asarray(maps.cpu().numpy())


def map_cells(network: nn.Module, pixels: Batch, device: torch.device = _CPU) -> tuple[int, int]:
    """Rows and columns of the map that Grad-CAM weighs, for prepared pixels uint8 [1, side, side, 3].

    Raises `ValueError` as `last_convolution` does.
    """
    network = network.to(device).eval()
    layer, sizes = last_convolution(network, pixels, device), []
    handle = layer.register_forward_hook(lambda _module, _inputs, output: sizes.append(output.shape[2:]))
    try:
        with torch.no_grad():
            network(to_tensor(pixels, device).float())
    finally:
        handle.remove()
    return int(sizes[-1][0]), int(sizes[-1][1])


def last_convolution(network: nn.Module, pixels: Batch, device: torch.device = _CPU) -> nn.Conv2d:
    """The convolution that runs last among those with more than one position in their output.

    Raises `ValueError` if there is none.
    """
    spatial: list[nn.Conv2d] = []

    def record(module: nn.Module, _inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if isinstance(module, nn.Conv2d) and output.ndim == 4 and output.shape[2] * output.shape[3] > 1:
            spatial.append(module)

    handles = [module.register_forward_hook(record) for module in network.modules() if isinstance(module, nn.Conv2d)]
    try:
        with torch.no_grad():
            network(to_tensor(pixels, device).float())
    finally:
        for handle in handles:
            handle.remove()
    if not spatial:
        raise ValueError("no convolution of this network has a spatial output, which Grad-CAM needs")
    return spatial[-1]


def overlay(image: npt.NDArray[np.uint8], heat: Heat) -> npt.NDArray[np.uint8]:
    """Blend heat [side, side] as colours over an image uint8 [side, side, 3] BGR; where it is 0 the image stays."""
    colours = cv2.applyColorMap((255 * heat).astype(np.uint8), cv2.COLORMAP_INFERNO).astype(np.float32)
    opacity = (_STRENGTH * heat)[..., None]
    return np.asarray((1 - opacity) * image + opacity * colours, dtype=np.uint8)
