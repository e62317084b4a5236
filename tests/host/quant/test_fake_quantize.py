"""Simulated int8 against NNCF's own formulas, the grid's definition, and autograd."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from nncf.torch.quantization.quantize_functions import asymmetric_quantize, symmetric_quantize
from nncf.torch.quantization.reference import torch_executor
from torch import Tensor

from eyas_host.quant.fake_quantize import FakeQuantize
from eyas_host.quant.kernels import load_kernels

LAYOUTS = {"contiguous": torch.contiguous_format, "channels last": torch.channels_last}


def drawn(seed: int, shape: tuple[int, ...], *, asymmetric: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Values, a gradient, and the lowest value and span of grids; some values lie on the ends, and some beyond."""
    generator = torch.Generator().manual_seed(seed)
    values, gradient = (torch.randn(8, 3, 5, 5, generator=generator) for _ in range(2))
    scale = 0.5 + torch.rand(shape, generator=generator)
    low, span = (-0.3 * scale, 1.3 * scale) if asymmetric else (-scale * 128 / 127, scale * 255 / 127)
    values[0, 0, 0, 0] = low.flatten()[0]
    values[0, 0, 0, 1] = (low + span).flatten()[0]
    return values, gradient, low, span


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize("shape", [(1,), (1, 1, 1, 1), (8, 1, 1, 1)])
@given(seed=st.integers(0, 2**31))
def test_values_and_gradients_are_those_of_nncf(
    shape: tuple[int, ...], asymmetric: bool, layout: str, seed: int
) -> None:
    values, gradient, low, span = drawn(seed, shape, asymmetric=asymmetric)
    values, gradient = (tensor.contiguous(memory_format=LAYOUTS[layout]) for tensor in (values, gradient))
    levels = (0, 255) if asymmetric else (-128, 127)
    kept = values.clone()
    rounded = FakeQuantize.Quantize_forward(values, low, span, 256)
    assert torch.equal(rounded, torch_executor.forward(values, low, span, torch.tensor(256.0)))
    found = FakeQuantize.Quantize_backward(gradient, values, low, span, 256, *levels, asymmetric)
    wanted = torch_executor.backward(gradient, values, low, span, torch.tensor(256.0), *levels)
    assert torch.equal(values, kept), "its arguments stay as they are"
    assert torch.equal(found[0], wanted[0])
    for own, theirs in zip(found[1:], wanted[1:], strict=True):
        assert own.shape == span.shape
        torch.testing.assert_close(own, theirs.sum_to_size(span.shape), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("beyond", ["neither end", "the lower end", "the upper end"])
@pytest.mark.parametrize("shape", [(1,), (8, 1, 1, 1)])
@given(seed=st.integers(0, 2**31))
def test_an_end_beyond_which_there_is_nothing_has_no_gradient(
    shape: tuple[int, ...], beyond: str, layout: str, seed: int
) -> None:
    """AdamW would make a full step of the smallest rest of a sum."""
    generator = torch.Generator().manual_seed(seed)
    values, gradient = (
        torch.rand(8, 30, 7, 7, generator=generator).contiguous(memory_format=LAYOUTS[layout]) for _ in range(2)
    )
    ends = {"neither end": (-1.0, 2.0), "the lower end": (0.3, 2.0), "the upper end": (-1.0, 0.7)}[beyond]
    low, span = torch.full(shape, ends[0]), torch.full(shape, ends[1] - ends[0])
    for levels in ((0, 255), (-128, 127)):
        _, of_low, of_span = FakeQuantize.Quantize_backward(gradient, values, low, span, 256, *levels)
        rounding = FakeQuantize.Quantize_forward(values, low, span, 256) - values
        inside = (values >= ends[0]) & (values <= ends[0] + float(span.flatten()[0]))
        within = torch.where(inside, rounding * gradient, 0.0).double().sum_to_size(shape) / span
        moved = {"neither end": 0.0, "the lower end": levels[0] / levels[1], "the upper end": 1.0}[beyond]
        assert bool((of_low == 0).all()) == (beyond == "neither end")
        torch.testing.assert_close(of_span.double(), within + moved * of_low, rtol=1e-4, atol=1e-3)


@given(st.integers(0, 255), st.floats(1e-3, 0.1), st.lists(st.floats(-10, 10, width=32), min_size=1, max_size=20))
def test_every_value_becomes_the_nearest_of_the_grid(zero: int, step: float, values: list[float]) -> None:
    """By the definition, in float64; a value halfway between two may become either."""
    grid = (np.arange(256) - zero) * step
    rounded = FakeQuantize.Quantize_forward(
        torch.tensor(values), torch.tensor([-zero * step]), torch.tensor([255 * step]), 256
    )
    clamped = np.clip(values, grid[0], grid[-1])
    nearest = np.abs(clamped[:, None] - grid).min(axis=1)
    found = rounded.double().numpy()
    assert np.all(np.abs(found[:, None] - grid).min(axis=1) < 1e-4 * step + 1e-5)
    assert np.all(np.abs(found - clamped) <= nearest + 1e-3 * step + 1e-5)


def test_a_symmetric_quantizer_learns_its_scale_from_what_it_cuts() -> None:
    load_kernels()
    weight = torch.tensor([[[[0.5]]], [[[2.0]]]], requires_grad=True)
    scale = torch.ones(2, 1, 1, 1, requires_grad=True)
    symmetric_quantize(weight, 256, -128, 127, scale, 0.0).sum().backward()
    assert weight.grad is not None and scale.grad is not None
    assert weight.grad.flatten().tolist() == [1.0, 0.0]
    assert scale.grad.flatten()[1] == 1.0 and abs(scale.grad.flatten()[0]) < 0.01


def test_an_asymmetric_quantizer_keeps_zero_and_learns_its_ends() -> None:
    load_kernels()
    x = torch.tensor([[-2.0, 0.0, 0.3, 5.0]], requires_grad=True)
    low, span = (torch.tensor([value], requires_grad=True) for value in (-1.0, 3.0))
    rounded = asymmetric_quantize(x, 256, 0, 255, low, span, 0.0)
    assert rounded[0, 1] == 0.0
    rounded.backward(torch.tensor([[1.0, 10.0, 100.0, 1000.0]]))
    assert x.grad is not None and low.grad is not None and span.grad is not None
    assert x.grad.tolist() == [[0.0, 10.0, 100.0, 0.0]]
    assert low.grad.item() == pytest.approx(1001.0), "both ends move with the lowest value"
    assert span.grad.item() == pytest.approx(1000.0, rel=1e-3), "the highest alone with the span"
