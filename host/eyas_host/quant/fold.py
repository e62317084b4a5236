"""Fold preprocessing and batch normalisation into the convolutions before a model is quantized or compiled.

A camera delivers BGR bytes and a convolution is linear, so the channel swap, the division by the standard deviation and
every batch normalisation are folded into convolution weights. Only ``x - mean`` stays: folding it too would change the
image's border, because the convolution pads with zeros *after* normalisation.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_weights

from eyas_host.support.errors import CompressError

_PROBE_SIZE = 64  # pixels; large enough that no stage of a /32 network shrinks to nothing
_TOLERANCE = 1e-3  # of the largest logit; float32 rounding through 60 layers stays below 1e-4


class DeployModel(nn.Module):
    """A network as devices run it: BGR pixels in, logits out, only convolutions and activations inside.

    Args:
        backbone: network that takes ``pixels - mean`` in BGR order, without any batch normalisation.
        mean_bgr: per-channel mean in pixel units (0..255), ``[1, 3, 1, 1]``, or ``[1, 1, 1, 1]`` when all are equal.

    """

    mean: Tensor

    def __init__(self, backbone: nn.Module, mean_bgr: Tensor) -> None:
        super().__init__()
        self.backbone = backbone
        self.register_buffer("mean", mean_bgr)

    def forward(self, pixels: Tensor) -> Tensor:
        """Return logits ``[N, C]`` for float pixels ``[N, 3, H, W]``, values 0..255, BGR order."""
        logits: Tensor = self.backbone(pixels - self.mean)
        return logits


def fold_for_deployment(model: nn.Module) -> DeployModel:
    """Return a folded, still trainable copy of ``model`` that computes the same function.

    Args:
        model: a ``PixelClassifier``: attributes ``backbone`` (takes normalised RGB), ``mean`` and ``std`` (buffers of
            three values in RGB order, pixel units). It is not changed. Channel-pruned and sparse backbones are fine.

    Returns:
        The folded model in evaluation mode. Its ``state_dict`` loads into any other fold of the same architecture.

    Raises:
        CompressError: a batch normalisation does not directly follow a convolution, the network does not begin with a
            plain three-channel convolution, or the folded network does not compute what the original does.

    """
    backbone = cast(nn.Module, copy.deepcopy(model.backbone)).eval()
    stem = _fold_norms(backbone)
    device = next(backbone.parameters()).device
    mean_rgb = torch.as_tensor(model.mean).detach().to(device).reshape(3)
    std_rgb = torch.as_tensor(model.std).detach().to(device).reshape(3)
    with torch.no_grad():
        stem.weight.copy_((stem.weight / std_rgb.reshape(1, 3, 1, 1)).flip(1))
    mean_bgr = mean_rgb.flip(0).reshape(1, 3, 1, 1)
    if bool((mean_bgr == mean_bgr[:, :1]).all()):
        mean_bgr = mean_bgr[:, :1]
    deploy = DeployModel(backbone, mean_bgr.clone()).eval()
    _check_same(model, deploy, device)
    return deploy


def fold_norms(backbone: nn.Module) -> nn.Module:
    """Return a copy of a backbone with every batch normalisation folded into its convolution, layer names unchanged.

    The size of its weights has a meaning then: in front of a batch normalisation the scale of a filter is arbitrary.
    Raises `CompressError` as `fold_for_deployment`.
    """
    folded = copy.deepcopy(backbone).eval()
    _fold_norms(folded)
    return folded


def _fold_norms(backbone: nn.Module) -> nn.Conv2d:
    """Fold every batch normalisation of `backbone` into its convolution, in place. Returns the stem."""
    device = next(backbone.parameters()).device
    probe = torch.linspace(-2, 2, 3 * _PROBE_SIZE**2, device=device).reshape(1, 3, _PROBE_SIZE, _PROBE_SIZE)
    stem, pairs = _find_convolutions(backbone, probe)
    for conv, norm in pairs:
        assert norm.running_mean is not None and norm.running_var is not None  # evaluation mode was possible
        conv.weight, conv.bias = fuse_conv_bn_weights(
            conv.weight, conv.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
        )
    folded_norms = {id(norm) for _, norm in pairs}
    for parent, name, child in list(_children(backbone)):
        if id(child) in folded_norms:
            # timm's BatchNormAct2d carries the activation; a plain BatchNorm2d carries none
            setattr(parent, name, getattr(child, "act", nn.Identity()))
    for name, module in backbone.named_modules():
        if isinstance(module, _BatchNorm):
            raise CompressError(f"{name} ({type(module).__name__}) does not follow a convolution, cannot fold it")
        if getattr(module, "inplace", False):
            module.inplace = False  # an in-place activation would overwrite a quantizer's output
    return stem


def _children(root: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Module]]:
    for parent in root.modules():
        for name, child in parent.named_children():
            yield parent, name, child


def _find_convolutions(backbone: nn.Module, probe: Tensor) -> tuple[nn.Conv2d, list[tuple[nn.Conv2d, nn.BatchNorm2d]]]:
    """Return the stem and all (convolution, batch normalisation) pairs, found in one forward pass."""
    producer: dict[int, nn.Conv2d] = {}
    outputs: list[Tensor] = []  # keeps the outputs alive, so that no id is reused
    stems: list[nn.Conv2d] = []
    pairs: list[tuple[nn.Conv2d, nn.BatchNorm2d]] = []

    def after_conv(conv: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        assert isinstance(conv, nn.Conv2d)
        if args[0] is probe:
            stems.append(conv)
        producer[id(output)] = conv
        outputs.append(output)

    def before_norm(norm: nn.Module, args: tuple[Tensor, ...]) -> None:
        assert isinstance(norm, nn.BatchNorm2d)
        if id(args[0]) in producer:
            pairs.append((producer[id(args[0])], norm))

    handles = [m.register_forward_hook(after_conv) for m in backbone.modules() if isinstance(m, nn.Conv2d)]
    handles += [m.register_forward_pre_hook(before_norm) for m in backbone.modules() if isinstance(m, nn.BatchNorm2d)]
    try:
        with torch.no_grad():
            backbone(probe)
    except (AssertionError, RuntimeError) as error:
        size = f"{_PROBE_SIZE} x {_PROBE_SIZE}"
        raise CompressError(f"the network does not accept {size} pixels, which folding needs: {error}") from None
    finally:
        for handle in handles:
            handle.remove()
    if len(stems) != 1 or stems[0].in_channels != 3 or stems[0].groups != 1:
        raise CompressError(
            f"expected one plain three-channel convolution at the network's input, found {len(stems)}: "
            f"{stems}; the normalisation cannot be folded"
        )
    return stems[0], pairs


def _check_same(model: nn.Module, deploy: DeployModel, device: torch.device) -> None:
    """Raise unless both models agree on noise: a convolution output with two readers would go unnoticed otherwise."""
    pixels = torch.randint(0, 256, (2, 3, _PROBE_SIZE, _PROBE_SIZE), generator=torch.Generator().manual_seed(0))
    training = model.training
    model.eval()
    with torch.no_grad():
        expected = model(pixels.float().to(device))
        got = deploy(pixels.float().to(device))
    model.train(training)
    error = float((expected - got).abs().max() / expected.abs().max().clamp_min(1e-6))
    if not error <= _TOLERANCE:
        raise CompressError(f"the folded network differs from the original by {error:.2g} of its largest logit")
