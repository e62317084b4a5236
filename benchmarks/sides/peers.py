"""What a user would pick instead: each tool's own post-training quantization of the same float artefact."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import nncf
import numpy as np
import numpy.typing as npt
import openvino as ov
from ai_edge_litert.interpreter import Interpreter
from ai_edge_quantizer import quantizer, recipe
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process

from eyas_device.bundle import RuntimeName
from eyas_device.preprocess import Pixels
from eyas_device.runtimes.onnx import OnnxRuntime
from eyas_device.runtimes.openvino import OpenVINO
from eyas_host.support.quiet import quiet_tools

Batch = npt.NDArray[np.uint8]
Infer = Callable[[Pixels], npt.NDArray[np.float32]]


def ai_edge_ptq(fp32: Path, path: Path, pixels: Batch) -> list[Path]:
    """LiteRT's own quantizer with its own static int8 recipe, calibrated on `pixels` [n, size, size, 3]."""
    builder = quantizer.Quantizer(str(fp32), recipe.static_wi8_ai8())
    with quiet_tools():
        samples = [{"args_0": image[np.newaxis].astype(np.float32)} for image in pixels]
        statistics = builder.calibrate({"serving_default": samples}, num_threads=1)
        path.write_bytes(bytes(builder.quantize(statistics, enable_progress_report=False).quantized_model))
    return [path]


def nncf_ptq(fp32: Path, path: Path, pixels: Batch) -> list[Path]:
    """NNCF's post-training quantization of the OpenVINO IR, with its defaults."""
    with quiet_tools():
        model = ov.Core().read_model(fp32)
        data = nncf.Dataset([image[np.newaxis] for image in pixels])
        ov.save_model(nncf.quantize(model, data, subset_size=len(pixels)), path, compress_to_fp16=False)
    return [path, path.with_suffix(".bin")]


class _Reader(CalibrationDataReader):  # type: ignore[misc]
    def __init__(self, pixels: Batch) -> None:
        self._pixels: Iterator[Pixels] = iter(pixels)

    def get_next(self) -> dict[str, Batch] | None:
        image = next(self._pixels, None)
        return None if image is None else {"pixels": image[np.newaxis]}


def onnxruntime_static(fp32: Path, path: Path, pixels: Batch) -> list[Path]:
    """ONNX Runtime's static quantization after its own pre-processing: Q/DQ, int8, weights per channel."""
    with tempfile.TemporaryDirectory() as folder, quiet_tools():
        ready = Path(folder) / "ready.onnx"
        quant_pre_process(fp32, ready, skip_symbolic_shape=True)
        quantize_static(
            ready,
            path,
            _Reader(pixels),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            activation_type=QuantType.QInt8,
            weight_type=QuantType.QInt8,
        )
    return [path]


def open_litert(path: Path, *, size: int, classes: int) -> Infer:
    """A `.tflite` of any input and output type: pixels uint8 [size, size, 3] -> logits float32 [classes]."""
    interpreter: Any = Interpreter(model_path=str(path), num_threads=1)
    interpreter.allocate_tensors()
    given, made = interpreter.get_input_details()[0], interpreter.get_output_details()[0]
    (scale, zero), (out_scale, out_zero) = given["quantization"], made["quantization"]
    assert tuple(given["shape"]) == (1, size, size, 3) and tuple(made["shape"]) == (1, classes)
    # The 256 possible pixels, once: a user would write the image through the same table.
    table = np.arange(256, dtype=np.float32)
    if given["dtype"] != np.float32:
        table = np.clip(np.rint(table / scale) + zero, -128, 127).astype(given["dtype"])

    def infer(pixels: Pixels) -> npt.NDArray[np.float32]:
        interpreter.set_tensor(given["index"], table[pixels][np.newaxis])
        interpreter.invoke()
        logits: npt.NDArray[np.float32] = interpreter.get_tensor(made["index"])[0]
        return (logits.astype(np.float32) - out_zero) * out_scale if out_scale else logits

    return infer


def open_openvino(path: Path, *, size: int, classes: int) -> Infer:
    """An IR as the device runs it."""
    return OpenVINO(path, size=size, classes=classes, threads=1).infer


def open_onnx(path: Path, *, size: int, classes: int) -> Infer:
    """An ONNX model as the device runs it."""
    return OnnxRuntime(path, size=size, classes=classes, threads=1).infer


PEERS: dict[str, tuple[RuntimeName, Callable[[Path, Path, Batch], list[Path]], str, Callable[..., Infer]]] = {
    "ai-edge-quantizer PTQ": ("litert", ai_edge_ptq, ".tflite", open_litert),
    "NNCF PTQ": ("openvino", nncf_ptq, ".xml", open_openvino),
    "onnxruntime static": ("onnx", onnxruntime_static, ".onnx", open_onnx),
}
"""Name -> the backend, what makes its file from the fp32 artefact, the file's suffix, what opens it."""
