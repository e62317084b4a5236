"""ONNX Runtime on the CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from eyas_device.preprocess import Pixels
from eyas_device.runtimes import Logits, PictureIn, broken, misfit

_FATAL_ONLY = 4


class OnnxRuntime(PictureIn):
    """An `.onnx` with a uint8 NHWC picture called `pixels` in and float32 logits out."""

    name = "onnx"
    version: str = onnxruntime.__version__

    def __init__(self, path: Path, *, size: int, classes: int, threads: int) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.log_severity_level = _FATAL_ONLY  # what matters is raised
        # Spinning threads burn a core between two frames: heat and battery for some microseconds.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.add_session_config_entry("session.inter_op.allow_spinning", "0")
        try:
            session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # its exceptions have no other base
            raise broken(path, error) from None
        _check(path, session, size, classes)
        self._shape = (size, size, 3)
        self._session: Any = session

    def infer(self, pixels: Pixels) -> Logits:
        """Logits, float32 [classes], of uint8 [size, size, 3] BGR."""
        self._expect(pixels)
        logits: Logits = self._session.run(None, {"pixels": pixels[np.newaxis]})[0][0]
        return logits

    def close(self) -> None:
        """Free the session."""
        self._session = None


def _check(path: Path, session: Any, size: int, classes: int) -> None:
    """Raise `BundleError` unless the model takes a picture and gives logits as the manifest says."""
    needed = [f"pixels tensor(uint8) {[1, size, size, 3]}", f"tensor(float) {[1, classes]}"]
    ports = [f"{i.name} {i.type} {i.shape}" for i in session.get_inputs()]
    ports += [f"{o.type} {o.shape}" for o in session.get_outputs()]
    if ports != needed:
        raise misfit(path, f"inputs and outputs {', '.join(ports)}", " and ".join(needed))
