"""Exact integer arithmetic: fast float32 sums are those of integers, and saturate as an int8 kernel's do."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from eyas_host.quant import exact
from eyas_host.quant.exact import exact_int8
from eyas_host.quant.fold import fold_for_deployment
from eyas_host.quant.qat import prepare_qat
from eyas_host.quant.quantizers import Affine
from tests.support.networks import tiny_gated
from tests.support.shapes import Pixels

SIZE = 64


@pytest.fixture(scope="module")
def pixels(shape_frames: Pixels) -> torch.Tensor:
    return torch.from_numpy(shape_frames).permute(0, 3, 1, 2).float()


@pytest.fixture(scope="module")
def gated(pixels: torch.Tensor) -> nn.Module:
    """A QAT model with depthwise, pointwise and gate convolutions."""
    return prepare_qat(fold_for_deployment(tiny_gated(pixels)), list(pixels[:, None]), input_size=SIZE).eval()


def types(model: nn.Module) -> set[torch.dtype]:
    return {module.weight.dtype for module in model.modules() if isinstance(module, nn.Conv2d)}


@torch.inference_mode()
def test_sums_in_float32_give_the_logits_of_float64_in_any_batch(
    gated: nn.Module, pixels: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    fast = exact_int8(gated, input_size=SIZE)
    assert types(fast) == {torch.float32}
    monkeypatch.setattr(exact, "_FLOAT32_INTEGERS", 0)
    slow = exact_int8(gated, input_size=SIZE)
    assert types(slow) == {torch.float64}
    one_by_one = torch.cat([slow(image[None]) for image in pixels])
    assert one_by_one.std() > 0.1
    assert torch.equal(fast(pixels), one_by_one)
    assert torch.equal(fast(pixels.contiguous(memory_format=torch.channels_last)), one_by_one)


@pytest.mark.parametrize(("inputs", "kind"), [(518, torch.float32), (519, torch.float64)])
def test_the_type_of_a_sum_holds_the_largest_one(inputs: int, kind: torch.dtype) -> None:
    # 518 x 255 x 127 = 16,775,430 is the last below 2^24; an odd sum above it has no float32.
    grid = Affine(torch.tensor(0.5).double(), torch.tensor(-128), -128, 127, per_channel=False)
    weights = torch.full((2, inputs, 1, 1), 127)
    weights[1, ::2] = -126
    assert exact._sum_type(weights, grid) is kind
    values = torch.full((1, inputs, 3, 3), 255)
    values[0, 0, 0, 0] = 254
    sums = F.conv2d(values.to(kind), weights.to(kind))
    by_hand = np.einsum("ochw,bcyx->boyx", weights.numpy(), values.numpy())
    assert np.array_equal(sums.numpy().astype(np.int64), by_hand)


def test_accumulators_saturate_in_32_bits() -> None:
    unit = torch.tensor([0.5, 0.25]).double()
    module = exact._Accumulators(torch.tensor([2**31 - 10, -(2**31) + 20], dtype=torch.float64), unit)
    sums = torch.tensor([[[[5.0, 500.0]], [[-5.0, -500.0]]]])
    values = module(sums) / unit.reshape(1, 2, 1, 1)
    assert values.flatten().tolist() == [2**31 - 5, 2**31 - 1, -(2**31) + 15, -(2**31) + 1]
