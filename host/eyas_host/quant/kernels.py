"""Load NNCF's compiled fake-quantization kernels, safely against killed processes and missing compilers.

The first use compiles them (a minute or more, once). torch guards that with a lock file that is removed only at the
end: a process killed during compilation leaves it behind, and every later one would wait for it forever. An flock,
which the operating system releases with its process, distinguishes a stale lock file from one in use.

Without a compiler, NNCF replaces its CPU kernels by reference quantizers made of torch operations, but refuses to
train on a GPU without nvcc, which torch's wheels do not bring. Here both fall back.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from nncf.torch.quantization.extensions import (
    CUDA_EXT_SRC_LIST,
    EXT_INCLUDE_DIRS,
    QuantizedFunctionsCPU,
    QuantizedFunctionsCPULoader,
    QuantizedFunctionsCUDALoader,
)
from nncf.torch.quantization.reference import torch_executor
from torch import Tensor
from torch.utils import cpp_extension

from eyas_host.support.errors import CompressError
from eyas_host.support.files import cache_folder, try_flock
from eyas_host.support.machine import cuda_compiler
from eyas_host.support.progress import warn

_BATON = "lock"
"""Lock file of torch.utils.cpp_extension."""
_ANY_FUNCTION = "Quantize_forward"
"""Requesting any function loads the kernels."""
_TIMEOUT_S = "1200"
"""NNCF's default is a minute, which two busy cores exceed."""
_FOLDER = "TORCH_EXTENSIONS_DIR"


class ReferenceKernels:
    """NNCF's reference quantizers: the arithmetic of the kernels as torch operations, on any device.

    They are called directly: NNCF's `ReferenceQuantizedFunctions` puts `torch.compile` around them, which compiles them
    again for the shapes of each layer and fails without a C compiler. The number of levels is a tensor, because torch
    divides a Python number by a tensor through its reciprocal, which the kernels do not.
    """

    @staticmethod
    def Quantize_forward(x: Tensor, low: Tensor, span: Tensor, levels: int) -> Tensor:  # noqa: N802 - NNCF's name
        """Round `x` to one of `levels` values from `low` to `low + span`; same shape."""
        rounded: Tensor = torch_executor.forward(x, low, span, torch.tensor(float(levels)))
        return rounded

    @staticmethod
    def Quantize_backward(  # noqa: N802 - NNCF's name
        gradient: Tensor, x: Tensor, low: Tensor, span: Tensor, levels: int, *bounds: int
    ) -> list[Tensor]:
        """Gradients of `x`, `low` and `span`; `bounds` are the lowest and the highest level."""
        gradients: list[Tensor] = torch_executor.backward(
            gradient, x, low, span, torch.tensor(float(levels)), *bounds[:2]
        )
        return gradients


@functools.cache
def load_kernels() -> None:
    """Load the CPU kernels, compiled if necessary; those for CUDA are loaded at their first use on a GPU."""
    os.environ.setdefault("NNCF_EXTENSION_LOAD_TIMEOUT", _TIMEOUT_S)
    _use_own_folder()
    QuantizedFunctionsCUDALoader.load = staticmethod(cuda_kernels)
    with _one_process(Path(QuantizedFunctionsCPULoader.get_build_dir())):
        QuantizedFunctionsCPU.get(_ANY_FUNCTION)


def cuda_kernels() -> Any:
    """NNCF's CUDA kernels, or `ReferenceKernels` with one warning where they cannot be compiled."""
    if not cuda_compiler(os.environ, shutil.which):
        reason = "there is no CUDA compiler (nvcc)"
    else:
        folder = QuantizedFunctionsCUDALoader.get_build_dir()
        try:
            with _one_process(Path(folder)):
                return cpp_extension.load(
                    QuantizedFunctionsCUDALoader.name(),
                    CUDA_EXT_SRC_LIST,
                    extra_include_paths=EXT_INCLUDE_DIRS,
                    build_directory=folder,
                )
        except (subprocess.CalledProcessError, OSError, RuntimeError, ImportError) as error:
            reason = f"they cannot be compiled ({(str(error).strip().splitlines() or [type(error).__name__])[0]})"
    warn(f"int8 training runs without NNCF's CUDA kernels, with the same results but slower: {reason}; see eyas doctor")
    return ReferenceKernels


def compiled() -> list[str]:
    """The kernels compiled in this environment: `cpu`, `cuda`."""
    _use_own_folder()
    loaders = {"cpu": QuantizedFunctionsCPULoader, "cuda": QuantizedFunctionsCUDALoader}
    return [kind for kind, loader in loaders.items() if any(Path(loader.get_build_dir()).glob("*.so"))]


def _use_own_folder() -> None:
    """Use a build folder of this environment's own: sharing it would recompile at every switch of environments.

    Raises `CompressError` if the environment variable names a folder that cannot be used.
    """
    own = hashlib.sha256(sys.prefix.encode()).hexdigest()[:8]
    if not os.environ.get(_FOLDER):
        os.environ[_FOLDER] = str(cache_folder("torch_extensions") / f"eyas-{own}")
    folder = Path(os.environ[_FOLDER])
    try:
        folder.mkdir(parents=True, exist_ok=True)
        usable = os.access(folder, os.W_OK | os.X_OK)
    except OSError:
        usable = False
    if not usable:
        raise CompressError(f"{_FOLDER} = {folder}: cannot be written; unset it, or name a writable folder")


@contextmanager
def _one_process(folder: Path) -> Iterator[None]:
    """Hold the lock of a build folder, without a lock file that a killed process left there."""
    with (folder / ".eyas.lock").open("w") as stream:
        try_flock(stream, fcntl.LOCK_EX, wait=True)
        (folder / _BATON).unlink(missing_ok=True)
        yield
