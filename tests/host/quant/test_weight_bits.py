"""Half of the weights' grid: what processors without VNNI need to multiply int8 without saturating."""

from __future__ import annotations

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


@pytest.fixture(scope="module")
def halved(deploy: DeployModel, calibration: list[Tensor]) -> nn.Module:
    return prepare_qat(deploy, calibration, input_size=64, weight_bits=7).eval()


def integers(model: nn.Module) -> dict[str, Tensor]:
    """What an int8 backend stores of each weight."""
    found = {}
    for operation, quantizer in weight_quantizers(model).items():
        grid, weight = affine(quantizer), module_of(model, operation).weight
        assert isinstance(weight, Tensor)
        found[operation] = (WeightPair(grid)(weight.detach()) / grid.scale.reshape(-1, 1, 1, 1)).round()
    return found


def test_two_products_of_any_byte_fit_into_sixteen_bits(halved: nn.Module, quantized: nn.Module) -> None:
    stored = integers(halved)
    assert len(stored) == 53
    assert max(float(values.abs().max()) for values in stored.values()) == 63
    assert 2 * 255 * 63 <= 2**15 - 1 < 2 * 255 * 127
    assert max(float(values.abs().max()) for values in integers(quantized).values()) == 127


def test_training_leaves_the_scales_and_files_keep_them(halved: nn.Module, deploy: DeployModel, tmp_path: Path) -> None:
    scales = {name: q.scale for name, q in weight_quantizers(halved).items()}
    assert not any(scale.requires_grad for scale in scales.values())
    save_qat(halved, tmp_path)
    loaded = weight_quantizers(load_qat(deploy, tmp_path))
    assert all(torch.equal(loaded[name].scale, scale) for name, scale in scales.items())


def test_openvino_answers_as_the_network(halved: nn.Module, shape_frames: np.ndarray, tmp_path: Path) -> None:
    compile_openvino(halved, tmp_path / "a.xml", input_size=64, precision="int8")
    with load("openvino")(tmp_path / "a.xml", size=64, classes=5, threads=1) as runtime:  # type: ignore[call-arg]
        got = np.stack([runtime.infer(frame).copy() for frame in shape_frames])
    with torch.inference_mode():
        expected = halved(torch.from_numpy(shape_frames).permute(0, 3, 1, 2).float()).numpy()
    assert float((got.argmax(1) == expected.argmax(1)).mean()) >= 0.9
