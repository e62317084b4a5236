"""The integers in the files: within the grid after training, those of the QAT model, and no sum beyond 32 bits."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from eyas_device.bundle import Precision, RuntimeName
from eyas_device.runtimes import load
from eyas_host.export.build import artefact_files, compile_artefact
from eyas_host.export.stored import check_stored, stored_integers
from eyas_host.quant.fold import fold_for_deployment
from eyas_host.quant.qat import load_qat, prepare_qat, save_qat
from eyas_host.quant.quantizers import affine, module_of, weight_quantizers
from eyas_host.support.errors import CompileError
from tests.support.networks import take_steps, tiny_gated

SIZE = 64
ARTEFACTS: list[tuple[RuntimeName, Precision]] = [
    ("litert", "int8"),
    ("litert", "int16"),
    ("openvino", "int8"),
    ("onnx", "int8"),
]
LAYERS = ("conv_stem", "conv_dw", "se.conv_reduce", "se.conv_expand", "conv_pwl")


@pytest.fixture(scope="module")
def pixels(shape_frames: np.ndarray) -> Tensor:
    return torch.from_numpy(shape_frames).permute(0, 3, 1, 2).float()


@pytest.fixture(scope="module")
def trained(pixels: Tensor, tmp_path_factory: pytest.TempPathFactory) -> nn.Module:
    """A 7-bit QAT model, trained until weights of every layer outgrew their scale, saved and loaded."""
    deploy = fold_for_deployment(tiny_gated(pixels))
    model = prepare_qat(deploy, pixels[::2].split(1), input_size=SIZE, weight_bits=7)
    for quantizer in weight_quantizers(model).values():
        quantizer.disable_gradients()
    take_steps(model, pixels, steps=20, rate=0.03)
    for operation, quantizer in weight_quantizers(model).items():
        weight: Any = module_of(model, operation).weight
        steps = weight.detach().abs().flatten(1).amax(1) / affine(quantizer).scale
        assert float(steps.max()) > 64.5, f"the weights of {operation} did not grow"
    folder = tmp_path_factory.mktemp("qat")
    save_qat(model, folder)
    return load_qat(deploy, folder)


@pytest.fixture(scope="module")
def compiled(trained: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Every integer artefact of the trained model."""
    folder = tmp_path_factory.mktemp("compiled")
    paths = {}
    for runtime, precision in ARTEFACTS:
        paths[f"{runtime}-{precision}"] = path = artefact_files(folder, runtime, precision)[0]
        compile_artefact(runtime, precision, trained, path, SIZE)
    return paths


def run(runtime: str, path: Path, frames: np.ndarray) -> np.ndarray:
    """Logits of the device's runtime."""
    loaded: Any = load(runtime)(path, size=SIZE, classes=5, threads=1)
    with loaded:
        return np.stack([loaded.infer(frame).copy() for frame in frames])


@pytest.mark.parametrize(("runtime", "precision"), ARTEFACTS)
def test_two_products_of_any_byte_fit_into_sixteen_bits_after_training(
    runtime: RuntimeName, precision: Precision, compiled: dict[str, Path]
) -> None:
    stored = stored_integers(runtime, compiled[f"{runtime}-{precision}"])
    assert len(stored) == len(LAYERS)
    for name, values in stored.items():
        largest = int(np.abs(values.astype(int)).max())
        assert largest == 63, f"{name}: the grid is used in full"
        assert 2 * 255 * largest <= 2**15 - 1


@pytest.mark.parametrize("runtime", ["litert", "openvino", "onnx"])
def test_weights_beyond_their_scale_are_clamped_alike(
    runtime: str, compiled: dict[str, Path], trained: nn.Module, pixels: Tensor, shape_frames: np.ndarray
) -> None:
    with torch.inference_mode():
        expected = trained(pixels).numpy()
    got = run(runtime, compiled[f"{runtime}-int8"], shape_frames)
    assert float(np.abs(got - expected).max()) < 0.05 * float(np.abs(expected).max())


@pytest.mark.parametrize("runtime", ["litert", "openvino", "onnx"])
def test_a_file_with_other_integers_is_refused(
    runtime: RuntimeName, trained: nn.Module, compiled: dict[str, Path]
) -> None:
    check_stored(runtime, compiled[f"{runtime}-int8"], trained)
    other = copy.deepcopy(trained)
    weight: Any = module_of(other, next(iter(weight_quantizers(other)))).weight
    weight.data[0, 0, 0, 0] *= -1
    with pytest.raises(CompileError, match=r"other integers than learned: backbone\.conv_stem"):
        check_stored(runtime, compiled[f"{runtime}-int8"], other)


def test_a_file_with_eight_bits_is_refused(trained: nn.Module, tmp_path: Path) -> None:
    eight = copy.deepcopy(trained)
    for quantizer in weight_quantizers(eight).values():
        quantizer.num_bits = 8
    compile_artefact("openvino", "int8", eight, tmp_path / "a.xml", SIZE)
    with pytest.raises(CompileError, match=r"5 layers lie beyond -63\.\.63, the largest is 127 .*weight_bits is 7"):
        check_stored("openvino", tmp_path / "a.xml", trained)
