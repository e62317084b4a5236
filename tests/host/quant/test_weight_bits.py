"""7-bit weights, with which int8 kernels of processors without VNNI do not saturate."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from eyas_device.runtimes import load
from eyas_host.export.openvino import compile_openvino
from eyas_host.quant.fold import DeployModel
from eyas_host.quant.integers import weight_integers
from eyas_host.quant.qat import load_qat, prepare_qat, save_qat
from eyas_host.quant.quantizers import affine, module_of, weight_of, weight_quantizers
from tests.support.networks import take_steps


@pytest.fixture(scope="module")
def pixels(shape_frames: np.ndarray) -> Tensor:
    return torch.from_numpy(shape_frames).permute(0, 3, 1, 2).float()


@pytest.fixture(scope="module")
def halved(deploy: DeployModel, calibration: list[Tensor]) -> nn.Module:
    return prepare_qat(deploy, calibration, input_size=64, weight_bits=7).eval()


def test_the_grid_ends_at_sixty_three(halved: nn.Module, quantized: nn.Module, pixels: Tensor) -> None:
    """Closed form: two products of a byte and a weight fit into 16 bits up to 64."""
    largest = {name: int(values.abs().max()) for name, values in weight_integers(halved).items()}
    assert set(largest) == set(weight_quantizers(quantized)) and set(largest.values()) == {63}
    assert max(int(values.abs().max()) for values in weight_integers(quantized).values()) == 127
    with torch.inference_mode():
        gap = (halved(pixels) - quantized(pixels)).abs().mean() / quantized(pixels).abs().max()
    assert 0 < float(gap) < 0.05


def test_the_fake_quantizers_clamp_as_the_integers(
    halved: nn.Module, deploy: DeployModel, pixels: Tensor, tmp_path: Path
) -> None:
    """After training and in a saved model, whatever the weights have become."""
    trained = copy.deepcopy(halved)
    scales = {name: q.scale.clone() for name, q in weight_quantizers(halved).items()}
    take_steps(trained, pixels, steps=2, rate=1e-3)
    assert not all(torch.equal(q.scale, scales[name]) for name, q in weight_quantizers(trained).items())
    for operation in scales:
        weight: Any = module_of(trained, operation).weight
        weight.data.mul_(torch.linspace(0.5, 3, weight.shape[0]).reshape(-1, 1, 1, 1))
    save_qat(trained.eval(), tmp_path)
    for model in (trained, load_qat(deploy, tmp_path)):
        for operation, quantizer in weight_quantizers(model).items():
            grid, weight = affine(quantizer), weight_of(model, operation).detach()
            with torch.inference_mode():
                steps = quantizer(weight).double() / grid.scale.reshape(-1, 1, 1, 1)
            assert float(steps.abs().max()) == pytest.approx(63, abs=1e-3), operation
            assert int(((steps - grid.integers(weight)).abs() > 0.01).sum()) <= 0.001 * steps.numel() + 1, "beyond ties"


def test_openvino_predicts_as_the_network(halved: nn.Module, shape_frames: np.ndarray, tmp_path: Path) -> None:
    compile_openvino(halved, tmp_path / "a.xml", input_size=64, precision="int8")
    with load("openvino")(tmp_path / "a.xml", size=64, classes=5, threads=1) as runtime:  # type: ignore[call-arg]
        got = np.stack([runtime.infer(frame).copy() for frame in shape_frames])
    with torch.inference_mode():
        expected = halved(torch.from_numpy(shape_frames).permute(0, 3, 1, 2).float()).numpy()
    assert float((got.argmax(1) == expected.argmax(1)).mean()) >= 0.9
