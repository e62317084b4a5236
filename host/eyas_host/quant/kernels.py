"""Load NNCF's compiled fake-quantization kernels, safely against killed processes.

The first use compiles them (a minute or more, once). torch guards that with a lock file that is removed only at the
end: a process killed during compilation leaves it behind, and every later one would wait for it forever. An flock,
which the operating system releases with its process, distinguishes a stale lock file from one in use.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import os
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from nncf.torch.quantization.extensions import (
    QuantizedFunctionsCPU,
    QuantizedFunctionsCPULoader,
    QuantizedFunctionsCUDA,
    QuantizedFunctionsCUDALoader,
)

from eyas_host.support.files import cache_folder

_BATON = "lock"
"""Lock file of torch.utils.cpp_extension."""
_ANY_FUNCTION = "Quantize_forward"
"""Requesting any function loads the kernels."""
_TIMEOUT_S = "1200"
"""NNCF's default is a minute, which two busy cores exceed."""


@functools.cache
def load_kernels() -> None:
    """Load the kernels, compiled if necessary; without a compiler NNCF falls back to torch operations on the CPU."""
    os.environ.setdefault("NNCF_EXTENSION_LOAD_TIMEOUT", _TIMEOUT_S)
    _use_own_folder()
    _load(Path(QuantizedFunctionsCPULoader.get_build_dir()), QuantizedFunctionsCPU.get)
    if torch.cuda.is_available():
        _load(Path(QuantizedFunctionsCUDALoader.get_build_dir()), QuantizedFunctionsCUDA.get)


def compiled() -> list[str]:
    """The kernels compiled in this environment: `cpu`, `cuda`."""
    _use_own_folder()
    loaders = {"cpu": QuantizedFunctionsCPULoader, "cuda": QuantizedFunctionsCUDALoader}
    return [kind for kind, loader in loaders.items() if any(Path(loader.get_build_dir()).glob("*.so"))]


def _use_own_folder() -> None:
    """Use a build folder of this environment's own: sharing it would recompile at every switch of environments."""
    own = hashlib.sha256(sys.prefix.encode()).hexdigest()[:8]
    os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(cache_folder("torch_extensions") / f"eyas-{own}"))


def _load(folder: Path, get: Callable[[str], object]) -> None:
    with (folder / ".eyas.lock").open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        (folder / _BATON).unlink(missing_ok=True)
        get(_ANY_FUNCTION)
