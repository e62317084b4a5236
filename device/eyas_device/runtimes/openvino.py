"""OpenVINO on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import openvino

from eyas_device.preprocess import Pixels
from eyas_device.runtimes import ImageRuntime, Logits, load_error, model_mismatch


class OpenVINO(ImageRuntime):
    """OpenVINO IR models (`.xml` beside its `.bin`) on the CPU: input uint8 NHWC, output float32 logits.

    The precision hint is f32: by default the CPU plugin computes in bf16 where it can, and predictions then differ
    from those that were measured on the host.
    """

    name = "openvino"
    version: str = openvino.__version__
    precision_hint = "f32"

    def __init__(self, path: Path, *, size: int, classes: int, threads: int) -> None:
        options = {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": self.precision_hint,
            "INFERENCE_NUM_THREADS": threads,
        }
        core = openvino.Core()
        try:
            model = core.read_model(path)
            _check(path, model, size, classes)
            request = core.compile_model(model, "CPU", options).create_infer_request()
        except RuntimeError as error:
            raise load_error(path, error) from None
        self._shape = (size, size, 3)
        self._image = np.zeros((1, *self._shape), dtype=np.uint8)
        request.set_input_tensor(openvino.Tensor(self._image, shared_memory=True))
        self._logits = np.zeros(classes, dtype=np.float32)
        self._request: Any = request

    def infer_in_place(self, write: Callable[[Pixels], object]) -> Logits:
        write(self._image[0])
        self._request.infer()
        np.copyto(self._logits, self._request.get_output_tensor(0).data[0])
        return self._logits

    def close(self) -> None:
        self._request = None


def _check(path: Path, model: Any, size: int, classes: int) -> None:
    """Raise `BundleError` unless inputs and outputs match the manifest."""
    needed = f"input u8 [1,{size},{size},3] and output f32 [1,{classes}]"
    ports = [f"{p.get_element_type().get_type_name()} {p.get_partial_shape()}" for p in (*model.inputs, *model.outputs)]
    if ports != [f"u8 [1,{size},{size},3]", f"f32 [1,{classes}]"]:
        raise model_mismatch(path, f"inputs and outputs {', '.join(ports)}", needed)
