"""Presets, layers in float and int16 activations, on a small network with every kind of operation."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from ai_edge_litert import schema_py_generated as schema
from onnx import numpy_helper
from timm.layers import create_conv2d
from torch import Tensor, nn

from eyas_device.runtimes import load
from eyas_host.export import litert
from eyas_host.export.litert import compile_litert_fp32, compile_litert_int8, compile_litert_int16
from eyas_host.export.onnx import compile_onnx
from eyas_host.export.openvino import compile_openvino
from eyas_host.export.tensorrt import TensorRtFit, check_tensorrt
from eyas_host.models.factory import PixelClassifier
from eyas_host.quant.exact import exact_int8
from eyas_host.quant.fold import DeployModel, fold_for_deployment
from eyas_host.quant.graph import weighted_layers
from eyas_host.quant.qat import load_qat, prepare_qat, save_qat
from eyas_host.quant.qdq import bake_weights, replace_activations
from eyas_host.quant.quantizers import (
    Affine,
    activation_quantizers,
    affine,
    check_placement,
    float_layers,
    leave_float,
    set_range,
    weight_quantizers,
)
from eyas_host.support.errors import CompileError, CompressError
from tests.support.networks import take_steps
from tests.support.shapes import SHAPES, Pixels
from tests.support.xnnpack import partitions

SIZE, CLASSES = 64, len(SHAPES)
EXAMPLE = torch.zeros(1, 3, SIZE, SIZE)
ACTIVATIONS, WEIGHTS = 14, 8
RUNTIMES = ("litert", "openvino", "onnx")
SUFFIXES = {"litert": ".tflite", "litert16": ".tflite", "openvino": ".xml", "onnx": ".onnx"}
OPENVINO_BOUND = 0.03
"""OpenVINO's int8 kernels saturate on x86 CPUs without VNNI; mean difference of probabilities."""


class Small(nn.Module):
    """SAME padding, ReLU6, padded max-pooling, a residual block, squeeze-and-excite and hard-swish."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = create_conv2d(3, 16, 3, stride=2, padding="same")
        self.norm, self.clamp = nn.BatchNorm2d(16), nn.ReLU6()
        self.pool = nn.MaxPool2d(3, 2, 1)
        self.one, self.norm1, self.act1 = nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()
        self.two, self.norm2, self.act2 = nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()
        self.expand, self.norm3, self.act3 = nn.Conv2d(16, 32, 1), nn.BatchNorm2d(32), nn.Hardswish()
        self.depth = create_conv2d(32, 32, 5, stride=2, padding="same", depthwise=True)
        self.norm4, self.act4 = nn.BatchNorm2d(32), nn.Hardswish()
        self.squeeze, self.act5 = nn.Conv2d(32, 8, 1), nn.ReLU()
        self.excite, self.gate = nn.Conv2d(8, 32, 1), nn.Hardsigmoid()
        self.project, self.norm5 = nn.Conv2d(32, 24, 1), nn.BatchNorm2d(24)
        self.head = nn.Linear(24, CLASSES)

    def get_classifier(self) -> nn.Module:
        return self.head

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.clamp(self.norm(self.stem(x))))
        x = self.act2(self.norm2(self.two(self.act1(self.norm1(self.one(x))))) + x)
        x = self.act4(self.norm4(self.depth(self.act3(self.norm3(self.expand(x))))))
        x = x * self.gate(self.excite(self.act5(self.squeeze(x.mean((2, 3), keepdim=True)))))
        logits: Tensor = self.head(self.norm5(self.project(x)).relu().mean((2, 3)))
        return logits


@pytest.fixture(scope="module")
def pixels(shape_frames: Pixels) -> Tensor:
    return torch.from_numpy(shape_frames).permute(0, 3, 1, 2).float()


@pytest.fixture(scope="module")
def deploy(pixels: Tensor) -> DeployModel:
    torch.manual_seed(0)
    model = PixelClassifier(Small(), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    take_steps(model, pixels, steps=40, rate=5e-3)
    with torch.no_grad():
        spread = model.eval()(pixels).std(dim=1).mean()
        for parameter in model.classifier.parameters():
            parameter.div_(spread)  # high confidence hides differences
    return fold_for_deployment(model)


@pytest.fixture(scope="module")
def calibration(pixels: Tensor) -> list[Tensor]:
    return list(pixels[::2].split(1))


@pytest.fixture(scope="module")
def mixed(deploy: DeployModel, calibration: list[Tensor]) -> nn.Module:
    return prepare_qat(deploy, calibration, input_size=SIZE).eval()


@pytest.fixture(scope="module")
def symmetric(deploy: DeployModel, calibration: list[Tensor]) -> nn.Module:
    return prepare_qat(deploy, calibration, input_size=SIZE, preset="symmetric").eval()


@torch.inference_mode()
def probabilities_of(model: nn.Module, pixels: Tensor) -> np.ndarray:
    return torch.cat([model(one) for one in pixels.split(1)]).softmax(1).numpy()


def run(runtime: str, path: Path, frames: Pixels) -> np.ndarray:
    loaded: Any = load(runtime.removesuffix("16"))(path, size=SIZE, classes=CLASSES, threads=1)
    with loaded:
        return torch.tensor(np.stack([loaded.infer(frame).copy() for frame in frames])).softmax(1).numpy()


def artefact(runtime: str, model: nn.Module, folder: Path) -> Path:
    """The model compiled into `folder`, once."""
    path = folder / f"{id(model)}-{runtime}{SUFFIXES[runtime]}"
    if not path.exists():
        if runtime == "litert":
            compile_litert_int8(model, path, input_size=SIZE)
        elif runtime == "litert16":
            compile_litert_int16(model, path, input_size=SIZE)
        elif runtime == "onnx":
            compile_onnx(model, path, input_size=SIZE, precision="int8")
        else:
            compile_openvino(model, path, input_size=SIZE, precision="int8")
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("compiled")


def gap(runtime: str, model: nn.Module, folder: Path, pixels: Tensor, frames: Pixels) -> float:
    """Mean difference of probabilities between an artefact and the model it was made from."""
    expected = probabilities_of(model, pixels)
    assert expected.max(axis=1).mean() > 0.4 and expected.std(axis=0).max() > 0.1, "predictions too similar to compare"
    return float(np.abs(run(runtime, artefact(runtime, model, folder), frames) - expected).mean())


# One network, three backends


def bound(runtime: str, model: nn.Module, pixels: Tensor) -> float:
    """Error bound for a correct implementation of the integer network: somewhat above exact arithmetic in torch.

    A value between two steps may round either way.
    """
    if runtime == "openvino":
        return OPENVINO_BOUND
    exact = probabilities_of(exact_int8(model, input_size=SIZE), pixels)
    return 1.5 * float(np.abs(exact - probabilities_of(model, pixels)).mean()) + 0.001


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize("preset", ["mixed", "symmetric"])
def test_every_kind_of_operation_agrees_across_runtimes(
    runtime: str, preset: str, pixels: Tensor, shape_frames: Pixels, folder: Path, request: pytest.FixtureRequest
) -> None:
    model: nn.Module = request.getfixturevalue(preset)
    placement = check_placement(model, EXAMPLE)
    assert (len(placement.activations), len(placement.weights)) == (ACTIVATIONS, WEIGHTS)
    assert gap(runtime, model, folder, pixels, shape_frames) < bound(runtime, model, pixels) < 0.05


def test_float_with_unequal_means(deploy: DeployModel, pixels: Tensor, shape_frames: Pixels, tmp_path: Path) -> None:
    assert deploy.mean.shape == (1, 3, 1, 1) and len(set(deploy.mean.flatten().tolist())) == 3
    compile_litert_fp32(deploy, tmp_path / "a.tflite", input_size=SIZE)
    got = run("litert", tmp_path / "a.tflite", shape_frames)
    assert float(np.abs(got - probabilities_of(deploy, pixels)).max()) < 1e-4


def test_the_input_range_covers_all_pixel_values(mixed: nn.Module) -> None:
    grid = affine(activation_quantizers(mixed)["/sub/0"])
    assert grid.bounds == pytest.approx((-255 * 0.485, 255 * (1 - 0.406)), abs=float(grid.scale))


def test_an_int8_hard_swish_would_split_the_graph(
    mixed: nn.Module, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert partitions(artefact("litert", mixed, folder)) == 1
    monkeypatch.setattr(litert, "_FLOAT_KINDS", ("FULLY_CONNECTED", "OUTPUT"))
    assert partitions(artefact("litert", mixed, tmp_path)) > 2


@pytest.mark.parametrize("runtime", ["litert", "onnx"])
def test_a_wrong_range_is_detected(
    runtime: str, mixed: nn.Module, pixels: Tensor, shape_frames: Pixels, tmp_path: Path
) -> None:
    widened = copy.deepcopy(mixed)
    quantizer = activation_quantizers(widened)["/sub/0"]
    low, high = affine(quantizer).bounds
    set_range(quantizer, 4 * low, 4 * high)
    got = run(runtime, artefact(runtime, widened, tmp_path), shape_frames)
    assert float(np.abs(got - probabilities_of(mixed, pixels)).mean()) > bound(runtime, mixed, pixels)


# Symmetric


def test_symmetric_has_zero_points_of_zero_and_keeps_the_pixels_range(
    symmetric: nn.Module, deploy: DeployModel
) -> None:
    for name, quantizer in activation_quantizers(symmetric).items():
        grid = affine(quantizer)
        assert int(grid.zero_point) == 0 and grid.low == -128 and not grid.per_channel, name
        x = torch.linspace(-150, 150, 999) * float(grid.scale)
        with torch.inference_mode():
            steps = quantizer(x).double() / float(grid.scale)
        assert float((steps - steps.round()).abs().max()) < 1e-2 and (steps.min().round(), steps.max().round()) == (
            -128,
            127,
        ), name
    low, high = affine(activation_quantizers(symmetric)["/sub/0"]).bounds
    assert low <= -float(deploy.mean.max()) + 1e-3 and high >= 255 - float(deploy.mean.min()) - 1e-3


def test_symmetric_is_saved_and_trained(
    symmetric: nn.Module, deploy: DeployModel, pixels: Tensor, tmp_path: Path
) -> None:
    save_qat(symmetric, tmp_path)
    loaded = load_qat(deploy, tmp_path)
    assert np.array_equal(probabilities_of(loaded, pixels), probabilities_of(symmetric, pixels))
    model = copy.deepcopy(symmetric).train()
    nn.functional.cross_entropy(model(pixels), torch.arange(CLASSES).repeat_interleave(4)).backward()
    quantizers: dict[str, Any] = dict(activation_quantizers(model))
    assert quantizers.pop("/sub/0").scale.grad is None
    assert all(q.scale.grad is not None and float(q.scale.grad.abs()) > 0 for q in quantizers.values())


def test_tensorrt_accepts_symmetric_and_refuses_mixed(symmetric: nn.Module, mixed: nn.Module, folder: Path) -> None:
    assert check_tensorrt(artefact("onnx", symmetric, folder)) == TensorRtFit(18, ACTIVATIONS, WEIGHTS, 0)
    path = artefact("onnx", mixed, folder)
    with pytest.raises(CompileError, match="quantized to uint8, int8 is needed") as caught:
        check_tensorrt(path)
    graph = onnx.load(path).graph
    stored = {tensor.name for tensor in graph.initializer}
    nodes = [node for node in graph.node if node.op_type in ("QuantizeLinear", "DequantizeLinear")]
    of_activations = [node.output[0] for node in nodes if node.input[0] not in stored]
    assert len(of_activations) > 1.5 * len(dict(activation_quantizers(mixed)))
    assert all(f"{name}: quantized to uint8, int8 is needed" in str(caught.value) for name in of_activations)


def damage(model: Any, what: str) -> None:
    """Break one rule of TensorRT in a valid ONNX file."""
    graph = model.graph
    constants = {tensor.name: tensor for tensor in graph.initializer}
    convolution = next(node for node in graph.node if node.op_type == "Conv")
    makers = {node.output[0]: node for node in graph.node}
    weight = makers[convolution.input[1]]
    quantize = next(node for node in graph.node if node.op_type == "QuantizeLinear")
    if what == "opset":
        model.opset_import[0].version = 23
    elif what == "axis":
        next(a for a in weight.attribute if a.name == "axis").i = 1
    elif what == "uint8":
        graph.initializer.append(numpy_helper.from_array(np.zeros((), np.uint8), "unsigned"))
        quantize.input[2] = "unsigned"
    elif what == "zero point":
        graph.initializer.append(numpy_helper.from_array(np.array(-5, np.int8), "shifted"))
        quantize.input[2] = "shifted"
    elif what == "no zero point":
        del quantize.input[2]
    elif what == "scales":
        scales = np.full(3, 0.1, np.float32)
        graph.initializer.append(numpy_helper.from_array(scales, "scales"))
        quantize.input[1] = "scales"
    elif what == "input":
        convolution.input[0] = quantize.input[0]
    elif what == "weight":
        values = numpy_helper.to_array(constants[weight.input[0]]).astype(np.float32)
        graph.initializer.append(numpy_helper.from_array(values, "floats"))
        convolution.input[1] = "floats"


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("opset", "opset 23, 13 to 20 is allowed"),
        ("axis", r"16 scales along axis 1 for a weight \[16, 3, 3, 3\]"),
        ("uint8", "quantized to uint8, int8 is needed"),
        ("zero point", "zero point -5, 0 is needed"),
        ("no zero point", "without a zero point it quantizes to uint8"),
        ("scales", "3 scales for an activation, 1 is needed"),
        ("input", "its input comes from Sub, not DequantizeLinear"),
        ("weight", "1 convolutions have float weights, 0 may"),
    ],
)
def test_tensorrt_refuses_a_single_violation(
    symmetric: nn.Module, folder: Path, tmp_path: Path, what: str, message: str
) -> None:
    model = onnx.load(artefact("onnx", symmetric, folder))
    damage(model, what)
    onnx.save(model, str(tmp_path / "a.onnx"))
    with pytest.raises(CompileError, match=message):
        check_tensorrt(tmp_path / "a.onnx")


def test_tensorrt_cannot_read_junk(tmp_path: Path) -> None:
    (tmp_path / "a.onnx").write_bytes(b"junk" * 50)
    with pytest.raises(CompileError, match="not an ONNX file"):
        check_tensorrt(tmp_path / "a.onnx")


# Layers left float

GONE = {
    "backbone.stem": {"/sub/0"},
    "backbone.two": set(),
    "backbone.squeeze": {"backbone/mean/0"},
    "backbone.project": {"backbone/mul/0", "backbone/relu/0"},
}
"""Layer -> activation quantizers that no integer operation needs when the layer is in float."""


@pytest.mark.parametrize("name", GONE)
def test_a_float_layer_takes_its_quantizers_with_it(
    name: str, mixed: nn.Module, deploy: DeployModel, calibration: list[Tensor]
) -> None:
    model = prepare_qat(deploy, calibration, input_size=SIZE, keep_float=[name])
    (layer,) = [layer for layer in weighted_layers(mixed, EXAMPLE) if layer.name == name]
    assert set(weight_quantizers(mixed)) - set(weight_quantizers(model)) == {layer.operation}
    assert set(activation_quantizers(mixed)) - set(activation_quantizers(model)) == GONE[name]
    assert float_layers(model, EXAMPLE) == (name,)
    check_placement(model, EXAMPLE, keep_float=[name])
    with pytest.raises(CompressError, match="quantizers do not match"):
        check_placement(model, EXAMPLE)
    kept: Any = model.get_submodule(name)
    original: Any = deploy.get_submodule(name)
    assert torch.equal(kept.weight, original.weight) and torch.equal(kept.bias, original.bias)
    other = copy.deepcopy(mixed)
    assert (
        leave_float(other, EXAMPLE, [name]).activations
        == check_placement(model, EXAMPLE, keep_float=[name]).activations
    )


@pytest.fixture(scope="module")
def partly_float(deploy: DeployModel, calibration: list[Tensor]) -> nn.Module:
    return prepare_qat(deploy, calibration, input_size=SIZE, keep_float=list(GONE)).eval()


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_float_layers_are_float_in_each_artefact(
    runtime: str, partly_float: nn.Module, deploy: DeployModel, pixels: Tensor, shape_frames: Pixels, folder: Path
) -> None:
    assert gap(runtime, partly_float, folder, pixels, shape_frames) < bound(runtime, partly_float, pixels)
    path = artefact(runtime, partly_float, folder)
    filters = [deploy.get_submodule(name).weight.detach().numpy() for name in GONE]
    if runtime == "litert":
        graph = schema.ModelT.InitFromPackedBuf(path.read_bytes(), 0)
        codes = schema.BuiltinOperator
        kinds = [
            graph.subgraphs[0].tensors[op.inputs[1]].type
            for op in graph.subgraphs[0].operators
            if graph.operatorCodes[op.opcodeIndex].builtinCode in (codes.CONV_2D, codes.DEPTHWISE_CONV_2D)
        ]
        assert kinds.count(schema.TensorType.FLOAT32) == len(GONE)
        assert kinds.count(schema.TensorType.INT8) == WEIGHTS - len(GONE)
    elif runtime == "onnx":
        model = onnx.load(path)
        constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
        stored = [constants[n.input[1]] for n in model.graph.node if n.op_type == "Conv" and n.input[1] in constants]
        assert len(stored) == len(GONE)
        assert all(any(f.shape == s.shape and np.array_equal(f, s) for s in stored) for f in filters)


def test_float_layers_are_saved_and_known_to_the_tensorrt_check(
    symmetric: nn.Module, deploy: DeployModel, pixels: Tensor, tmp_path: Path
) -> None:
    model = copy.deepcopy(symmetric)
    leave_float(model, EXAMPLE, ["backbone.two", "backbone.project"])
    save_qat(model, tmp_path)
    loaded = load_qat(deploy, tmp_path)
    assert float_layers(loaded, EXAMPLE) == ("backbone.two", "backbone.project")
    assert np.array_equal(probabilities_of(loaded, pixels), probabilities_of(model, pixels))
    path = artefact("onnx", model, tmp_path)
    with pytest.raises(CompileError, match="2 convolutions have float weights, 0 may"):
        check_tensorrt(path)
    assert check_tensorrt(path, float_convolutions=2).weights == WEIGHTS - 2


def test_a_layer_that_does_not_exist(deploy: DeployModel, calibration: list[Tensor]) -> None:
    with pytest.raises(CompressError, match=r"'backbone.sterm' is not a layer .* similar names: backbone.stem"):
        prepare_qat(deploy, calibration, input_size=SIZE, keep_float=["backbone.sterm"])


# Sixteen bits


@pytest.mark.parametrize("preset", ["mixed", "symmetric"])
def test_int16_activations_predict_as_the_model_with_the_same_weights(
    preset: str, pixels: Tensor, shape_frames: Pixels, folder: Path, request: pytest.FixtureRequest
) -> None:
    model: nn.Module = request.getfixturevalue(preset)
    assert gap("litert16", model, folder, pixels, shape_frames) < 2 * bound("litert", model, pixels)
    graph = schema.ModelT.InitFromPackedBuf(artefact("litert16", model, folder).read_bytes(), 0)
    tensors = graph.subgraphs[0].tensors
    kinds = schema.TensorType
    convolutions = [
        [tensors[index].type for index in (*op.inputs, *op.outputs)]
        for op in graph.subgraphs[0].operators
        if graph.operatorCodes[op.opcodeIndex].builtinCode
        in (schema.BuiltinOperator.CONV_2D, schema.BuiltinOperator.DEPTHWISE_CONV_2D)
    ]
    assert convolutions == [[kinds.INT16, kinds.INT8, kinds.INT64, kinds.INT16]] * WEIGHTS
    ends = [*graph.subgraphs[0].inputs, *graph.subgraphs[0].outputs]
    assert [tensors[index].type for index in ends] == [kinds.FLOAT32, kinds.FLOAT32]


class Clamp(nn.Module):
    """The symmetric range of a quantizer without its steps."""

    def __init__(self, grid: Affine) -> None:
        super().__init__()
        self.limit = max(abs(bound) for bound in grid.bounds)

    def forward(self, x: Tensor) -> Tensor:
        return x.clamp(-self.limit, self.limit)


def test_int16_is_the_network_of_rounded_weights_with_clamps(
    mixed: nn.Module, pixels: Tensor, shape_frames: Pixels, folder: Path
) -> None:
    clamped = bake_weights(mixed)
    replace_activations(clamped, Clamp)
    assert gap("litert16", mixed, folder, pixels, shape_frames) > 3e-4
    got = run("litert16", artefact("litert16", mixed, folder), shape_frames)
    assert float(np.abs(got - probabilities_of(clamped, pixels)).mean()) < 1e-4


# Bad input


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ([], "0 calibration images; at least 2"),
        ([torch.zeros(1, 3, 64, 64)], "1 calibration images; at least 2"),
        (
            [torch.zeros(1, 3, 32, 32)] * 4,
            r"batch 0 is torch.float32 \[1, 3, 32, 32\]; float32 pixels \[n, 3, 64, 64\]",
        ),
        ([torch.zeros(1, 3, 64, 64), torch.zeros(3, 64, 64)], r"batch 1 is torch.float32 \[3, 64, 64\]"),
        ([torch.zeros(1, 3, 64, 64, dtype=torch.uint8)] * 4, "batch 0 is torch.uint8"),
        ([torch.zeros(1, 3, 64, 64), torch.full((1, 3, 64, 64), float("nan"))], "batch 1 has values nan"),
        ([torch.full((2, 3, 64, 64), -1.0)], r"values -1..-1; float32 pixels .*0..255, are needed"),
        ([torch.full((2, 3, 64, 64), 256.0)], r"values 256..256"),
    ],
)
def test_images_that_cannot_set_ranges(deploy: DeployModel, images: list[Tensor], message: str) -> None:
    with pytest.raises(CompressError, match=message):
        prepare_qat(deploy, images, input_size=SIZE)


def test_two_images_in_one_batch_are_enough(deploy: DeployModel, pixels: Tensor) -> None:
    check_placement(prepare_qat(deploy, [pixels[:2]], input_size=SIZE), EXAMPLE)


def test_the_range_of_an_integer_input_is_never_guessed(
    mixed: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(litert, "_pad_pools_with_zeros", lambda network, example: None)  # padding with minus infinity
    with pytest.raises(CompileError, match=r"a\.tflite: no learned range for 1 tensors.*MaxPool2d"):
        compile_litert_int8(mixed, tmp_path / "a.tflite", input_size=SIZE)
    assert not list(tmp_path.iterdir())


class Odd(nn.Module):
    """Ends in a function that no device runtime supports."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.special.bessel_j0(x.mean((2, 3)))


def test_an_operation_that_a_backend_lacks_is_named(tmp_path: Path) -> None:
    for name in ("onnx", "openvino", "litert"):
        with pytest.raises(CompileError, match="bessel_j0"):
            if name == "onnx":
                compile_onnx(Odd(), tmp_path / "a.onnx", input_size=SIZE, precision="fp32")
            elif name == "openvino":
                compile_openvino(Odd(), tmp_path / "a.xml", input_size=SIZE, precision="fp32")
            else:
                compile_litert_fp32(Odd(), tmp_path / "a.tflite", input_size=SIZE)
    assert not list(tmp_path.iterdir())
