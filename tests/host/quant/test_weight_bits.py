"""7-bit weights, with which int8 kernels of processors without VNNI do not saturate."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from eyas_device.runtimes import load
from eyas_host.export.openvino import compile_openvino
from eyas_host.quant.fold import DeployModel
from eyas_host.quant.qat import load_qat, prepare_qat, save_qat
from eyas_host.quant.qdq import WeightPair
from eyas_host.quant.quantizers import affine, module_of, weight_quantizers
from tests.support.networks import take_steps


@pytest.fixture(scope="module")
def halved(deploy: DeployModel, calibration: list[Tensor]) -> nn.Module:
    return prepare_qat(deploy, calibration, input_size=64, weight_bits=7).eval()


def integers(model: nn.Module) -> dict[str, Tensor]:
    """Operation -> the integers that an int8 backend stores."""
    stored = {}
    for operation, quantizer in weight_quantizers(model).items():
        grid, weight = affine(quantizer), module_of(model, operation).weight
        assert isinstance(weight, Tensor)
        stored[operation] = (WeightPair(grid)(weight.detach()) / grid.scale.reshape(-1, 1, 1, 1)).round()
    return stored


def test_two_products_of_any_byte_fit_into_sixteen_bits(halved: nn.Module, quantized: nn.Module) -> None:
    def largest(model: nn.Module) -> float:
        return max(float(values.abs().max()) for values in integers(model).values())

    assert set(integers(halved)) == set(weight_quantizers(quantized))
    assert 2 * 255 * largest(halved) <= 2**15 - 1 < 2 * 255 * largest(quantized)
    assert largest(halved) == 63, "the half grid is used in full"


def test_training_and_files_keep_the_scales(
    halved: nn.Module, deploy: DeployModel, shape_frames: np.ndarray, tmp_path: Path
) -> None:
    scales = {name: q.scale.clone() for name, q in weight_quantizers(halved).items()}
    trained = copy.deepcopy(halved)
    take_steps(trained, torch.from_numpy(shape_frames).permute(0, 3, 1, 2).float(), steps=2, rate=1e-3)
    assert not torch.equal(module_of(trained, next(iter(scales))).weight, module_of(halved, next(iter(scales))).weight)
    save_qat(trained.eval(), tmp_path)
    for model in (trained, load_qat(deploy, tmp_path)):
        quantizers = weight_quantizers(model)
        assert all(torch.equal(quantizers[name].scale, scale) for name, scale in scales.items())


def test_openvino_predicts_as_the_network(halved: nn.Module, shape_frames: np.ndarray, tmp_path: Path) -> None:
    compile_openvino(halved, tmp_path / "a.xml", input_size=64, precision="int8")
    with load("openvino")(tmp_path / "a.xml", size=64, classes=5, threads=1) as runtime:  # type: ignore[call-arg]
        got = np.stack([runtime.infer(frame).copy() for frame in shape_frames])
    with torch.inference_mode():
        expected = halved(torch.from_numpy(shape_frames).permute(0, 3, 1, 2).float()).numpy()
    assert float((got.argmax(1) == expected.argmax(1)).mean()) >= 0.9
