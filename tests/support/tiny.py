"""Tiny real models for the device's tests: one linear classifier of drawn shapes, written in each runtime's own format.

The formats are written directly, so that these tests need no training framework and nothing to convert.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import cv2
import msgspec
import numpy as np
import numpy.typing as npt

from eyas_device.ood import describe, distance
from eyas_device.preprocess import Pixels, Preprocessing, prepare
from eyas_device.reference import Reference

LABELS = ("cross", "disc", "stripes")
SPEC = Preprocessing(size=16)
CLASSES = len(LABELS)
INPUTS = SPEC.size * SPEC.size * 3

Floats = npt.NDArray[np.float32]


def draw_shape(label: str, seed: int, width: int = 64, height: int = 48) -> Pixels:
    """An image of one of the labels, uint8 [height, width, 3] BGR."""
    rng = np.random.default_rng((LABELS.index(label), seed))
    image = np.full((height, width, 3), 40, dtype=np.uint8)
    x, y = width // 2 + int(rng.integers(-2, 3)), height // 2 + int(rng.integers(-2, 3))
    if label == "cross":
        cv2.line(image, (x - 18, y - 18), (x + 18, y + 18), (40, 40, 220), 5)
        cv2.line(image, (x - 18, y + 18), (x + 18, y - 18), (40, 40, 220), 5)
    elif label == "disc":
        cv2.circle(image, (x, y), 16, (60, 200, 60), -1)
    else:
        for row in range(2, height, 10):
            cv2.line(image, (0, row), (width, row), (220, 150, 60), 4)
    return np.clip(image + rng.normal(0, 5, image.shape), 0, 255).astype(np.uint8)


@cache
def fit() -> tuple[Floats, Floats]:
    """Weights float32 [classes, inputs] and bias [classes] of logits = weights @ pixels + bias, by ridge regression."""
    images, targets = [], []
    for number, label in enumerate(LABELS):
        for seed in range(40):
            images.append(prepare(draw_shape(label, 1000 + seed), SPEC).ravel())
            targets.append(np.where(np.arange(CLASSES) == number, 4.0, -4.0))
    x = np.asarray(images, dtype=np.float64)
    mean = x.mean(axis=0)
    centred = x - mean
    dual = np.linalg.solve(centred @ centred.T + 1e5 * np.eye(len(x)), np.asarray(targets) - np.mean(targets, axis=0))
    weights = (centred.T @ dual).T
    bias = np.mean(targets, axis=0) - weights @ mean
    return weights.astype(np.float32), bias.astype(np.float32)


def reference_logits(pixels: Pixels, weights: Floats, bias: Floats) -> Floats:
    """The logits that every runtime must return, in plain float64."""
    return (weights.astype(np.float64) @ pixels.ravel().astype(np.float64) + bias).astype(np.float32)


def write_tflite(path: Path, weights: Floats, bias: Floats, *, kind: str = "float32", size: int = SPEC.size) -> None:
    """A `.tflite` of RESHAPE and FULLY_CONNECTED; `kind` is the dtype of input and output: float32, int8 or uint8."""
    import flatbuffers
    from ai_edge_litert import schema_py_generated as schema

    types = {"float32": schema.TensorType.FLOAT32, "int8": schema.TensorType.INT8, "uint8": schema.TensorType.UINT8}
    buffers = [schema.BufferT()]
    tensors = []

    def add(name: str, shape: list[int], kind: int, data: npt.NDArray[np.generic] | None, quantum: object) -> int:
        tensor = schema.TensorT()
        tensor.name, tensor.shape, tensor.type, tensor.quantization = name, shape, kind, quantum
        if data is not None:
            buffer = schema.BufferT()
            buffer.data = np.frombuffer(data.tobytes(), dtype=np.uint8)
            buffers.append(buffer)
            tensor.buffer = len(buffers) - 1
        tensors.append(tensor)
        return len(tensors) - 1

    def quantum(scale: float, zero_point: int) -> object:
        quantization = schema.QuantizationParametersT()
        quantization.scale, quantization.zeroPoint = [scale], [zero_point]
        return quantization

    # Pixel p is stored as p - 128 in int8 and as p in uint8; weights are symmetric in int8 and around 128 in uint8.
    pixel = {"float32": None, "int8": quantum(1.0, -128), "uint8": quantum(1.0, 0)}[kind]
    logit = {"float32": None, "int8": quantum(0.25, 0), "uint8": quantum(0.25, 128)}[kind]
    scale = float(np.abs(weights).max() / 127)
    whole = np.round(weights / scale)
    weight_data = {"float32": weights, "int8": whole.astype(np.int8), "uint8": (whole + 128).astype(np.uint8)}[kind]
    weight_quantum = {"float32": None, "int8": quantum(scale, 0), "uint8": quantum(scale, 128)}[kind]
    bias_data = bias if kind == "float32" else np.round(bias / scale).astype(np.int32)
    bias_kind = types["float32"] if kind == "float32" else schema.TensorType.INT32
    bias_quantum = None if kind == "float32" else quantum(scale, 0)

    image = add("pixels", [1, size, size, 3], types[kind], None, pixel)
    shape = add("shape", [2], schema.TensorType.INT32, np.array([1, weights.shape[1]], dtype=np.int32), None)
    flat = add("flat", [1, weights.shape[1]], types[kind], None, pixel)
    weight = add("weights", list(weights.shape), types[kind], weight_data, weight_quantum)
    offset = add("bias", [len(bias)], bias_kind, bias_data, bias_quantum)
    logits = add("logits", [1, len(bias)], types[kind], None, logit)

    codes, operators = [], []
    reshape, dense = schema.BuiltinOperator.RESHAPE, schema.BuiltinOperator.FULLY_CONNECTED
    for code, inputs, outputs in ((reshape, [image, shape], [flat]), (dense, [flat, weight, offset], [logits])):
        entry = schema.OperatorCodeT()
        entry.builtinCode = entry.deprecatedBuiltinCode = code
        entry.version = 4 if code == dense and kind == "int8" else 1
        codes.append(entry)
        operator = schema.OperatorT()
        operator.opcodeIndex, operator.inputs, operator.outputs = len(codes) - 1, inputs, outputs
        if code == dense:
            operator.builtinOptionsType = schema.BuiltinOptions.FullyConnectedOptions
            operator.builtinOptions = schema.FullyConnectedOptionsT()
        operators.append(operator)
    graph = schema.SubGraphT()
    graph.tensors, graph.inputs, graph.outputs, graph.operators = tensors, [image], [logits], operators
    model = schema.ModelT()
    model.version, model.operatorCodes, model.subgraphs, model.buffers = 3, codes, [graph], buffers
    builder = flatbuffers.Builder(1 << 16)
    builder.Finish(model.Pack(builder), b"TFL3")
    path.write_bytes(bytes(builder.Output()))


def write_openvino(path: Path, weights: Floats, bias: Floats) -> None:
    """An IR (`path` and the `.bin` beside it)."""
    import openvino
    from openvino import opset13 as ops

    image = ops.parameter([1, SPEC.size, SPEC.size, 3], np.uint8, name="pixels")
    flat = ops.reshape(ops.convert(image, np.float32), np.array([1, INPUTS]), special_zero=False)
    logits = ops.add(ops.matmul(flat, ops.constant(weights), False, True), ops.constant(bias[np.newaxis]))
    openvino.save_model(openvino.Model([logits], [image], "tiny"), path, compress_to_fp16=False)


def write_onnx(path: Path, weights: Floats, bias: Floats, *, name: str = "pixels") -> None:
    """An `.onnx` of Cast, Reshape and Gemm."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    graph = helper.make_graph(
        [
            helper.make_node("Cast", [name], ["floats"], to=TensorProto.FLOAT),
            helper.make_node("Reshape", ["floats", "shape"], ["flat"]),
            helper.make_node("Gemm", ["flat", "weights", "bias"], ["logits"], transB=1),
        ],
        "tiny",
        [helper.make_tensor_value_info(name, TensorProto.UINT8, [1, SPEC.size, SPEC.size, 3])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [1, CLASSES])],
        [
            numpy_helper.from_array(np.array([1, INPUTS], dtype=np.int64), "shape"),
            numpy_helper.from_array(weights, "weights"),
            numpy_helper.from_array(bias, "bias"),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    path.write_bytes(model.SerializeToString())


def reference_of(train: list[Pixels], validation: list[Pixels]) -> Reference:
    """A reference for tests: the first 8 eigenvectors of the covariance matrix of the training images' descriptors."""
    described = np.stack([describe(image) for image in train]).astype(np.float64)
    scale = described.std(axis=0) + 0.01
    standard = (described - described.mean(axis=0)) / scale
    values, vectors = np.linalg.eigh(standard.T @ standard / len(standard))
    components = vectors[:, ::-1][:, :8].T
    outside = standard - (standard @ components.T) @ components
    reference = Reference(
        mean=described.mean(axis=0).astype(np.float32),
        scale=scale.astype(np.float32),
        components=components.astype(np.float32),
        spread=np.sqrt(values[::-1][:8]).astype(np.float32),
        residual=float(np.square(outside).sum(axis=1).mean()),
        distances=np.zeros(0, np.float32),
    )
    distances = sorted(distance(describe(image), reference) for image in validation)
    return msgspec.structs.replace(reference, distances=np.asarray(distances, dtype=np.float32))
