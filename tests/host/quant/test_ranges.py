"""Ranges from calibration images: the grid that rounds best, found a second way, and what it saves a network."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from eyas_host.quant.fold import DeployModel
from eyas_host.quant.qat import prepare_qat
from eyas_host.quant.quantizers import HARD_ZERO, activation_quantizers, affine, set_range
from eyas_host.quant.ranges import best_range, fit_ranges
from eyas_host.support.errors import CompressError

EXAMPLE = torch.zeros(1, 3, 64, 64)
SHAPES = {
    "normal": lambda rng: rng.normal(size=20_000),
    "after a ReLU": lambda rng: rng.normal(size=20_000).clip(min=0),
    "few large": lambda rng: rng.standard_t(2.5, size=20_000),
    "uniform": lambda rng: rng.uniform(-1, 3, size=20_000),
    "below 0": lambda rng: -rng.exponential(size=20_000),
    "pooled": lambda rng: rng.lognormal(sigma=1.5, size=256),
}


def error(values: np.ndarray, low: float, high: float) -> float:
    """Mean error, to the power of 1.2, of rounding to 256 steps from `low` to `high`, of which one is 0."""
    step = (high - low) / 255
    grid = (np.arange(256) - round(-low / step)) * step
    nearest = grid[np.searchsorted((grid[:-1] + grid[1:]) / 2, values)]
    return float((np.abs(values - nearest) ** 1.2).mean())


@pytest.mark.parametrize("shape", SHAPES)
@settings(max_examples=5, deadline=None)
@given(seed=st.integers(0, 1000), scale=st.floats(1e-2, 1e3))
def test_no_other_ends_round_much_better(shape: str, seed: int, scale: float) -> None:
    rng = np.random.default_rng(seed)
    values = (scale * SHAPES[shape](rng)).astype(np.float32)
    low, high = best_range(values)
    assert low <= 0 <= high
    own = error(values, low, high)
    ends = [
        (low * below, high * above)
        for below in (0.4, 0.7, 0.85, 1, 1.2, 1.5, 2.5)
        for above in (0.4, 0.7, 0.85, 1, 1.2, 1.5, 2.5)
        if low * below > values.min() * 1.01 - 1e-9 and high * above < values.max() * 1.01 + 1e-9
    ]
    assert own <= 1.1 * min(error(values, *other) for other in [*ends, (low, high)])


@pytest.mark.parametrize("values", [[0.0] * 9, [1e-7, -1e-7]])
def test_a_dead_layer_gets_a_narrow_range_all_the_same(values: list[float]) -> None:
    low, high = best_range(np.array(values, dtype=np.float32))
    assert -1e-2 < low < 0 < high < 1e-2


def test_one_value_is_kept_by_one_of_the_steps() -> None:
    assert error(np.array([7.0]), *best_range(np.full(100, 7.0, dtype=np.float32))) < 7 / 255 / 2


def test_a_symmetric_range_reaches_equally_far() -> None:
    values = np.random.default_rng(0).normal(1, 1, 10_000).astype(np.float32)
    low, high = best_range(values, symmetric=True)
    assert -low * 127 / 128 == pytest.approx(high)
    assert high <= np.abs(values).max() * 1.0001


def test_weights_are_counts() -> None:
    rng = np.random.default_rng(0)
    values, counts = rng.standard_t(3, 3000).astype(np.float32), rng.integers(1, 9, 3000)
    repeated = np.repeat(values, counts)
    assert best_range(values, counts.astype(np.float32)) == pytest.approx(best_range(repeated))


def test_no_hard_swish_spends_steps_below_its_zero(quantized: nn.Module) -> None:
    quantizers = activation_quantizers(quantized)
    before = {"bn1/hardswish/0": "conv_pw/conv2d/0", "bn2/hardswish/0": "conv_dw/conv2d/0"}
    inputs = [
        name.replace(swish, convolution)
        for name in quantizers
        for swish, convolution in before.items()
        if name.endswith(swish) and name.replace(swish, convolution) in quantizers
    ]
    assert len(inputs) > 10
    assert min(affine(quantizers[name]).bounds[0] for name in inputs) > 1.05 * HARD_ZERO


def test_an_image_far_from_the_mean_is_not_clipped(deploy: DeployModel, calibration: list[Tensor]) -> None:
    """The squeezed channels of a network differ from image to image: the mean of their maxima cuts every second off."""
    model = prepare_qat(deploy, calibration, input_size=64)
    name = next(name for name in activation_quantizers(model) if name.endswith("/se/mean/0"))
    quantizer = activation_quantizers(model)[name]
    seen: list[Tensor] = []
    handle = quantizer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].flatten(1)))
    with torch.inference_mode():
        for batch in calibration:
            model(batch)
    handle.remove()
    largest = torch.cat(seen).amax(1)
    high = affine(quantizer).bounds[1]
    assert float((largest > high).float().mean()) < 0.1 < float((largest > largest.mean()).float().mean())


def test_the_ranges_of_a_trained_network_beat_mean_extremes(deploy: DeployModel, calibration: list[Tensor]) -> None:
    model = prepare_qat(deploy, calibration, input_size=64)
    own = distance(model, deploy, calibration)
    former = copy.deepcopy(model)
    extremes = mean_extremes(deploy, calibration)
    for name, quantizer in activation_quantizers(former).items():
        if name in extremes and name != "/sub/0":
            set_range(quantizer, *extremes[name])
    assert own <= 1.001 * distance(former, deploy, calibration)


def test_mean_extremes_stay_where_they_are_nearer(
    deploy: DeployModel, calibration: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    extremes = mean_extremes(deploy, calibration)
    monkeypatch.setattr("eyas_host.quant.ranges.best_range", lambda *_, **__: (-1e-3, 1e-3))
    quantizers = activation_quantizers(prepare_qat(deploy, calibration, input_size=64))
    name = next(name for name in quantizers if name.endswith("/se/mean/0"))  # no hard-swish reads it
    assert affine(quantizers[name]).bounds == pytest.approx(extremes[name], rel=0.1, abs=0.05)


def distance(model: nn.Module, deploy: DeployModel, images: list[Tensor]) -> float:
    """Mean squared difference of logits from the float network's."""
    with torch.inference_mode():
        return float(torch.cat([(model(batch) - deploy(batch)) ** 2 for batch in images]).mean())


def mean_extremes(deploy: DeployModel, calibration: list[Tensor]) -> dict[str, tuple[float, float]]:
    """Operation -> mean over the images of its smallest and largest value, 0 between them."""
    model = prepare_qat(deploy, calibration, input_size=64)
    lows: dict[str, list[Tensor]] = {}
    for name, quantizer in activation_quantizers(model).items():

        def observe(_: nn.Module, inputs: tuple[Tensor, ...], name: str = name) -> None:
            lows.setdefault(name, []).append(torch.stack(inputs[0].flatten(1).aminmax(dim=1), dim=1))

        quantizer.register_forward_pre_hook(observe)
    with torch.inference_mode():
        for batch in calibration:
            model(batch)
    means = {name: torch.cat(values).mean(0).tolist() for name, values in lows.items()}
    return {name: (min(low, 0.0), max(high, 1e-3)) for name, (low, high) in means.items()}


def test_a_value_that_is_not_finite_is_named(quantized: nn.Module, calibration: list[Tensor]) -> None:
    model = copy.deepcopy(quantized)
    with torch.no_grad():
        model.get_submodule("backbone.blocks.0.0.conv_dw").bias[0] = float("inf")
    with pytest.raises(CompressError, match=r"blocks/0/0.* not finite on the calibration images"):
        fit_ranges(model, calibration, EXAMPLE)
