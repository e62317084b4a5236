"""ONNX Runtime: on the CPU, or by name on CUDA and TensorRT (Jetson)."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # read at import: its default build reports its use to its maker

import onnxruntime

from eyas_device.preprocess import Pixels
from eyas_device.runtimes import ImageRuntime, Logits, broken, misfit

_FATAL_ONLY = 4


class OnnxRuntime(ImageRuntime):
    """An `.onnx` with a uint8 NHWC image called `pixels` in and float32 logits out."""

    name = "onnx"
    version: str = onnxruntime.__version__
    providers: tuple[str, ...] = ("CPUExecutionProvider",)
    """Execution providers, the preferred one first; parts of a model that it lacks run on the next."""

    @classmethod
    def lacks(cls) -> str:
        """Which execution provider this build of ONNX Runtime lacks."""
        available = onnxruntime.get_available_providers()
        return "" if cls.providers[0] in available else f"this ONNX Runtime has no {cls.providers[0]}"

    def __init__(self, path: Path, *, size: int, classes: int, threads: int) -> None:
        session = open_session(path, self.providers, threads=threads)
        _check(path, session, size, classes)
        self._shape = (size, size, 3)
        self._feed = {"pixels": np.zeros((1, *self._shape), dtype=np.uint8)}
        self._session: Any = session

    def infer_written(self, write: Callable[[Pixels], object]) -> Logits:
        """Logits, float32 [classes], of what `write` puts into uint8 [size, size, 3] BGR."""
        write(self._feed["pixels"][0])
        logits: Logits = self._session.run(None, self._feed)[0][0]
        return logits

    def close(self) -> None:
        """Free the session."""
        self._session = None


def open_session(
    path: Path, providers: Sequence[str], *, threads: int, profile: str = "", optimise: bool = True
) -> Any:
    """An ONNX Runtime session as devices run it; with `profile` it records where its time goes into such files.

    Without `optimise` it executes the operators of the file one by one.

    x86 CPUs without VNNI add int8 products up in 16 bits and saturate, so exact, slower kernels are asked for. They do
    not take a file in which weights share a zero point, as files packed by 0.1.0 and before: such a one runs as it did,
    and the golden images tell whether it answers rightly here. Raises `BundleError` if the model cannot be loaded.
    """
    try:
        return _session(path, providers, threads, profile, optimise, exact=True)
    except Exception:  # its exceptions have no other base
        try:
            return _session(path, providers, threads, profile, optimise, exact=False)
        except Exception as error:
            raise broken(path, error) from None


def _session(path: Path, providers: Sequence[str], threads: int, profile: str, optimise: bool, *, exact: bool) -> Any:
    options = onnxruntime.SessionOptions()
    if not optimise:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = _FATAL_ONLY  # what matters is raised
    # Spinning threads burn a core between two frames: heat and battery for some microseconds.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.add_session_config_entry("session.inter_op.allow_spinning", "0")
    options.add_session_config_entry("session.x64quantprecision", "1" if exact else "0")
    if profile:
        options.enable_profiling = True
        options.profile_file_prefix = profile
    return onnxruntime.InferenceSession(str(path), options, providers=list(providers))


class OnnxCuda(OnnxRuntime):
    """ONNX Runtime on an NVIDIA GPU."""

    name = "onnx-cuda"
    providers = ("CUDAExecutionProvider", "CPUExecutionProvider")


class OnnxTensorRT(OnnxRuntime):
    """ONNX Runtime with TensorRT, on Jetson; building its engine at the first start takes minutes."""

    name = "onnx-tensorrt"
    providers = ("TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider")


def _check(path: Path, session: Any, size: int, classes: int) -> None:
    """Raise `BundleError` unless the model takes an image and gives logits as the manifest says."""
    needed = [f"pixels tensor(uint8) {[1, size, size, 3]}", f"tensor(float) {[1, classes]}"]
    ports = [f"{i.name} {i.type} {i.shape}" for i in session.get_inputs()]
    ports += [f"{o.type} {o.shape}" for o in session.get_outputs()]
    if ports != needed:
        raise misfit(path, f"inputs and outputs {', '.join(ports)}", " and ".join(needed))
