"""Weight gradients of depthwise convolutions against those of double precision, and who computes them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from eyas_host.train import depthwise
from eyas_host.train.depthwise import depthwise_weight_gradient, fast_depthwise_gradients

LAST = torch.channels_last


def gradients(layer: nn.Conv2d, images: Tensor, seed: int) -> dict[str, Tensor]:
    images = images.clone(memory_format=torch.preserve_format).requires_grad_()
    layer.zero_grad(set_to_none=True)
    output = layer(images)
    output.backward(
        torch.randn(output.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.double).to(output)
    )
    found = {"images": images.grad} | {name: value.grad for name, value in layer.named_parameters()}
    return {name: value.double() for name, value in found.items() if value is not None}


@settings(max_examples=25, deadline=None)
@given(
    count=st.integers(1, 4),
    channels=st.integers(1, 35),
    size=st.tuples(st.integers(13, 16), st.integers(13, 16)),
    sides=st.sampled_from([(5, 5), (5, 7), (7, 5)]),
    stride=st.sampled_from([1, 2, (2, 1), 3]),
    padding=st.sampled_from([0, 2, (3, 1)]),
    dilation=st.sampled_from([1, 1, (1, 2)]),
    bias=st.booleans(),
)
def test_gradients_are_those_of_double_precision(
    count: int, channels: int, size: tuple[int, int], sides: tuple[int, int], bias: bool, **options: Any
) -> None:
    """Double precision is computed without oneDNN, by other code."""
    torch.manual_seed(0)
    layer = nn.Conv2d(channels, channels, sides, groups=channels, bias=bias, **options)
    images = torch.randn(count, channels, *size).to(memory_format=LAST)
    with fast_depthwise_gradients():
        found = gradients(layer.to(memory_format=LAST), images, 1)  # type: ignore[call-overload]
    expected = gradients(layer.double(), images.double(), 1)
    assert set(found) == set(expected)
    for name, value in expected.items():
        assert torch.allclose(found[name], value, rtol=1e-4, atol=1e-4), name


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Shapes of the gradients that were computed as convolutions, by a processor that does."""
    seen: list[tuple[int, ...]] = []

    def counted(gradient: Tensor, *values: Any, **options: Any) -> Tensor:
        seen.append(tuple(gradient.shape))
        return depthwise_weight_gradient(gradient, *values, **options)

    monkeypatch.setattr(depthwise, "depthwise_weight_gradient", counted)
    monkeypatch.setattr(depthwise, "_MEASURED", (torch.backends.cpu.get_cpu_capability(),))
    return seen


def test_only_depthwise_layers_with_large_weights_and_small_outputs(calls: list[tuple[int, ...]]) -> None:
    images = torch.randn(2, 8, 8, 8).to(memory_format=LAST)
    large = torch.randn(2, 8, 9, 9).to(memory_format=LAST)
    others = [
        nn.Conv2d(8, 8, 3, padding=1, groups=8),
        nn.Conv2d(8, 8, 5, padding=2),
        nn.Conv2d(8, 8, 5, padding=2, groups=4),
        nn.Conv2d(8, 16, 5, padding=2, groups=8),
        nn.ConvTranspose2d(8, 8, 5, padding=2, groups=8),
    ]
    layer = nn.Conv2d(8, 8, 5, padding=2, groups=8)
    with fast_depthwise_gradients():
        for other in others:
            other(images).sum().backward()
        layer(large).sum().backward()
        layer(images.contiguous()).sum().backward()
        layer.double()(images.double()).sum().backward()
        layer.float()(images[:0]).sum().backward()
        assert calls == []
        layer(images).sum().backward()
        assert calls == [(2, 8, 8, 8)]
        layer.requires_grad_(False)(images.clone().requires_grad_()).sum().backward()
    layer.requires_grad_()(images).sum().backward()
    assert calls == [(2, 8, 8, 8)], "frozen layers and what comes afterwards have none"


def test_a_processor_on_which_nobody_measured_it_keeps_its_own_way(
    calls: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(depthwise, "_MEASURED", ())
    with fast_depthwise_gradients():
        nn.Conv2d(8, 8, 5, padding=2, groups=8)(torch.randn(2, 8, 8, 8).to(memory_format=LAST)).sum().backward()
    assert calls == []
