"""Folding and quantizers: the same function before and after, or an error that names the operation."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from nncf.torch.function_hook import get_hook_storage
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from eyas_host.models import checkpoints
from eyas_host.models.factory import PixelClassifier, build
from eyas_host.quant.fold import DeployModel, fold_for_deployment
from eyas_host.quant.qat import load_qat, prepare_qat, save_qat
from eyas_host.quant.quantizers import (
    activation_quantizers,
    affine,
    check_placement,
    fit_hard_swishes,
    hook_owners,
    module_of,
    set_range,
    weight_quantizers,
)
from eyas_host.support.errors import CompressError, StageError
from tests.support.networks import V3_SMALL

EXAMPLE = torch.zeros(1, 3, 64, 64)
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@pytest.fixture(scope="module")
def pixels(shape_frames: np.ndarray) -> Tensor:
    return torch.from_numpy(shape_frames).permute(0, 3, 1, 2).float()


@torch.inference_mode()
def logits_of(model: nn.Module, pixels: Tensor) -> Tensor:
    return model(pixels)


# Folding


@pytest.mark.parametrize("norm", [((0.5,) * 3, (0.5,) * 3), IMAGENET])
def test_the_fold_computes_the_same(
    network: PixelClassifier, pixels: Tensor, norm: tuple[tuple[float, float, float], tuple[float, float, float]]
) -> None:
    model = PixelClassifier(copy.deepcopy(network.backbone), *norm).eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    deploy = fold_for_deployment(model)
    expected = logits_of(model, pixels)
    assert float((logits_of(deploy, pixels) - expected).abs().max()) < 1e-4 * float(expected.abs().max())
    assert not any(isinstance(module, _BatchNorm) for module in deploy.modules())
    assert not any(getattr(module, "inplace", False) for module in deploy.modules())
    assert deploy.mean.shape == (1, 1 if norm[0][0] == norm[0][1] else 3, 1, 1)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_fold_loads_the_weights_of_another_of_its_kind(network: PixelClassifier, pixels: Tensor) -> None:
    one = fold_for_deployment(network)
    other = fold_for_deployment(build("mobilenetv3_small_100", 5, "random")[0].eval())
    other.load_state_dict(one.state_dict(), strict=True)
    assert torch.equal(logits_of(other, pixels[:2]), logits_of(one, pixels[:2]))


def wrapped(*layers: nn.Module) -> PixelClassifier:
    head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.LazyLinear(2))
    model = PixelClassifier(nn.Sequential(*layers, *head), *IMAGENET)
    torch.manual_seed(0)
    model(EXAMPLE)
    return model.eval()


def test_a_norm_without_a_convolution_cannot_be_folded() -> None:
    with pytest.raises(CompressError, match=r"2 \(BatchNorm2d\) does not follow a convolution"):
        fold_for_deployment(wrapped(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.BatchNorm2d(8)))


def test_a_network_without_a_plain_stem_cannot_be_folded() -> None:
    with pytest.raises(CompressError, match="one plain three-channel convolution"):
        fold_for_deployment(wrapped(nn.Conv2d(3, 6, 3, groups=3), nn.ReLU()))


def test_a_convolution_with_two_readers_is_detected() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)

        def forward(self, x: Tensor) -> Tensor:
            y = self.stem(x)
            return self.norm(y) + y

    model = wrapped(Twice())
    nn.init.constant_(model.backbone[0].norm.weight, 3.0)
    with pytest.raises(CompressError, match="differs from the original"):
        fold_for_deployment(model)


# Quantizers


def test_the_placement_of_the_network_is_complete(quantized: nn.Module) -> None:
    placement = check_placement(quantized, EXAMPLE)
    assert (len(placement.activations), len(placement.weights)) == (V3_SMALL["activations"], V3_SMALL["weights"])
    assert not any("classifier" in name for name in placement.activations + placement.weights)
    assert len(set(placement.activations)) == V3_SMALL["activations"]


def test_a_missing_quantizer_is_found(quantized: nn.Module) -> None:
    model = copy.deepcopy(quantized)
    operation, quantizer = list(activation_quantizers(model).items())[5]
    parent, name = hook_owners(get_hook_storage(model))[id(quantizer)]
    delattr(parent, name)
    with pytest.raises(CompressError, match="activation quantizers do not match") as caught:
        check_placement(model, EXAMPLE)
    assert operation in str(caught.value)


def test_every_quantizer_rounds_to_the_int8_grid(quantized: nn.Module) -> None:
    for name, quantizer in activation_quantizers(quantized).items():
        grid = affine(quantizer)
        scale, zero = float(grid.scale), int(grid.zero_point)
        assert -128 <= zero <= 127 and scale > 0 and not grid.per_channel, name
        low, high = grid.bounds
        assert high - low == pytest.approx(255 * scale) and low <= 0 <= high
        x = torch.linspace(low - 3 * scale, high + 3 * scale, 999)
        with torch.inference_mode():
            got = quantizer(x).double()
        steps = got / scale + zero
        assert float((steps - steps.round()).abs().max()) < 1e-2, name
        assert float((got - x.clamp(low, high)).abs().max()) < 0.51 * scale, name
    for name, quantizer in weight_quantizers(quantized).items():
        grid = affine(quantizer)
        weight = module_of(quantized, name).weight.detach()
        assert grid.per_channel and grid.scale.shape == (len(weight),) and not grid.zero_point.any()
        with torch.inference_mode():
            got = quantizer(weight).double()
        shape = (-1, 1, 1, 1)
        steps = got / grid.scale.reshape(shape)
        assert float((steps - steps.round()).abs().max()) < 1e-2, name
        assert float(steps.abs().max()) < 127.01
        clipped = weight.double().clamp(-127 * grid.scale.reshape(shape), 127 * grid.scale.reshape(shape))
        assert float(((got - clipped) / grid.scale.reshape(shape)).abs().max()) < 0.51, name


def test_the_range_after_the_mean_is_exact(quantized: nn.Module, deploy: DeployModel) -> None:
    grid = affine(activation_quantizers(quantized)["/sub/0"])
    assert grid.bounds == pytest.approx((-float(deploy.mean), 255 - float(deploy.mean)), abs=1e-4)
    assert float(grid.scale) == pytest.approx(1.0, abs=1e-6)


def test_quantization_keeps_the_predictions(quantized: nn.Module, deploy: DeployModel, pixels: Tensor) -> None:
    with_quantizers, without = logits_of(quantized, pixels).softmax(1), logits_of(deploy, pixels).softmax(1)
    assert float((with_quantizers - without).abs().mean()) < 0.06
    assert not torch.equal(with_quantizers, without)


def test_ranges_and_scales_are_trained(quantized: nn.Module, pixels: Tensor) -> None:
    model = copy.deepcopy(quantized).train()
    targets = torch.arange(5).repeat_interleave(4)
    nn.functional.cross_entropy(model(pixels), targets).backward()
    activations = activation_quantizers(model)
    fixed = activations.pop("/sub/0")
    assert not fixed.input_low.requires_grad and not fixed.input_range.requires_grad
    reached = [
        q.input_range.grad is not None and q.input_low.grad is not None and bool(q.input_range.grad.abs().sum() > 0)
        for q in activations.values()
    ]
    assert sum(reached) > 0.8 * len(reached)
    scales = [q.scale.grad for q in weight_quantizers(model).values()]
    assert all(g is not None and torch.isfinite(g).all() for g in scales)
    assert sum(bool(g.abs().sum() > 0) for g in scales) > 0.9 * len(scales)


@pytest.fixture(scope="module")
def saved(quantized: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("qat")
    save_qat(quantized, folder)
    return folder


def test_a_saved_model_predicts_the_same(
    quantized: nn.Module, deploy: DeployModel, saved: Path, pixels: Tensor
) -> None:
    other = copy.deepcopy(deploy)
    for parameter in other.parameters():
        parameter.data.mul_(1.5)
    loaded = load_qat(other, saved)
    assert torch.equal(logits_of(loaded, pixels), logits_of(quantized, pixels))
    assert check_placement(loaded, EXAMPLE).weights == check_placement(quantized, EXAMPLE).weights


@pytest.mark.parametrize("name", ["qat.pt", "qat.json"])
@pytest.mark.parametrize("damage", ["missing", "empty", "cut", "junk", "other"])
def test_damaged_files(saved: Path, deploy: DeployModel, tmp_path: Path, name: str, damage: str) -> None:
    folder = Path(shutil.copytree(saved, tmp_path / "qat"))
    path = folder / name
    data = path.read_bytes()
    if damage == "missing":
        path.unlink()
    else:
        other = {"qat.pt": b"PK\x03\x04", "qat.json": b"[]"}[name]
        path.write_bytes({"empty": b"", "cut": data[: len(data) // 2], "junk": b"junk" * 100, "other": other}[damage])
    with pytest.raises(CompressError, match="--from qat"):
        load_qat(deploy, folder)


def test_the_qat_model_of_another_network(saved: Path) -> None:
    other = fold_for_deployment(build("mobilenetv3_small_100", 7, "random")[0].eval())
    with pytest.raises(CompressError, match="no QAT model of this network"):
        load_qat(other, saved)


@pytest.mark.parametrize(
    ("layer", "kind"), [(nn.GELU(), "gelu"), (nn.Softmax(dim=1), "softmax"), (nn.Sigmoid(), "sigmoid")]
)
def test_an_operation_without_a_rule_is_named(layer: nn.Module, kind: str, calibration: list[Tensor]) -> None:
    model = wrapped(nn.Conv2d(3, 8, 3, stride=2), layer, nn.Conv2d(8, 8, 3), nn.ReLU())
    with pytest.raises(CompressError, match=f"no quantization rule for operation '{kind}'"):
        prepare_qat(fold_for_deployment(model), calibration[:2], input_size=64)


@pytest.mark.parametrize("content", [None, b"", b"junk" * 100, b"PK\x03\x04"])
def test_damaged_weights(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "student.pt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(StageError, match="cannot be read"):
        checkpoints.load_state(path)


@pytest.mark.parametrize(
    ("low", "high", "fits"), [(-2.6, 3.4, True), (-3.5, 3.0, True), (-1.5, 3.0, False), (-0.4, 0.4, False)]
)
def test_a_grid_before_a_hard_swish_is_fitted_where_that_costs_little(
    quantized: nn.Module, low: float, high: float, fits: bool
) -> None:
    """-3, 0 and 3 are integers of it then, and its training is over; a step grows by an eighth at most."""
    model = copy.deepcopy(quantized)
    example = torch.zeros(1, 3, 64, 64)
    name = fit_hard_swishes(model, example)[0]
    quantizer = activation_quantizers(model)[name]
    set_range(quantizer, low, high)
    quantizer.enable_gradients()
    before = affine(quantizer)
    assert (name in fit_hard_swishes(model, example)) == fits
    after = affine(quantizer)
    step = float(after.scale)
    if fits:
        assert abs(3 / step - round(3 / step)) < 1e-3 and after.bounds[0] <= -3 + 1e-4
        assert step <= float(before.scale) * 1.126 and after.bounds[1] >= high - 2 * step
        assert not any(parameter.requires_grad for parameter in quantizer.parameters())
    else:
        assert after.bounds == before.bounds
        assert any(parameter.requires_grad for parameter in quantizer.parameters())
