"""Features of a network, or of its lowest blocks, whose weights stay as they are: by OpenVINO on a processor.

torch computes convolution, BatchNorm and activation one after the other, and copies images to pad them. OpenVINO fuses
them, which takes a third of the time for EfficientNet-Lite0 at 128 pixels; conversion takes some seconds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from eyas_host.models.factory import PixelClassifier
from eyas_host.support.quiet import quiet_tools

Pooled = Callable[[Tensor], Tensor]
"""Pooled features float32 [n, channels] of pixels uint8 [n, 3, s, s], without gradients."""
WORTHWHILE = 2000
"""Images, of all processes, from which a conversion is shorter than what it saves: all take the same way."""
_RANDOM = ("p", "drop_prob")
"""Attributes of layers that drop values at random while others are trained."""
_TOLERANCE = 1e-3
"""Largest difference from torch, over the largest feature; float32 sums in another order differ by 1e-5."""


def frozen_features(model: PixelClassifier, size: int, images: int) -> Pooled:
    """`model.pooled` for so many images of `size` pixels a side; the model is in evaluation mode.

    Of a network on a GPU, of few images, and where OpenVINO cannot convert the network or computes something else,
    torch computes them.
    """

    @torch.inference_mode()
    def by_torch(pixels: Tensor) -> Tensor:
        return model.pooled(pixels)

    if images < WORTHWHILE or next(model.parameters()).device.type != "cpu":
        return by_torch
    probe = _probe(size)
    expected = by_torch(probe)
    converted = _converted(_Pooled(model), probe)
    if converted is None or not _same(converted(probe), expected):
        return by_torch
    return converted


def with_frozen_blocks(model: PixelClassifier, size: int, images: int) -> Callable[[Tensor], Tensor]:
    """`model` for the training of its upper blocks: logits of pixels [n, 3, s, s], `size` pixels a side or others.

    What lies below the first block with a trainable weight has no gradient, and its weights and BatchNorm statistics
    have to stay as they are now. It is the model itself where `frozen_features` would take torch, and where the modules
    below are not a chain of which each reads the one before.
    """
    frozen = _frozen_chain(model)
    if not frozen or images < WORTHWHILE or next(model.parameters()).device.type != "cpu":
        return model
    lower, probe = _Chain(model, frozen), _probe(size).float()
    with torch.no_grad(), _evaluated(model):
        try:
            expected = lower(probe)
            with _passed_over(frozen):
                above = model.backbone(expected)
        except (RuntimeError, TypeError, ValueError, IndexError):  # a module reads something else
            return model
        converted = _converted(lower, probe)
        if converted is None or not (_same(above, model(probe)) and _same(converted(probe), expected)):
            return model

    def logits(pixels: Tensor) -> Tensor:
        maps = converted(pixels.float()).contiguous(memory_format=torch.channels_last)
        with _passed_over(frozen):
            computed: Tensor = model.backbone(maps)
        return computed

    return logits


def _frozen_chain(model: PixelClassifier) -> list[nn.Module]:
    """The modules below the first one with a trainable weight, in the order of their definition."""
    chain: list[nn.Module] = []
    for module in _flat(model.backbone.children()):
        if any(parameter.requires_grad for parameter in module.parameters()):
            return chain if any(True for below in chain for _ in below.parameters()) else []
        if any(getattr(part, name, 0) for part in module.modules() for name in _RANDOM):
            return []
        chain.append(module)
    return []


def _flat(modules: Iterator[nn.Module]) -> Iterator[nn.Module]:
    for module in modules:
        if isinstance(module, nn.Sequential):
            yield from _flat(module.children())
        else:
            yield module


@contextmanager
def _passed_over(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Let modules return what they are given meanwhile; afterwards a `forward` of their own is theirs again."""
    before = [vars(module).get("forward") for module in modules]
    for module in modules:
        module.forward = _same_value
    try:
        yield
    finally:
        for module, own in zip(modules, before, strict=True):
            if own is None:
                del module.forward
            else:
                module.forward = own


def _same_value(value: Tensor) -> Tensor:
    return value


@contextmanager
def _evaluated(model: nn.Module) -> Iterator[None]:
    """Evaluation mode meanwhile; afterwards each module is in its own again."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def _probe(size: int) -> Tensor:
    return torch.randint(0, 256, (2, 3, size, size), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def _converted(network: nn.Module, probe: Tensor) -> Callable[[Tensor], Tensor] | None:
    """A network of pixels in OpenVINO, with as many threads as torch; None where it cannot be converted.

    It is compiled for each shape of pixels, which takes a sixth to a half less than one for all shapes.
    """
    import openvino as ov
    from openvino.frontend import OpConversionFailure

    settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": torch.get_num_threads()}

    @cache
    def request_of(shape: tuple[int, ...]) -> Any:
        own = converted.clone()
        own.reshape(shape)
        return ov.compile_model(own, "CPU", settings).create_infer_request()

    def run(pixels: Tensor) -> Tensor:
        return torch.from_numpy(request_of(tuple(pixels.shape)).infer([pixels.contiguous().numpy()])[0].copy())

    try:
        with quiet_tools(), torch.inference_mode():
            converted: Any = ov.convert_model(
                network, example_input=probe, input=[(-1, 3, -1, -1)], share_weights=False
            )
        run(probe)
    except (RuntimeError, OpConversionFailure):
        return None
    return run


class _Pooled(nn.Module):
    def __init__(self, model: PixelClassifier) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixels: Tensor) -> Tensor:
        return self.model.pooled(pixels)


class _Chain(nn.Module):
    """Modules that read one another, the first of them normalised pixels."""

    def __init__(self, model: PixelClassifier, modules: Sequence[nn.Module]) -> None:
        super().__init__()
        self.model = model
        self.chain = modules

    def forward(self, pixels: Tensor) -> Tensor:
        values = self.model.normalise(pixels)
        for module in self.chain:
            values = module(values)
        return values


def _same(found: Tensor, expected: Tensor) -> bool:
    return found.shape == expected.shape and bool(
        (found - expected).abs().max() <= _TOLERANCE * expected.abs().max().clamp(min=1e-6)
    )
