"""Shapes for ONNX Runtime's fast kernels, and hard-swish as a product: the values of before, operator by operator."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from eyas_host.export.onnx_integers import use_integers
from eyas_host.export.onnx_layout import original_weights
from eyas_host.support.errors import CompileError

_CHANNELS = 24


def _model(
    rng: np.random.Generator, *, mean: float, scale: float, zero: int, size: tuple[int, int] = (12, 16), stride: int = 2
) -> Any:
    """Bytes -> pixels minus mean -> stem -> hard-swish -> depthwise -> gate -> pointwise, with int8 activations."""
    constants: dict[str, Any] = {
        "mean": np.full((1, 3, 1, 1), mean, np.float32),
        "s0": np.float32(1),
        "z0": np.int8(0),
        "s1": np.float32(scale),
        "z1": np.int8(zero),
        "s2": np.float32(scale * 0.7123),
        "z2": np.int8(-110),
        "s3": np.float32(0.05),
        "z3": np.int8(-5),
        "s4": np.float32(1 / 255),
        "z4": np.int8(-128),
    }
    nodes = [
        helper.make_node("Cast", ["pixels"], ["float"], to=TensorProto.FLOAT),
        helper.make_node("Transpose", ["float"], ["nchw"], perm=[0, 3, 1, 2]),
        helper.make_node("Sub", ["nchw", "mean"], ["centred"]),
    ]

    def quantize(source: str, name: str, grid: int) -> None:
        nodes.append(
            helper.make_node("QuantizeLinear", [source, f"s{grid}", f"z{grid}"], [f"{name}_q"], name=f"{name}_q")
        )
        nodes.append(helper.make_node("DequantizeLinear", [f"{name}_q", f"s{grid}", f"z{grid}"], [name], name=name))

    def convolve(source: str, name: str, shape: tuple[int, ...], gain: float, **attributes: Any) -> None:
        constants[f"{name}_w"] = rng.integers(-127, 128, shape).astype(np.int8)
        fan = float(np.prod(shape[1:])) ** 0.5
        constants[f"{name}_s"] = (gain / 74 / fan * rng.uniform(0.8, 1.2, shape[0])).astype(np.float32)
        constants[f"{name}_z"] = np.zeros(shape[0], np.int8)
        constants[f"{name}_b"] = rng.normal(0, 1, shape[0]).astype(np.float32)
        weight = helper.make_node(
            "DequantizeLinear", [f"{name}_{part}" for part in "wsz"], [f"{name}_f"], axis=0, name=f"{name}_f"
        )
        nodes.extend(
            [weight, helper.make_node("Conv", [source, f"{name}_f", f"{name}_b"], [name], name=name, **attributes)]
        )

    quantize("centred", "bytes", 0)
    convolve("bytes", "stem", (_CHANNELS, 3, 3, 3), 0.03, pads=[1, 1, 1, 1], strides=[stride, stride])
    quantize("stem", "swish_in", 1)
    nodes.append(helper.make_node("HardSwish", ["swish_in"], ["swish"]))
    quantize("swish", "swish_out", 2)
    convolve("swish_out", "first", (40, _CHANNELS, 1, 1), 2, kernel_shape=[1, 1])
    nodes.append(helper.make_node("Relu", ["first"], ["relu"]))
    quantize("relu", "first_out", 3)
    convolve("first_out", "depth", (40, 1, 3, 3), 1, group=40, pads=[1, 1, 1, 1])
    quantize("depth", "depth_out", 3)
    nodes.append(helper.make_node("GlobalAveragePool", ["depth_out"], ["pool"]))
    quantize("pool", "pooled", 3)
    convolve("pooled", "gate", (40, 40, 1, 1), 1, kernel_shape=[1, 1])
    nodes.append(helper.make_node("HardSigmoid", ["gate"], ["sigmoid"], alpha=1 / 6))
    quantize("sigmoid", "gate_out", 4)
    nodes.append(helper.make_node("Mul", ["depth_out", "gate_out"], ["gated"]))
    quantize("gated", "gated_out", 3)
    convolve("gated_out", "last", (8, 40, 1, 1), 2, kernel_shape=[1, 1])
    graph = helper.make_graph(
        nodes,
        "layout",
        [helper.make_tensor_value_info("pixels", TensorProto.UINT8, (1, *size, 3))],
        [helper.make_tensor_value_info("last", TensorProto.FLOAT, (1, 8, size[0] // stride, size[1] // stride))],
        [numpy_helper.from_array(np.asarray(values), name) for name, values in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)


def _run(model: Any, pixels: np.ndarray) -> np.ndarray:
    """The output of a model whose operators are executed one by one, as they stand."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    found: np.ndarray = session.run(None, {"pixels": pixels})[0]
    return found


def _rewritten(model: Any) -> Any:
    after = onnx.ModelProto.FromString(model.SerializeToString())
    use_integers(after)
    onnx.checker.check_model(after, full_check=True)
    return after


def _operators(model: Any) -> list[str]:
    return [node.op_type for node in model.graph.node]


def _shapes(model: Any) -> dict[str, list[int]]:
    constants = {tensor.name: list(tensor.dims) for tensor in model.graph.initializer}
    sources = {node.output[0]: node.input[0] for node in model.graph.node if node.op_type == "DequantizeLinear"}
    return {node.name: constants[sources[node.input[1]]] for node in model.graph.node if node.op_type == "Conv"}


@settings(max_examples=12, deadline=None)
@given(
    seed=st.integers(0, 999),
    steps=st.integers(30, 140),
    above=st.integers(0, 110),
    mean=st.sampled_from([128.0, 128.01, 127.9, 120.3]),
    rows=st.sampled_from([8, 12]),
    columns=st.sampled_from([8, 12, 14, 20]),
)
def test_the_rewritten_graph_gives_the_same_values(
    seed: int, steps: int, above: int, mean: float, rows: int, columns: int
) -> None:
    """Zero points on both sides of what the gate needs, sides that blocks of four fill or not, bytes kept or not."""
    rng = np.random.default_rng(seed)
    model = _model(rng, mean=mean, scale=3 / steps, zero=min(steps + above, 255) - 128, size=(rows, columns))
    pixels = rng.integers(0, 256, (1, rows, columns, 3), dtype=np.uint8)
    after = _rewritten(model)
    expected, found = _run(model, pixels), _run(after, pixels)
    assert found.shape == expected.shape
    # a sum in another order falls to the other side of a rounding limit once in a while: one step of one of 40 channels
    assert np.mean(np.abs(found - expected) > 1e-3 * np.abs(expected).max()) < 0.03
    assert np.abs(found - expected).max() < 0.05 * np.abs(expected).max()
    assert "HardSwish" not in _operators(after)
    assert ("Sub" in _operators(after)) == (mean == 120.3)
    shapes = _shapes(after)
    assert shapes["stem"] == ([2 * _CHANNELS, 12, 3, 2] if columns % 4 == 0 else [_CHANNELS, 3, 3, 3])
    assert shapes["depth"] == [48, 1, 3, 3] and shapes["first"][0] == 48
    assert shapes["gate"] == [48, 48, 1, 1] and shapes["last"] == [8, 48, 1, 1]


@pytest.mark.parametrize(
    ("scale", "zero"),
    [
        (3 / 60, -128 + 59),  # the grid ends above -3
        (3 / 60.4, -128 + 80),  # 3 lies between two integers
    ],
)
def test_a_hard_swish_whose_product_would_differ_stays(scale: float, zero: int) -> None:
    after = _rewritten(_model(np.random.default_rng(0), mean=128, scale=scale, zero=zero))
    assert "HardSwish" in _operators(after)


def test_a_stem_with_other_steps_stays() -> None:
    after = _rewritten(_model(np.random.default_rng(0), mean=128, scale=0.05, zero=0, stride=1))
    assert _shapes(after)["stem"] == [_CHANNELS, 3, 3, 3]


def test_stored_weights_are_read_back_in_their_own_shape() -> None:
    before = _model(np.random.default_rng(0), mean=128, scale=0.05, zero=0)
    expected = {t.name: numpy_helper.to_array(t) for t in before.graph.initializer if t.name.endswith("_w")}
    after = _rewritten(before)
    moved = [tensor for tensor in after.graph.initializer if tensor.data_type == TensorProto.INT8 and tensor.doc_string]
    assert len(moved) == 5
    for tensor in moved:
        own = tensor.name.removesuffix("_wide").removesuffix("_filled")
        np.testing.assert_array_equal(original_weights(tensor), expected[own])
        changed = numpy_helper.to_array(tensor).copy()
        changed[-1, -1, -1, -1] += 1
        other = numpy_helper.from_array(changed, tensor.name)
        other.doc_string = tensor.doc_string
        with pytest.raises(CompileError, match="not only moved and filled up"):
            original_weights(other)
