"""The integers in the files: within the grid after training, those of the QAT model, and no sum beyond 32 bits."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from ai_edge_litert import schema_py_generated as schema
from torch import Tensor, nn

from eyas_device.bundle import Precision, RuntimeName
from eyas_device.runtimes import load
from eyas_host.export.artefacts import artefact_files
from eyas_host.export.build import compile_artefact
from eyas_host.export.litert_names import class_paths
from eyas_host.export.litert_ranges import Recorder, activation_ranges
from eyas_host.export.stored import check_stored, stored_integers
from eyas_host.quant.exact import exact_int8
from eyas_host.quant.fold import fold_for_deployment
from eyas_host.quant.integers import bias_units
from eyas_host.quant.qat import load_qat, prepare_qat, save_qat
from eyas_host.quant.quantizers import Affine, affine, module_of, weight_quantizers
from eyas_host.support.errors import CompileError, CompressError
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


# Dead channels


def test_a_dead_channel_of_a_gate_keeps_the_right_logits(
    pixels: Tensor, shape_frames: np.ndarray, tmp_path: Path
) -> None:
    network = tiny_gated(pixels)
    gate: Any = network.backbone.get_submodule("se.conv_expand")
    half = gate.out_channels // 2
    with torch.no_grad():
        gate.weight[:half] = 0
        gate.bias[:half] = 2.0
    model = prepare_qat(fold_for_deployment(network), pixels[::2].split(1), input_size=SIZE, weight_bits=7).eval()
    compile_artefact("litert", "int8", model, tmp_path / "a.tflite", SIZE)
    got = run("litert", tmp_path / "a.tflite", shape_frames)
    with torch.inference_mode():
        expected = model(pixels).numpy()
        exact = exact_int8(model, input_size=SIZE)(pixels).numpy()
    for logits in (got, exact):
        assert float(np.abs(logits - expected).max()) < 0.05 * float(np.abs(expected).max())


def test_a_dead_layer_has_a_range(pixels: Tensor, shape_frames: np.ndarray, tmp_path: Path) -> None:
    """Its output is 0 on every image, and the next layer's bias is stored in steps of that range."""
    network = tiny_gated(pixels)
    reduce: Any = network.backbone.get_submodule("se.conv_reduce")
    with torch.no_grad():
        reduce.weight.zero_()
        reduce.bias.fill_(-1.0)
    model = prepare_qat(fold_for_deployment(network), pixels[::2].split(1), input_size=SIZE).eval()
    compile_artefact("openvino", "int8", model, tmp_path / "a.xml", SIZE)
    got = run("openvino", tmp_path / "a.xml", shape_frames)
    with torch.inference_mode():
        expected = model(pixels).numpy()
    assert float(np.abs(got - expected).max()) < 0.05 * float(np.abs(expected).max())


def far_below_one_step(model: nn.Module) -> nn.Module:
    """A copy whose squeeze-and-excite gate has a bias of 3e9 steps of the accumulator in channel 5."""
    broken = copy.deepcopy(model)
    (operation,) = (name for name in weight_quantizers(broken) if "conv_expand" in name)
    unit = bias_units(broken, input_size=SIZE)[operation]
    gate: Any = module_of(broken, operation)
    gate.bias.data[5] = 3e9 * float(unit[5])
    return broken


@pytest.mark.parametrize("runtime", ["litert", "openvino", "onnx"])
def test_a_bias_beyond_its_accumulator_stops_the_build(
    runtime: RuntimeName, trained: nn.Module, tmp_path: Path
) -> None:
    path = artefact_files(tmp_path, runtime, "int8")[0]
    with pytest.raises(
        CompressError, match=r"conv_expand, channel 5: bias .* 3e\+09 steps .*keep_float = \[\"backbone"
    ):
        compile_artefact(runtime, "int8", far_below_one_step(trained), path, SIZE)
    assert not list(tmp_path.iterdir())


def test_exact_integers_hold_sums_within_their_accumulator(trained: nn.Module, pixels: Tensor) -> None:
    """Saturated at 2^31 - 1 steps, instead of the bias of 3e9 steps that a float64 could hold."""
    broken = far_below_one_step(trained)
    (operation,) = (name for name in weight_quantizers(broken) if "conv_expand" in name)
    unit = bias_units(broken, input_size=SIZE)[operation]
    exact = exact_int8(broken, input_size=SIZE)
    (accumulators,) = (m for m in exact.modules() if torch.equal(getattr(m, "unit", pixels).flatten(), unit))
    sums: list[float] = []
    accumulators.register_forward_hook(lambda module, args, output: sums.append(float(output[0, 5])))
    with torch.inference_mode():
        exact(pixels[:1])
    assert sums == [pytest.approx((2**31 - 1) * float(unit[5]), rel=1e-12)]


# Equal filters


def test_equal_filters_keep_their_own_scales(pixels: Tensor, shape_frames: np.ndarray, tmp_path: Path) -> None:
    """Two layers of the same weights, which the converter stores once; one has learned twice the scale."""
    network = tiny_gated(pixels)
    backbone: Any = network.backbone
    backbone.pool = nn.Sequential(nn.Conv2d(16, 16, 1), nn.ReLU(), nn.Conv2d(16, 16, 1), nn.ReLU(), backbone.pool)
    model = prepare_qat(fold_for_deployment(network.eval()), pixels[::2].split(1), input_size=SIZE).eval()
    (first, one), (second, two) = [entry for entry in weight_quantizers(model).items() if "pool" in entry[0]]
    with torch.no_grad():
        one.scale.fill_(0.635)
        two.scale.fill_(1.27)
        steps = torch.randint(-50, 51, (16, 16, 1, 1), generator=torch.Generator().manual_seed(0)).float()
        for operation in (first, second):
            layer: Any = module_of(model, operation)
            layer.weight.copy_(0.01 * steps)
            layer.bias.zero_()
    compile_artefact("litert", "int8", model, tmp_path / "a.tflite", SIZE)
    graph = schema.ModelT.InitFromPackedBuf((tmp_path / "a.tflite").read_bytes(), 0).subgraphs[0]
    scales = [
        tensor.quantization.scale.tolist()
        for tensor in graph.tensors
        if tensor.type == schema.TensorType.INT8
        and list(tensor.shape) == [16, 1, 1, 16]
        and len(tensor.quantization.scale) == 16
    ]
    assert [pytest.approx([0.005] * 16), pytest.approx([0.01] * 16)] == sorted(s for s in scales if len(set(s)) == 1)
    with torch.inference_mode():
        expected = model(pixels).numpy()
    got = run("litert", tmp_path / "a.tflite", shape_frames)
    assert float(np.abs(got - expected).max()) < 0.05 * float(np.abs(expected).max())


def test_equal_activations_keep_the_ranges_of_their_own_modules() -> None:
    """Two branches that are 0 on the probe, written by the converter in another order than torch runs them."""
    network = nn.Sequential(nn.ReLU(), nn.ReLU())
    paths = class_paths(network)
    names = {module: classes for classes, module in paths.items()}
    tensors = ["pixels", f"{names['1']};", f"{names['0']};1"]
    code = schema.BuiltinOperator.RELU
    model = SimpleNamespace(
        operatorCodes=[SimpleNamespace(builtinCode=code, deprecatedBuiltinCode=code)],
        subgraphs=[
            SimpleNamespace(
                tensors=[SimpleNamespace(name=name.encode()) for name in tensors],
                inputs=[0],
                operators=[SimpleNamespace(opcodeIndex=0, inputs=[0], outputs=[row]) for row in (1, 2)],
            )
        ],
    )
    order: list[Recorder] = []
    recorders = {}
    for module, scale in (("0", 0.1), ("1", 0.2)):
        grid = Affine(torch.tensor(scale), torch.tensor(-128), -128, 127, per_channel=False)
        recorders[f"{module}/relu/0"] = Recorder(grid, order)
        recorders[f"{module}/relu/0"](torch.zeros(1, 2, 2, 2))
    values = dict.fromkeys(tensors, np.zeros((1, 2, 2, 2), np.float32))
    ranges = activation_ranges(model, values, recorders, order, paths)
    assert [ranges[name][1] for name in tensors] == [255.0, pytest.approx(0.2 * 255), pytest.approx(0.1 * 255)]
