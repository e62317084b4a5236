"""Features of a network whose weights stay as they are, for many images: by OpenVINO on a processor.

torch computes convolution, BatchNorm and activation one after the other, and copies images to pad them. OpenVINO fuses
them, which takes a third of the time for EfficientNet-Lite0 at 128 pixels; conversion takes some seconds.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from eyas_host.models.factory import PixelClassifier
from eyas_host.support.quiet import quiet_tools

Pooled = Callable[[Tensor], Tensor]
"""Pooled features float32 [n, channels] of pixels uint8 [n, 3, s, s], without gradients."""
WORTHWHILE = 2000
"""Images from which a conversion is shorter than what it saves."""
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
    probe = torch.randint(0, 256, (2, 3, size, size), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    expected = by_torch(probe)
    converted = _converted(model, probe)
    if converted is None or not _same(converted(probe), expected):
        return by_torch
    return converted


def _converted(model: PixelClassifier, probe: Tensor) -> Pooled | None:
    """The network in OpenVINO, with as many threads as torch; None where it cannot be converted."""
    import openvino as ov
    from openvino.frontend import OpConversionFailure

    settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": torch.get_num_threads()}
    try:
        with quiet_tools(), torch.inference_mode():
            network: Any = ov.convert_model(
                _Pooled(model), example_input=probe, input=[(-1, *probe.shape[1:])], share_weights=False
            )
            compiled: Any = ov.compile_model(network, "CPU", settings)
    except (RuntimeError, OpConversionFailure):
        return None
    request = compiled.create_infer_request()
    return lambda pixels: torch.from_numpy(request.infer([pixels.contiguous().numpy()])[0].copy())


class _Pooled(nn.Module):
    def __init__(self, model: PixelClassifier) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixels: Tensor) -> Tensor:
        return self.model.pooled(pixels)


def _same(found: Tensor, expected: Tensor) -> bool:
    return found.shape == expected.shape and bool(
        (found - expected).abs().max() <= _TOLERANCE * expected.abs().max().clamp(min=1e-6)
    )
