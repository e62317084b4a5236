"""What every reader of `.tflite` files shares: LiteRT, tflite-runtime and TensorFlow have the same interpreter."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from eyas_device.errors import RuntimeUnavailable
from eyas_device.preprocess import Pixels
from eyas_device.runtimes import ImageRuntime, Logits, broken, misfit


class TfliteModel(ImageRuntime):
    """A `.tflite` with one NHWC image in and one row of logits out.

    The input is int8 (scale 1, zero point -128), uint8 (scale 1, zero point 0) or float32 (0..255): the pixels
    themselves in each case, written straight into the interpreter's own memory.
    """

    name: str
    version: str
    interpreter: Callable[..., Any]
    """The library's class; called with `model_path` and `num_threads`."""

    def __init__(self, path: Path, *, size: int, classes: int, threads: int) -> None:
        try:
            interpreter = self.interpreter(model_path=str(path), num_threads=threads)
            interpreter.allocate_tensors()
        except (ValueError, RuntimeError) as error:
            raise broken(path, error) from None
        inputs, outputs = interpreter.get_input_details(), interpreter.get_output_details()
        self._kind = _input_kind(path, inputs, size)
        self._scale, self._zero_point = _output_scale(path, outputs, classes)
        self._shape = (size, size, 3)
        self._logits = np.zeros(classes, dtype=np.float32)
        self._image = np.zeros(self._shape if self._kind == np.float32 else 0, dtype=np.uint8)
        self._interpreter: Any = interpreter
        # Views of the tensors must not be alive during invoke(): these functions make one on each call.
        self._input = interpreter.tensor(inputs[0]["index"])
        self._output = interpreter.tensor(outputs[0]["index"])
        self._prove_input(inputs[0]["index"])

    def infer_written(self, write: Callable[[Pixels], object]) -> Logits:
        """Logits, float32 [classes], valid until the next call, of what `write` puts into uint8 [size, size, 3] BGR."""
        self._fill(write)
        self._interpreter.invoke()
        np.subtract(self._output()[0], self._zero_point, out=self._logits)
        self._logits *= self._scale
        return self._logits

    def close(self) -> None:
        """Free the interpreter and its memory."""
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

    def _prove_input(self, index: int) -> None:
        """Raise `RuntimeUnavailable` unless pixels written in place are what the interpreter reads."""
        probe = (np.arange(np.prod(self._shape)) % 251).astype(np.uint8).reshape(self._shape)
        self._fill(lambda out: np.copyto(out, probe))
        seen = self._interpreter.get_tensor(index)[0].astype(np.int16)
        if not np.array_equal(seen + (128 if self._kind == np.int8 else 0), probe):
            raise RuntimeUnavailable(
                f"runtime {self.name} {self.version}: pixels written in place do not arrive; another version is needed"
            )


def _input_kind(path: Path, inputs: list[dict[str, Any]], size: int) -> np.dtype[Any]:
    needed = f"one input [1, {size}, {size}, 3] of int8 (scale 1, zero point -128), uint8 (scale 1) or float32"
    if len(inputs) != 1 or tuple(inputs[0]["shape"]) != (1, size, size, 3):
        raise misfit(path, "inputs " + ", ".join(str(list(map(int, i["shape"]))) for i in inputs), needed)
    kind: np.dtype[Any] = np.dtype(inputs[0]["dtype"])
    scale, zero_point = inputs[0]["quantization"]
    zero_points = {np.dtype(np.int8): -128, np.dtype(np.uint8): 0}
    whole = kind in zero_points and abs(scale - 1.0) < 1e-4 and zero_point == zero_points[kind]
    if not whole and kind != np.float32:
        raise misfit(path, f"an input of {kind}, scale {scale:g}, zero point {zero_point}", needed)
    return kind


def _output_scale(path: Path, outputs: list[dict[str, Any]], classes: int) -> tuple[np.float32, np.float32]:
    needed = f"one output [1, {classes}] of float32, int8 or uint8"
    if len(outputs) != 1 or tuple(outputs[0]["shape"]) != (1, classes):
        raise misfit(path, "outputs " + ", ".join(str(list(map(int, o["shape"]))) for o in outputs), needed)
    kind = np.dtype(outputs[0]["dtype"])
    scale, zero_point = outputs[0]["quantization"]
    if kind == np.float32:
        return np.float32(1.0), np.float32(0.0)
    if kind not in (np.int8, np.uint8) or not scale > 0:
        raise misfit(path, f"an output of {kind}, scale {scale:g}", needed)
    return np.float32(scale), np.float32(zero_point)
