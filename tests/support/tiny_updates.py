"""Tiny real models that differ: what an update may bring besides a model that is as good as the one before."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np

from eyas_device.bundle import Bundle
from eyas_device.camera.fake import draw
from eyas_device.preprocess import Pixels
from eyas_device.updates.release import Bounds, Release
from tests.support import tiny
from tests.support.tiny_bundle import write_one_model

_SLOW_SIZE = 512
_NAN_ABOVE = 62.0
"""Brightness of the pixel `_BACKGROUND`: about 40 in the golden images, about 60 in the fake camera's."""
_BACKGROUND = (2 * tiny.SPEC.size) * 3
"""Input of a pixel that no drawn shape covers: the first of the third row."""


def write_update(root: Path, version: str, kind: str = "right") -> Path:
    """Write a bundle that passes its golden check, whatever it does on the fake camera's frames.

    `right`: as the model before. `wrong`: other labels. `slow`: many times the work for the same answers. `nan`: no
    finite answer on some frames. `known`: as `right`, with an OOD reference of the fake camera's frames.
    """
    weights, bias = tiny.fit()
    if kind == "slow":
        times = _SLOW_SIZE // tiny.SPEC.size
        image = weights.reshape(tiny.CLASSES, tiny.SPEC.size, tiny.SPEC.size, 3) / times**2
        large = image.repeat(times, axis=1).repeat(times, axis=2).reshape(tiny.CLASSES, -1)
        spec = msgspec.structs.replace(tiny.SPEC, size=_SLOW_SIZE)
        return write_one_model(
            root,
            lambda path: tiny.write_tflite(path, large, bias, size=_SLOW_SIZE),
            (large, bias),
            name="litert-fp32",
            version=version,
            spec=spec,
        )
    if kind == "nan":
        return write_one_model(
            root,
            lambda path: write_fragile_onnx(path, weights, bias),
            (weights, bias),
            name="onnx-fp32",
            version=version,
        )
    if kind == "wrong":
        weights, bias = np.roll(weights, 1, axis=0), np.roll(bias, 1)
    return write_one_model(
        root,
        lambda path: tiny.write_tflite(path, weights, bias),
        (weights, bias),
        name="litert-fp32",
        version=version,
        seen=_fake_frame if kind == "known" else None,
    )


def _fake_frame(number: int) -> Pixels:
    return draw(64, 48, np.random.default_rng((1, number)))


def write_fragile_onnx(path: Path, weights: tiny.Floats, bias: tiny.Floats) -> None:
    """An `.onnx` whose logits are NaN for images with a bright background: 0 * sqrt(limit - pixel) is added."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    constants = {
        "shape": np.array([1, tiny.INPUTS], np.int64),
        "weights": weights,
        "bias": bias,
        "place": np.array([_BACKGROUND], np.int64),
        "limit": np.array([[_NAN_ABOVE]], np.float32),
        "nothing": np.array([[0.0]], np.float32),
    }
    graph = helper.make_graph(
        [
            helper.make_node("Cast", ["pixels"], ["floats"], to=TensorProto.FLOAT),
            helper.make_node("Reshape", ["floats", "shape"], ["flat"]),
            helper.make_node("Gemm", ["flat", "weights", "bias"], ["scores"], transB=1),
            helper.make_node("Gather", ["flat", "place"], ["pixel"], axis=1),
            helper.make_node("Sub", ["limit", "pixel"], ["left"]),
            helper.make_node("Sqrt", ["left"], ["root"]),
            helper.make_node("Mul", ["root", "nothing"], ["poison"]),
            helper.make_node("Add", ["scores", "poison"], ["logits"]),
        ],
        "fragile",
        [helper.make_tensor_value_info("pixels", TensorProto.UINT8, [1, tiny.SPEC.size, tiny.SPEC.size, 3])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [1, tiny.CLASSES])],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    path.write_bytes(model.SerializeToString())


def signed(bundle: Path, bounds: Bounds | None = None) -> bytes:
    """What a repository says of a bundle, as JSON."""
    opened = Bundle.open(bundle)
    manifest = opened.manifest
    release = Release(
        model=manifest.name, version=manifest.version, identity=opened.identity, probation=bounds or Bounds()
    )
    return msgspec.json.encode(release)
