"""Q/DQ graphs in the form that ONNX Runtime computes with integers: the same values, and no convolution in float32."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from eyas_host.export.onnx import compile_onnx
from eyas_host.export.onnx_integers import use_integers

_PIXELS = (1, 3, 5, 5)


def _model(rng: np.random.Generator, *, scale: float, zero: int, alpha: float, bias: bool) -> Any:
    """Pixels -> Q/DQ -> convolution -> hard-sigmoid -> Q/DQ -> mean, with int8 activations."""
    constants = {
        "in_scale": np.float32(0.05),
        "in_zero": np.int8(-7),
        "weight": rng.integers(-127, 128, (4, 3, 3, 3)).astype(np.int8),
        "weight_scale": rng.uniform(0.005, 0.05, 4).astype(np.float32),
        "weight_zero": np.zeros(4, np.int8),
        "bias": rng.normal(0, 2, 4).astype(np.float32),
        "scale": np.float32(scale),
        "zero": np.int8(zero),
        "axes": np.array([-1, 2]),
    }
    nodes = [
        helper.make_node("QuantizeLinear", ["pixels", "in_scale", "in_zero"], ["q0"]),
        helper.make_node("DequantizeLinear", ["q0", "in_scale", "in_zero"], ["d0"]),
        helper.make_node("DequantizeLinear", ["weight", "weight_scale", "weight_zero"], ["w"], axis=0),
        helper.make_node("Conv", ["d0", "w", *(["bias"] if bias else [])], ["c"], pads=[1, 1, 1, 1]),
        helper.make_node("HardSigmoid", ["c"], ["h"], alpha=alpha),
        helper.make_node("QuantizeLinear", ["h", "scale", "zero"], ["q1"]),
        helper.make_node("DequantizeLinear", ["q1", "scale", "zero"], ["gates"]),
        helper.make_node("ReduceMean", ["gates", "axes"], ["mean"], keepdims=1),
    ]
    graph = helper.make_graph(
        nodes,
        "gates",
        [helper.make_tensor_value_info("pixels", TensorProto.FLOAT, _PIXELS)],
        [
            helper.make_tensor_value_info("gates", TensorProto.FLOAT, (1, 4, 5, 5)),
            helper.make_tensor_value_info("mean", TensorProto.FLOAT, (1, 4, 1, 1)),
        ],
        [numpy_helper.from_array(np.asarray(values), name) for name, values in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)


def _run(model: Any, pixels: np.ndarray) -> list[np.ndarray]:
    """Outputs of a model whose operators are executed one by one, as they stand."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, {"pixels": pixels})


@given(
    seed=st.integers(0, 999),
    scale=st.floats(1 / 400, 1 / 100),  # the quantizer's range ends below, at and above 1
    zero=st.sampled_from([-128, -128, -127, -100, 0, 20]),
    alpha=st.floats(0.05, 0.5),
    bias=st.booleans(),
)
def test_a_hard_sigmoid_in_a_convolution_gives_the_same_integers(
    seed: int, scale: float, zero: int, alpha: float, bias: bool
) -> None:
    rng = np.random.default_rng(seed)
    before = _model(rng, scale=scale, zero=zero, alpha=alpha, bias=bias)
    after = onnx.ModelProto.FromString(before.SerializeToString())
    use_integers(after)
    onnx.checker.check_model(after, full_check=True)
    pixels = rng.normal(0, 3, _PIXELS).astype(np.float32)
    expected, mean = _run(before, pixels)
    gates, pooled = _run(after, pixels)
    steps = np.abs(gates - expected) / np.float32(scale)
    # a sum in another order falls to the other side of a rounding limit once in a while, and never farther
    assert steps.max() < 1.01 and (steps > 0.01).mean() <= 0.02
    np.testing.assert_allclose(pooled, mean, atol=1.01 * scale)
    assert "HardSigmoid" not in {node.op_type for node in after.graph.node}


def test_activations_without_zero_points_stay_int8() -> None:
    """TensorRT takes no others."""
    model = _model(np.random.default_rng(0), scale=1 / 127, zero=0, alpha=0.2, bias=True)
    for tensor in model.graph.initializer:
        if tensor.name == "in_zero":
            tensor.CopyFrom(numpy_helper.from_array(np.array(0, np.int8), "in_zero"))
    use_integers(model)
    types = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    read = {types[node.input[2]] for node in model.graph.node if node.op_type == "QuantizeLinear"}
    assert read == {TensorProto.INT8}
    assert "HardSigmoid" in {node.op_type for node in model.graph.node}


def test_a_hard_sigmoid_that_two_operators_read_stays() -> None:
    model = _model(np.random.default_rng(0), scale=1 / 255, zero=-128, alpha=0.2, bias=True)
    model.graph.node.append(helper.make_node("Identity", ["h"], ["also"]))
    model.graph.output.append(helper.make_tensor_value_info("also", TensorProto.FLOAT, (1, 4, 5, 5)))
    use_integers(model)
    onnx.checker.check_model(model, full_check=True)
    assert "HardSigmoid" in {node.op_type for node in model.graph.node}


@pytest.fixture(scope="module")
def optimised(quantized: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Counter[str]:
    """Operators of a V3-small as ONNX Runtime executes it."""
    folder: Path = tmp_path_factory.mktemp("onnx")
    compile_onnx(quantized, folder / "int8.onnx", input_size=64, precision="int8")
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(folder / "optimised.onnx")
    options.log_severity_level = 4
    onnxruntime.InferenceSession(str(folder / "int8.onnx"), options, providers=["CPUExecutionProvider"])
    return Counter(node.op_type for node in onnx.load(folder / "optimised.onnx").graph.node)


def test_onnx_runtime_computes_all_convolutions_with_integers(optimised: Counter[str]) -> None:
    convolutions = sum(count for name, count in optimised.items() if "Conv" in name)
    assert optimised["QLinearConv"] == convolutions == 53


def test_hard_swishes_are_products_of_integers(optimised: Counter[str]) -> None:
    """All but the last one, behind which only the classifier comes, and those whose range ends above -3."""
    assert optimised["Transpose"] <= 1
    assert optimised["QuantizeLinear"] <= 6 and optimised["DequantizeLinear"] <= 7
    assert optimised["QLinearMul"] >= 9 + 13
    assert not {"Cast", "Sub", "Gather"} & set(optimised)
