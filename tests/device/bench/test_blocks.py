"""Where the time goes inside of a model: it is cut at its blocks, and prefixes compute what the whole does."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from eyas_device.bench.blocks import block_times
from eyas_device.bench.onnx_graph import Node, OnnxGraph, Ports, read_nodes
from eyas_device.bench.result import BenchError
from eyas_device.bench.tflite_cut import MAX_BLOCKS, Graph
from eyas_device.bundle import Bundle
from eyas_device.runtimes import choose
from tests.device.bench.test_bench import spoil
from tests.support import tiny

Shape = tuple[int, ...]


def write_residual(path: Path, *, blocks: int = 2) -> bytes:
    """A float `.tflite`: a mean, a strided convolution, residual blocks that widen and narrow, and a linear head.

    Returns the head's weights.
    """
    import flatbuffers
    from ai_edge_litert import schema_py_generated as schema

    rng = np.random.default_rng(0)
    buffers, operators = [schema.BufferT()], []
    tensors: list[Any] = []
    codes: dict[str, int] = {}
    size, classes = tiny.SPEC.size, tiny.CLASSES

    def tensor(shape: Shape, data: npt.NDArray[Any] | None = None) -> int:
        made = schema.TensorT()
        made.name, made.shape, made.type = f"t{len(tensors)}", list(shape), schema.TensorType.FLOAT32
        if data is not None:
            made.type = schema.TensorType.INT32 if data.dtype == np.int32 else schema.TensorType.FLOAT32
            buffer = schema.BufferT()
            buffer.data = np.frombuffer(data.tobytes(), dtype=np.uint8)
            buffers.append(buffer)
            made.buffer = len(buffers) - 1
        tensors.append(made)
        return len(tensors) - 1

    def weights(*shape: int) -> int:
        return tensor(shape, (0.1 * rng.standard_normal(shape)).astype(np.float32))

    def operator(kind: str, inputs: list[int], shape: Shape, options: object) -> int:
        output = tensor(shape)
        made = schema.OperatorT()
        made.opcodeIndex = codes.setdefault(kind, len(codes))
        made.inputs, made.outputs, made.builtinOptions = inputs, [output], options
        made.builtinOptionsType = getattr(schema.BuiltinOptions, type(options).__name__.removesuffix("T"))
        operators.append(made)
        return output

    def convolution(source: int, channels: int, into: int, *, side: int, stride: int = 1) -> int:
        options = schema.Conv2DOptionsT()
        options.strideW = options.strideH = stride
        kernel = 3 if stride > 1 else 1
        inputs = [source, weights(into, kernel, kernel, channels), weights(into)]
        return operator("CONV_2D", inputs, (1, side // stride, side // stride, into), options)

    image = tensor((1, size, size, 3))
    mean = tensor((1, 1, 1, 3), np.full((1, 1, 1, 3), 0.5, dtype=np.float32))
    centred = operator("SUB", [image, mean], (1, size, size, 3), schema.SubOptionsT())
    flow, side = convolution(centred, 3, 16, side=size, stride=2), size // 2
    for _ in range(blocks):
        wide = convolution(flow, 16, 32, side=side)
        flow = operator("ADD", [flow, convolution(wide, 32, 16, side=side)], (1, side, side, 16), schema.AddOptionsT())
    pooled = operator("MEAN", [flow, tensor((2,), np.array([1, 2], dtype=np.int32))], (1, 16), schema.ReducerOptionsT())
    dense, head = schema.FullyConnectedOptionsT(), weights(classes, 16)
    logits = operator("FULLY_CONNECTED", [pooled, head, weights(classes)], (1, classes), dense)
    model, graph = schema.ModelT(), schema.SubGraphT()
    graph.tensors, graph.inputs, graph.outputs, graph.operators = tensors, [image], [logits], operators
    model.version, model.subgraphs, model.buffers, model.operatorCodes = 3, [graph], buffers, []
    for kind in codes:
        code = schema.OperatorCodeT()
        code.builtinCode = code.deprecatedBuiltinCode = getattr(schema.BuiltinOperator, kind)
        code.version = 1
        model.operatorCodes.append(code)
    builder = flatbuffers.Builder(1 << 16)
    builder.Finish(model.Pack(builder), b"TFL3")
    path.write_bytes(bytes(builder.Output()))
    return bytes(buffers[tensors[head].buffer].data)


def test_a_model_is_cut_at_its_blocks(tmp_path: Path) -> None:
    path = tmp_path / "residual.tflite"
    write_residual(path)
    graph = Graph(path)
    assert [block.operators for block in graph.blocks] == [
        ("SUB", "CONV_2D"),
        ("CONV_2D", "CONV_2D", "ADD"),
        ("CONV_2D", "CONV_2D", "ADD"),
        ("MEAN", "FULLY_CONNECTED"),
    ]
    assert [block.outputs for block in graph.blocks] == [(1, 8, 8, 16), (1, 8, 8, 16), (1, 8, 8, 16), (1, 3)]
    assert graph.blocks[0].inputs == (1, 16, 16, 3) and graph.blocks[3].inputs == (1, 8, 8, 16)


@pytest.mark.filterwarnings("ignore:Warning. Enabling `experimental_preserve_all_tensors`")
def test_prefixes_compute_what_the_whole_does(tmp_path: Path) -> None:
    from ai_edge_litert.interpreter import Interpreter

    path = tmp_path / "residual.tflite"
    head = write_residual(path)
    graph = Graph(path)
    image = np.random.default_rng(1).random((1, 16, 16, 3)).astype(np.float32)

    def output_of(interpreter: Any, output: int | None = None) -> npt.NDArray[np.float32]:
        interpreter.allocate_tensors()
        interpreter.set_tensor(interpreter.get_input_details()[0]["index"], image)
        interpreter.invoke()
        index = interpreter.get_output_details()[0]["index"] if output is None else output
        return np.asarray(interpreter.get_tensor(index))

    made_of: list[bytes] = []
    for part in graph.blocks:
        whole = Interpreter(model_path=str(path), experimental_preserve_all_tensors=True)
        made = graph.prefix(part)
        prefix = Interpreter(model_content=made)
        prefix.allocate_tensors()
        tensor = prefix.get_output_details()[0]["index"]
        np.testing.assert_allclose(output_of(prefix), output_of(whole, tensor), atol=1e-5)
        made_of.append(made)
    assert head in made_of[-1] and head not in made_of[0]  # what was cut off takes no memory


def test_deep_models_have_a_bounded_number_of_blocks(tmp_path: Path) -> None:
    path = tmp_path / "deep.tflite"
    write_residual(path, blocks=40)
    parts = Graph(path).blocks
    assert 15 <= len(parts) <= MAX_BLOCKS
    assert sum(len(part.operators) for part in parts) == 2 + 3 * 40 + 2


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(position=st.floats(0, 1), junk=st.binary(min_size=1, max_size=8))
def test_what_cannot_be_cut_says_so(tmp_path: Path, position: float, junk: bytes) -> None:
    path = tmp_path / "damaged.tflite"
    write_residual(path, blocks=1)
    data = bytearray(path.read_bytes())
    start = int(position * (len(data) - 1))
    data[start : start + len(junk)] = junk
    path.write_bytes(data)
    with suppress(BenchError):  # weights may be anything
        Graph(path)


def test_block_times_of_litert(bundle_root: Path, edit_manifest: Callable[..., None], tmp_path: Path) -> None:
    write_residual(tmp_path / "residual.tflite")
    spoil(bundle_root, edit_manifest, "litert-fp32.tflite", (tmp_path / "residual.tflite").read_bytes())
    bundle = Bundle.open(bundle_root)
    progress: list[float] = []
    pair = choose(bundle, "litert", "litert-fp32")
    times = block_times(bundle, pair, threads=1, seconds=0.5, progress=progress.append)
    assert [block.name for block in times.blocks] == [f"block-{number:02d}" for number in range(4)]
    assert times.sum_ms == pytest.approx(sum(block.ms for block in times.blocks), abs=1e-3)
    assert 0 < times.sum_ms < 10 * times.whole.p90 + 1 and progress[-1] == 1.0
    assert (times.runtime, times.artefact, times.threads) == ("litert", "litert-fp32", 1)


@pytest.mark.parametrize("runtime", ["openvino", "onnx"])
def test_block_times_by_a_profile(pristine_bundle: Path, runtime: str) -> None:
    bundle = Bundle.open(pristine_bundle)
    times = block_times(bundle, choose(bundle, runtime), threads=1, seconds=0.3, progress=lambda done: None)
    assert times.blocks and all(block.ms >= 0 and block.operators[0] for block in times.blocks)
    assert any(block.outputs == ((1, tiny.CLASSES),) for block in times.blocks)
    assert "profile" in times.method


CHANNELS = (16, 12, 8, 20)
"""Not all a multiple of 8 (blocked layout of AVX2) or of 16 (AVX-512)."""


def write_convolutions(path: Path) -> list[Node]:
    """An `.onnx` of convolutions with activations and a linear head; returns its operators."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    rng = np.random.default_rng(0)
    constants: list[Any] = []

    def constant(name: str, data: npt.NDArray[Any]) -> str:
        constants.append(numpy_helper.from_array(data, name))
        return name

    nodes = [
        helper.make_node("Cast", ["pixels"], ["floats"], "node_floats", to=TensorProto.FLOAT),
        helper.make_node("Transpose", ["floats"], ["flow"], "node_flow", perm=[0, 3, 1, 2]),
    ]
    source, width = "flow", 3
    for number, channels in enumerate(CHANNELS):
        kernel = constant(f"kernel_{number}", rng.standard_normal((channels, width, 3, 3)).astype(np.float32))
        kind = "HardSigmoid" if number % 2 else "Relu"
        nodes.append(
            helper.make_node("Conv", [source, kernel], [f"conv_{number}"], f"node_conv_{number}", pads=[1, 1, 1, 1])
        )
        nodes.append(helper.make_node(kind, [f"conv_{number}"], [f"active_{number}"], f"node_active_{number}"))
        source, width = f"active_{number}", channels
    nodes += [
        helper.make_node("GlobalAveragePool", [source], ["mean"], "node_mean"),
        helper.make_node("Flatten", ["mean"], ["flat"], "node_flat"),
        helper.make_node(
            "Gemm",
            ["flat", constant("weights", rng.standard_normal((width, tiny.CLASSES)).astype(np.float32))],
            ["logits"],
            "node_logits",
        ),
    ]
    graph = helper.make_graph(
        nodes,
        "convolutions",
        [helper.make_tensor_value_info("pixels", TensorProto.UINT8, [1, tiny.SPEC.size, tiny.SPEC.size, 3])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [1, tiny.CLASSES])],
        constants,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model, full_check=True)
    path.write_bytes(model.SerializeToString())
    return [Node(node.name, node.op_type, tuple(node.input), tuple(node.output)) for node in nodes]


@pytest.mark.parametrize("disabled", [[], ["NchwcTransformer"]], ids=["layout of this processor", "plain layout"])
def test_onnx_shapes_are_those_of_the_file_on_every_processor(
    bundle_root: Path,
    edit_manifest: Callable[..., None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    disabled: list[str],
) -> None:
    import onnxruntime

    session = onnxruntime.InferenceSession

    def limited(*arguments: Any, **options: Any) -> Any:
        return session(*arguments, **options, disabled_optimizers=disabled)

    monkeypatch.setattr(onnxruntime, "InferenceSession", limited)
    write_convolutions(tmp_path / "convolutions.onnx")
    spoil(bundle_root, edit_manifest, "onnx-fp32.onnx", (tmp_path / "convolutions.onnx").read_bytes())
    bundle = Bundle.open(bundle_root)
    times = block_times(bundle, choose(bundle, "onnx"), threads=1, seconds=0.3, progress=lambda done: None)
    convolutions = [block for block in times.blocks if "Conv" in block.operators[0]]
    side = tiny.SPEC.size
    assert [block.outputs for block in convolutions] == [((1, channels, side, side),) for channels in CHANNELS]
    widths = (3, *CHANNELS)
    assert [block.inputs[:2] for block in convolutions] == [
        ((1, before, side, side), (channels, before, 3, 3)) for before, channels in zip(widths, CHANNELS, strict=False)
    ]


@pytest.mark.parametrize("block", [8, 16])
def test_recorded_profiles_of_both_blocked_layouts(tmp_path: Path, block: int) -> None:
    nodes = write_convolutions(tmp_path / "convolutions.onnx")
    shape = (1, 12, 16, 16)
    ports = {f"node_{name}_1": Ports((shape,), (shape,)) for name in ("conv", "active")}
    graph = OnnxGraph(nodes, ports)
    padded = (1, -(-12 // block) * block, 16, 16)
    profiled = Ports((padded,), (padded,))
    for name, kind in (("active_1_nchwc", "Conv"), ("conv_1_nchwc_token_7", "Conv"), ("node_active_1", "HardSigmoid")):
        assert graph.ports(name, kind, profiled) == Ports((shape,), (shape,))
    assert graph.ports("ReorderOutput_token_183", "ReorderOutput", profiled) == profiled


def test_operators_are_read_as_the_onnx_package_reads_them(tmp_path: Path) -> None:
    path = tmp_path / "convolutions.onnx"
    nodes = write_convolutions(path)
    assert read_nodes(path) == nodes
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(BenchError, match="truncated"):
        read_nodes(path)
