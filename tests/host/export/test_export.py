"""Artefacts: predictions against the network they were made from, and the contents of the files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import flatbuffers
import numpy as np
import onnx
import openvino
import pytest
import torch
from ai_edge_litert import schema_py_generated as schema
from ai_edge_quantizer.utils import tfl_flatbuffer_utils
from onnx import numpy_helper
from torch import Tensor, nn

from eyas_device.runtimes import load
from eyas_host.export.artefacts import artefact_files
from eyas_host.export.litert import compile_litert_fp32, compile_litert_int8
from eyas_host.export.onnx import compile_onnx
from eyas_host.export.onnx_layout import original_weights
from eyas_host.export.openvino import compile_openvino
from eyas_host.quant.exact import ExactRound, exact_int8
from eyas_host.quant.fold import DeployModel
from eyas_host.quant.qdq import ActivationPair, WeightPair, bake_weights, to_qdq
from eyas_host.quant.quantizers import activation_quantizers, affine, module_of, weight_quantizers
from eyas_host.support.errors import CompileError
from tests.support.networks import V3_SMALL
from tests.support.xnnpack import partitions

SIZE, CLASSES = 64, 5
INT8_MEAN_DP, INT8_AGREEMENT = 0.03, 0.8
"""Two correct int8 implementations differ where a value falls between two steps; a wrong scale is off by far more."""


@pytest.fixture(scope="module")
def pixels(shape_frames: np.ndarray) -> Tensor:
    return torch.from_numpy(shape_frames).permute(0, 3, 1, 2).float()


@torch.inference_mode()
def logits_of(model: nn.Module, pixels: Tensor) -> np.ndarray:
    return torch.cat([model(one) for one in pixels.split(1)]).numpy()


def softmax(logits: np.ndarray) -> np.ndarray:
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    return np.asarray(powers / powers.sum(axis=1, keepdims=True))


def run(runtime: str, path: Path, frames: np.ndarray) -> np.ndarray:
    """Logits of the device's runtime."""
    loaded: Any = load(runtime)(path, size=SIZE, classes=CLASSES, threads=1)
    with loaded:
        return np.stack([loaded.infer(frame).copy() for frame in frames])


def check_int8(got: np.ndarray, reference: np.ndarray) -> None:
    expected = softmax(reference)
    assert expected.max(axis=1).mean() > 0.4, "the predictions are too flat to compare"
    assert expected.std(axis=0).max() > 0.1, "the predictions are the same for every image"
    assert float(np.abs(softmax(got) - expected).mean()) < INT8_MEAN_DP
    assert float((got.argmax(1) == reference.argmax(1)).mean()) >= INT8_AGREEMENT


def check_fp32(got: np.ndarray, reference: np.ndarray) -> None:
    assert got.dtype == np.float32 and got.shape == (20, CLASSES)
    assert float(np.abs(got - reference).max()) < 1e-3 * float(np.abs(reference).max())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("compiled")


@pytest.fixture(scope="module")
def litert_fp32(deploy: DeployModel, folder: Path) -> Path:
    path = folder / "litert-fp32.tflite"
    compile_litert_fp32(deploy, path, input_size=SIZE)
    return path


@pytest.fixture(scope="module")
def litert_int8(quantized: nn.Module, folder: Path) -> Path:
    path = folder / "litert-int8.tflite"
    compile_litert_int8(quantized, path, input_size=SIZE)
    return path


@pytest.fixture(scope="module")
def openvino_fp32(deploy: DeployModel, folder: Path) -> Path:
    path = folder / "openvino-fp32.xml"
    compile_openvino(deploy, path, input_size=SIZE, precision="fp32")
    return path


@pytest.fixture(scope="module")
def openvino_int8(quantized: nn.Module, folder: Path) -> Path:
    path = folder / "openvino-int8.xml"
    compile_openvino(quantized, path, input_size=SIZE, precision="int8")
    return path


@pytest.fixture(scope="module")
def onnx_fp32(deploy: DeployModel, folder: Path) -> Path:
    path = folder / "onnx-fp32.onnx"
    compile_onnx(deploy, path, input_size=SIZE, precision="fp32")
    return path


@pytest.fixture(scope="module")
def onnx_int8(quantized: nn.Module, folder: Path) -> Path:
    path = folder / "onnx-int8.onnx"
    compile_onnx(quantized, path, input_size=SIZE, precision="int8")
    return path


# Quantize-dequantize pairs, and exact integers


def test_qdq_pairs_round_as_the_quantizers_they_replace(quantized: nn.Module) -> None:
    generator = torch.Generator().manual_seed(0)
    for name, quantizer in activation_quantizers(quantized).items():
        grid = affine(quantizer)
        low, high = grid.bounds
        x = low + (high - low) * (1.2 * torch.rand(2000, generator=generator) - 0.1)
        with torch.inference_mode():
            steps = (ActivationPair(grid)(x) - quantizer(x)) / float(grid.scale)
            exact = (ExactRound(grid)(x.double()) - quantizer(x)) / float(grid.scale)
        for gap in (steps, exact):
            assert float(gap.abs().max()) < 1.01 and float((gap.abs() > 0.01).float().mean()) < 0.005, name
    for name, quantizer in weight_quantizers(quantized).items():
        weight, grid = module_of(quantized, name).weight, affine(quantizer)
        with torch.inference_mode():
            steps = (WeightPair(grid)(weight) - quantizer(weight)) / grid.scale.reshape(-1, 1, 1, 1)
        assert float(steps.abs().max()) < 1.01 and float((steps.abs() > 0.01).float().mean()) < 0.03, (
            name
        )  # ties in the stem


def test_qdq_pairs_predict_as_the_int8_network(quantized: nn.Module, pixels: Tensor) -> None:
    before = {name: value.clone() for name, value in quantized.state_dict().items()}
    converted = to_qdq(quantized)
    check_int8(logits_of(converted, pixels), logits_of(quantized, pixels))
    assert not activation_quantizers(converted) and not weight_quantizers(converted)
    kinds = [type(m) for m in converted.modules()]
    assert (kinds.count(ActivationPair), kinds.count(WeightPair)) == (V3_SMALL["activations"], V3_SMALL["weights"])
    assert all(torch.equal(value, before[name]) for name, value in quantized.state_dict().items())


def test_baked_weights_are_the_rounded_ones(quantized: nn.Module, pixels: Tensor) -> None:
    baked = bake_weights(quantized)
    assert not weight_quantizers(baked) and len(activation_quantizers(baked)) == V3_SMALL["activations"]
    for name, quantizer in weight_quantizers(quantized).items():
        steps = module_of(baked, name).weight.detach().double() / affine(quantizer).scale.reshape(-1, 1, 1, 1)
        assert float((steps - steps.round()).abs().max()) < 1e-4 and float(steps.abs().max()) < 127.01
    check_int8(logits_of(baked, pixels), logits_of(quantized, pixels))


def test_exact_int8_is_integers_throughout(quantized: nn.Module, pixels: Tensor) -> None:
    exact = exact_int8(quantized, input_size=SIZE)
    seen = 0

    def on_grid(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal seen
        assert isinstance(module, ExactRound)
        integers = output / module.scale + module.zero_point
        assert output.dtype == torch.float64
        assert float((integers - integers.round()).abs().max()) < 1e-9
        assert float(integers.min()) > -128.5 and float(integers.max()) < 127.5
        seen += 1

    for module in exact.modules():
        if isinstance(module, ExactRound):
            module.register_forward_hook(on_grid)
    got = logits_of(exact, pixels)
    assert seen == V3_SMALL["activations"] * len(pixels) and got.dtype == np.float32
    check_int8(got, logits_of(quantized, pixels))


# Predictions of the runtimes


@pytest.mark.parametrize("runtime", ["litert", "openvino", "onnx"])
def test_float_artefacts_predict_as_the_folded_network(
    runtime: str, deploy: DeployModel, pixels: Tensor, shape_frames: np.ndarray, request: pytest.FixtureRequest
) -> None:
    compiled: Path = request.getfixturevalue(f"{runtime}_fp32")
    check_fp32(run(runtime, compiled, shape_frames), logits_of(deploy, pixels))
    files = artefact_files(compiled.parent, runtime, "fp32")  # type: ignore[arg-type]
    assert files[0] == compiled and all(file.stat().st_size for file in files)


@pytest.mark.parametrize("runtime", ["litert", "openvino", "onnx"])
def test_int8_artefacts_predict_as_the_int8_network(
    runtime: str, quantized: nn.Module, pixels: Tensor, shape_frames: np.ndarray, request: pytest.FixtureRequest
) -> None:
    compiled: Path = request.getfixturevalue(f"{runtime}_int8")
    check_int8(run(runtime, compiled, shape_frames), logits_of(quantized, pixels))


# Contents of the files


class Graph:
    """A .tflite, read with the schema's own classes."""

    def __init__(self, path: Path) -> None:
        self.model = schema.ModelT.InitFromPackedBuf(path.read_bytes(), 0)
        (self.graph,) = self.model.subgraphs
        names = {v: k for k, v in vars(schema.BuiltinOperator).items() if not k.startswith("_")}
        self.operators = [
            (names[self.model.operatorCodes[op.opcodeIndex].builtinCode], self._kinds(op.inputs), op)
            for op in self.graph.operators
        ]

    def _kinds(self, indices: Any) -> list[int]:
        return [self.graph.tensors[index].type for index in indices if index >= 0]

    def tensor(self, index: int) -> Any:
        return self.graph.tensors[index]


def test_litert_int8_takes_pixels_minus_128(litert_int8: Path) -> None:
    graph = Graph(litert_int8)
    (index,) = graph.graph.inputs
    pixels = graph.tensor(index)
    assert pixels.type == schema.TensorType.INT8 and list(pixels.shape) == [1, SIZE, SIZE, 3]
    assert pixels.quantization.scale[0] == pytest.approx(1.0, abs=1e-6) and list(pixels.quantization.zeroPoint) == [
        -128
    ]
    assert graph.tensor(graph.graph.outputs[0]).type == schema.TensorType.FLOAT32


def test_litert_int8_has_int8_convolutions_and_float_hard_swishes(litert_int8: Path) -> None:
    graph = Graph(litert_int8)
    convolutions = [op for op in graph.operators if op[0] in ("CONV_2D", "DEPTHWISE_CONV_2D")]
    assert len(convolutions) == V3_SMALL["weights"]
    for kind, kinds, op in convolutions:
        assert kinds == [schema.TensorType.INT8, schema.TensorType.INT8, schema.TensorType.INT32], kind
        assert not np.any(graph.tensor(op.inputs[1]).quantization.zeroPoint)
    swishes = [kinds for kind, kinds, _ in graph.operators if kind == "HARD_SWISH"]
    assert len(swishes) == V3_SMALL["hard_swishes"] and all(kinds == [schema.TensorType.FLOAT32] for kinds in swishes)
    (head,) = [kinds for kind, kinds, _ in graph.operators if kind == "FULLY_CONNECTED"]
    assert schema.TensorType.INT8 not in head


def test_xnnpack_takes_the_int8_graph_as_one_partition(litert_int8: Path) -> None:
    assert partitions(litert_int8) == 1


def stored_weights(path: Path) -> list[tuple[np.ndarray, np.ndarray]]:
    """Weights and scales of each convolution, output channels first."""
    graph = Graph(path)
    stored = []
    for kind, _, op in graph.operators:
        if kind in ("CONV_2D", "DEPTHWISE_CONV_2D"):
            tensor = graph.tensor(op.inputs[1])
            buffer = graph.model.buffers[tensor.buffer]
            outside = buffer.data is None  # large buffers follow the flatbuffer in the same file
            raw = path.read_bytes()[buffer.offset : buffer.offset + buffer.size] if outside else bytes(buffer.data)
            data = np.frombuffer(raw, dtype=np.int8)
            order = (0, 3, 1, 2) if kind == "CONV_2D" else (3, 0, 1, 2)
            scale = np.asarray(tensor.quantization.scale, dtype=np.float64)
            stored.append((data.reshape(tensor.shape).transpose(order), scale))
    return stored


def test_litert_int8_weights_are_the_trained_ones(litert_int8: Path, quantized: nn.Module) -> None:
    stored = stored_weights(litert_int8)
    for name, quantizer in weight_quantizers(quantized).items():
        step = affine(quantizer).scale.numpy().reshape(-1, 1, 1, 1)
        with torch.inference_mode():
            expected = quantizer(module_of(quantized, name).weight).double().numpy()
        restored = [w * s.reshape(-1, 1, 1, 1) for w, s in stored if w.shape == expected.shape]
        assert any(np.abs((r - expected) / step).max() < 1.02 for r in restored), name


def test_litert_int8_weights_keep_the_trained_scales(litert_int8: Path, quantized: nn.Module) -> None:
    stored = stored_weights(litert_int8)
    for name, quantizer in weight_quantizers(quantized).items():
        expected = affine(quantizer).scale.numpy()
        assert any(len(s) == len(expected) and np.allclose(s, expected, rtol=1e-5) for _, s in stored), name


def test_litert_int8_has_a_quarter_of_the_size(litert_int8: Path, litert_fp32: Path) -> None:
    assert litert_int8.stat().st_size < litert_fp32.stat().st_size / 4 + 400_000


def test_litert_int8_writes_equal_vectors_once(litert_int8: Path, shape_frames: np.ndarray, tmp_path: Path) -> None:
    builder = flatbuffers.Builder()
    builder.Finish(tfl_flatbuffer_utils.read_model(litert_int8.read_bytes()).Pack(builder), b"TFL3")
    (tmp_path / "plain.tflite").write_bytes(builder.Output())
    assert litert_int8.stat().st_size < len(builder.Output()) - 100_000  # two of three 8-byte zero points a channel
    plain, written = (run("litert", path, shape_frames) for path in (tmp_path / "plain.tflite", litert_int8))
    np.testing.assert_array_equal(plain, written)


def test_an_onnx_file_whose_weights_share_zero_points_still_runs(
    onnx_int8: Path, quantized: nn.Module, pixels: Tensor, shape_frames: np.ndarray, tmp_path: Path
) -> None:
    """Older bundles have such files: a newer agent must not refuse them."""
    model = onnx.load(onnx_int8)
    constants = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    shared: dict[tuple[int, ...], str] = {}
    for node in model.graph.node:
        if node.op_type == "DequantizeLinear" and node.input[0] in constants:
            node.input[2] = shared.setdefault(constants[node.input[2]].shape, node.input[2])
    assert len(shared) < V3_SMALL["weights"]
    onnx.save(model, tmp_path / "a.onnx")
    check_int8(run("onnx", tmp_path / "a.onnx", shape_frames), logits_of(quantized, pixels))


def test_onnx_int8_stores_integers(onnx_int8: Path, onnx_fp32: Path, quantized: nn.Module) -> None:
    model = onnx.load(onnx_int8)
    onnx.checker.check_model(model, full_check=True)
    constants = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    assert not any(n.op_type == "Clip" and n.input[0] in constants for n in model.graph.node)
    read = [n for n in model.graph.node if n.op_type == "DequantizeLinear" and n.input[0] in constants]
    stored = {t.name: original_weights(t) for t in model.graph.initializer if t.data_type == onnx.TensorProto.INT8}
    weights = [stored[n.input[0]] for n in read]
    assert len(weights) == V3_SMALL["weights"] and {w.dtype for w in weights} == {np.dtype(np.int8)}
    assert not any(n.op_type == "QuantizeLinear" and n.input[0] in constants for n in model.graph.node)
    assert all(w.min() >= -127 for w in weights)
    scales = [constants[n.input[1]][: len(w)].reshape(-1, 1, 1, 1) for n, w in zip(read, weights, strict=True)]
    restored = [(w * scale).astype(np.float32) for w, scale in zip(weights, scales, strict=True)]
    restored += [6 * weight for weight in restored]  # of gates: the slope of their hard-sigmoid, 1/6, is in the scale
    for name, quantizer in weight_quantizers(quantized).items():
        with torch.inference_mode():
            expected = quantizer(module_of(quantized, name).weight).numpy()
        step = float(affine(quantizer).scale.max())
        close = [r for r in restored if r.shape == expected.shape and np.abs(r - expected).max() < 1.01 * step]
        # the largest weight of each of the stem's 16 channels falls between two steps: the last bit decides
        assert any(np.mean(np.abs(r - expected) < 0.01 * step) > 0.96 for r in close), name
    assert onnx_int8.stat().st_size < onnx_fp32.stat().st_size / 2


def test_onnx_files_hold_no_paths_of_the_workstation(onnx_int8: Path, onnx_fp32: Path) -> None:
    for compiled in (onnx_int8, onnx_fp32):
        content = compiled.read_bytes()
        assert str(Path(torch.__file__).parent).encode() not in content
        assert b"stack_trace" not in content


def test_openvino_keeps_its_quantizers(openvino_int8: Path, openvino_fp32: Path) -> None:
    def quantizers(path: Path) -> int:
        return sum(op.get_type_name() == "FakeQuantize" for op in openvino.Core().read_model(path).get_ops())

    assert quantizers(openvino_int8) >= V3_SMALL["activations"]
    assert quantizers(openvino_fp32) == 0
    assert sorted(p.suffix for p in openvino_int8.parent.glob("openvino-int8*")) == [".bin", ".xml"]


# Networks that cannot be compiled


def test_openvino_refuses_a_network_of_the_other_precision(
    deploy: DeployModel, quantized: nn.Module, tmp_path: Path
) -> None:
    with pytest.raises(CompileError, match="0 quantizers in an int8 model"):
        compile_openvino(deploy, tmp_path / "a.xml", input_size=SIZE, precision="int8")
    assert not list(tmp_path.iterdir())


class DataDependent(nn.Module):
    """Branches on pixel values, which no export can follow."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(dim=(2, 3)) if float(x.mean()) > 10 else x.amax(dim=(2, 3))


def test_networks_that_cannot_be_exported(tmp_path: Path) -> None:
    with pytest.raises(CompileError, match=r"a\.onnx: torch cannot export"):
        compile_onnx(DataDependent(), tmp_path / "a.onnx", input_size=SIZE, precision="fp32")
    with pytest.raises(CompileError, match="LiteRT cannot convert"):
        compile_litert_fp32(DataDependent(), tmp_path / "a.tflite", input_size=SIZE)
    assert not list(tmp_path.iterdir())
