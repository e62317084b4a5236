"""ONNX Runtime on the CPU, and on request with CUDA or TensorRT (Jetson)."""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from eyas_device.bundle import sha256
from eyas_device.preprocess import Pixels
from eyas_device.runtimes import ENGINE_CACHE, ImageRuntime, Logits, load_error, model_mismatch

Provider = str | tuple[str, dict[str, str]]
"""Name of an execution provider, perhaps with options."""
_FATAL_ONLY = 4
_MAX_ENGINES = 4
"""Model files whose engines are kept."""
_CPUINFO = Path("/proc/cpuinfo")
_VNNI = {"avx512_vnni", "avx_vnni"}
"""CPU flags of the instructions that add int8 products in 32 bits."""


class OnnxRuntime(ImageRuntime):
    """`.onnx` models on the CPU: input `pixels`, uint8 NHWC; output float32 logits."""

    name = "onnx"
    version: str = onnxruntime.__version__
    providers: tuple[str, ...] = ("CPUExecutionProvider",)
    """Execution providers in order of preference; operators that one does not support run on the next."""

    @classmethod
    def missing_feature(cls) -> str:
        available = onnxruntime.get_available_providers()
        return "" if cls.providers[0] in available else f"this ONNX Runtime has no {cls.providers[0]}"

    @classmethod
    def configured_providers(cls, path: Path) -> list[Provider]:
        """The providers with their options for the model at `path`."""
        return list(cls.providers)

    def __init__(self, path: Path, *, size: int, classes: int, threads: int) -> None:
        session = open_session(path, self.configured_providers(path), threads=threads)
        _check(path, session, size, classes)
        self._shape = (size, size, 3)
        self._feed = {"pixels": np.zeros((1, *self._shape), dtype=np.uint8)}
        self._session: Any = session

    def infer_in_place(self, write: Callable[[Pixels], object]) -> Logits:
        write(self._feed["pixels"][0])
        logits: Logits = self._session.run(None, self._feed)[0][0]
        return logits

    def close(self) -> None:
        self._session = None


def open_session(
    path: Path, providers: Sequence[Provider], *, threads: int, profile: str = "", optimise: bool = True
) -> Any:
    """An ONNX Runtime session as devices run it; with `profile` it records where its time goes into such files.

    Without `optimise` it executes the operators of the file one by one.

    x86 CPUs without VNNI accumulate int8 products in 16 bits, which saturates, so exact, slower kernels are requested
    there, and only there: ONNX Runtime would take them with VNNI too. These do not accept models whose weights share a
    zero point (packed by 0.1.0 and before): such a model runs with the default kernels, and the golden check decides
    whether its predictions are right here. Raises `BundleError` if the model cannot be loaded.
    """
    try:
        return _session(path, providers, threads, profile, optimise, exact=saturates(platform.machine()))
    except Exception:  # its exceptions have no other base class
        try:
            return _session(path, providers, threads, profile, optimise, exact=False)
        except Exception as error:
            raise load_error(path, error) from None


def saturates(machine: str, cpuinfo: Path = _CPUINFO) -> bool:
    """Whether int8 kernels of this processor may saturate: x86 without VNNI, or with unknown flags.

    Args:
        machine: the architecture as `platform.machine` names it.
        cpuinfo: the file with the flags of the processor.

    """
    if machine.lower() not in ("x86_64", "amd64"):
        return False
    try:
        lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return True
    flags = [set(line.partition(":")[2].split()) for line in lines if line.startswith("flags")]
    return not flags or not all(core & _VNNI for core in flags)


def _session(
    path: Path, providers: Sequence[Provider], threads: int, profile: str, optimise: bool, *, exact: bool
) -> Any:
    options = onnxruntime.SessionOptions()
    if not optimise:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = _FATAL_ONLY  # errors are raised
    # Spinning threads burn a core between frames: heat and battery for a few microseconds.
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
    """ONNX Runtime with TensorRT, on Jetson. Building the engine takes minutes, once for each model file."""

    name = "onnx-tensorrt"
    providers = ("TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider")

    @classmethod
    def configured_providers(cls, path: Path) -> list[Provider]:
        folder = _engine_folder(path)
        if folder is None:
            return list(cls.providers)
        options = {"trt_engine_cache_enable": "1", "trt_engine_cache_path": str(folder)}
        return [(cls.providers[0], options), *cls.providers[1:]]


def _engine_folder(path: Path) -> Path | None:
    """The folder for the engines of one model file, created if it is missing; None without a cache.

    ONNX Runtime names an engine by the structure of the graph, not by its weights: a folder of its own for each content
    keeps it from running an older model's weights. The oldest folders are removed.
    """
    cache = os.environ.get(ENGINE_CACHE)
    if not cache:
        return None
    folder = Path(cache) / sha256(path)[:32]
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        os.utime(folder)
        for old in sorted(Path(cache).iterdir(), key=lambda found: -found.stat().st_mtime)[_MAX_ENGINES:]:
            shutil.rmtree(old, ignore_errors=True)
    except OSError:
        return None  # a disk that takes nothing: the engine is built at each start
    return folder


def _check(path: Path, session: Any, size: int, classes: int) -> None:
    """Raise `BundleError` unless inputs and outputs match the manifest."""
    needed = [f"pixels tensor(uint8) {[1, size, size, 3]}", f"tensor(float) {[1, classes]}"]
    ports = [f"{i.name} {i.type} {i.shape}" for i in session.get_inputs()]
    ports += [f"{o.type} {o.shape}" for o in session.get_outputs()]
    if ports != needed:
        raise model_mismatch(path, f"inputs and outputs {', '.join(ports)}", " and ".join(needed))
