"""Base class for `.tflite` models: LiteRT, tflite-runtime and TensorFlow have the same interpreter API."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from eyas_device.errors import RuntimeUnavailable
from eyas_device.preprocess import Pixels
from eyas_device.runtimes import ImageRuntime, Logits, load_error, model_mismatch
from eyas_device.support.quiet import quiet_native_code


class TfliteModel(ImageRuntime):
    """`.tflite` models: one NHWC image as input, one row of logits as output.

    The input is int8 (scale 1, zero point -128), uint8 (scale 1, zero point 0) or float32 (0..255): in each case the
    pixel values themselves, written directly into the interpreter's input tensor.
    """

    name: str
    version: str
    interpreter: Callable[..., Any]
    """The interpreter class, called with `model_path` and `num_threads`."""

    def __init__(self, path: Path, *, size: int, classes: int, threads: int) -> None:
        try:
            with quiet_native_code():
                interpreter = self.interpreter(model_path=str(path), num_threads=threads)
                interpreter.allocate_tensors()
        except (ValueError, RuntimeError) as error:
            raise load_error(path, error) from None
        inputs, outputs = interpreter.get_input_details(), interpreter.get_output_details()
        self._kind = _input_kind(path, inputs, size)
        self._scale, self._zero_point = _output_scale(path, outputs, classes)
        self._shape = (size, size, 3)
        self._logits = np.zeros(classes, dtype=np.float32)
        self._image = np.zeros(self._shape if self._kind == np.float32 else 0, dtype=np.uint8)
        self._interpreter: Any = interpreter
        # No view of a tensor may exist during invoke(): these functions create one per call.
        self._input = interpreter.tensor(inputs[0]["index"])
        self._output = interpreter.tensor(outputs[0]["index"])
        self._verify_input(inputs[0]["index"])

    def infer_in_place(self, write: Callable[[Pixels], object]) -> Logits:
        self._fill(write)
        self._interpreter.invoke()
        np.subtract(self._output()[0], self._zero_point, out=self._logits)
        self._logits *= self._scale
        return self._logits

    def close(self) -> None:
        self._input = self._output = self._interpreter = None

    def _fill(self, write: Callable[[Pixels], object]) -> None:
        if self._kind == np.float32:
            write(self._image)
            np.copyto(self._input()[0], self._image)
            return
        tensor = self._input()[0].view(np.uint8)
        write(tensor)
        if self._kind == np.int8:  # pixel - 128, without leaving 8 bits
            np.bitwise_xor(tensor, 128, out=tensor)

    def _verify_input(self, index: int) -> None:
        """Raise `RuntimeUnavailable` unless the interpreter reads the pixels that are written in place."""
        probe = (np.arange(np.prod(self._shape)) % 251).astype(np.uint8).reshape(self._shape)
        self._fill(lambda out: np.copyto(out, probe))
        actual = self._interpreter.get_tensor(index)[0].astype(np.int16)
        if not np.array_equal(actual + (128 if self._kind == np.int8 else 0), probe):
            raise RuntimeUnavailable(
                f"runtime {self.name} {self.version}: pixels written in place are not read; another version is needed"
            )


def _input_kind(path: Path, inputs: list[dict[str, Any]], size: int) -> np.dtype[Any]:
    needed = f"one input [1, {size}, {size}, 3] of int8 (scale 1, zero point -128), uint8 (scale 1) or float32"
    if len(inputs) != 1 or tuple(inputs[0]["shape"]) != (1, size, size, 3):
        raise model_mismatch(path, "inputs " + ", ".join(str(list(map(int, i["shape"]))) for i in inputs), needed)
    kind: np.dtype[Any] = np.dtype(inputs[0]["dtype"])
    scale, zero_point = inputs[0]["quantization"]
    zero_points = {np.dtype(np.int8): -128, np.dtype(np.uint8): 0}
    raw_pixels = kind in zero_points and abs(scale - 1.0) < 1e-4 and zero_point == zero_points[kind]
    if not raw_pixels and kind != np.float32:
        raise model_mismatch(path, f"an input of {kind}, scale {scale:g}, zero point {zero_point}", needed)
    return kind


def _output_scale(path: Path, outputs: list[dict[str, Any]], classes: int) -> tuple[np.float32, np.float32]:
    needed = f"one output [1, {classes}] of float32, int8 or uint8"
    if len(outputs) != 1 or tuple(outputs[0]["shape"]) != (1, classes):
        raise model_mismatch(path, "outputs " + ", ".join(str(list(map(int, o["shape"]))) for o in outputs), needed)
    kind = np.dtype(outputs[0]["dtype"])
    scale, zero_point = outputs[0]["quantization"]
    if kind == np.float32:
        return np.float32(1.0), np.float32(0.0)
    if kind not in (np.int8, np.uint8) or not scale > 0:
        raise model_mismatch(path, f"an output of {kind}, scale {scale:g}", needed)
    return np.float32(scale), np.float32(zero_point)
