"""NNCF's compiled fake-quantization kernels, which a killed process must not take from all later ones.

The first use compiles them (a minute or more, once). torch guards that with a file that is only removed at the end: a
process that is killed meanwhile leaves it, and every later one waits for it in vain. A lock that the kernel lets go of
with its process tells a file that was left behind from one that is in use.
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
from torch.utils.cpp_extension import get_default_build_root

_BATON = "lock"
"""torch.utils.cpp_extension's own file."""
_ANY = "Quantize_forward"
_LONGEST_S = "1200"
"""NNCF allows a minute, which two busy cores exceed."""


@functools.cache
def load_kernels() -> None:
    """Compile what is not compiled, and load it; where there is no compiler NNCF takes torch's own operations."""
    os.environ.setdefault("NNCF_EXTENSION_LOAD_TIMEOUT", _LONGEST_S)
    _take_own_folder()
    _load(Path(QuantizedFunctionsCPULoader.get_build_dir()), QuantizedFunctionsCPU.get)
    if torch.cuda.is_available():
        _load(Path(QuantizedFunctionsCUDALoader.get_build_dir()), QuantizedFunctionsCUDA.get)


def compiled() -> list[str]:
    """Which kernels of this environment are compiled: `cpu`, `cuda`."""
    _take_own_folder()
    loaders = {"cpu": QuantizedFunctionsCPULoader, "cuda": QuantizedFunctionsCUDALoader}
    return [kind for kind, loader in loaders.items() if any(Path(loader.get_build_dir()).glob("*.so"))]


def _take_own_folder() -> None:
    """Shared with another environment they would be compiled again at each change from one to the other."""
    own = hashlib.sha256(sys.prefix.encode()).hexdigest()[:8]
    os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(Path(get_default_build_root()) / f"eyas-{own}"))


def _load(folder: Path, get: Callable[[str], object]) -> None:
    with (folder / ".eyas.lock").open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        (folder / _BATON).unlink(missing_ok=True)
        get(_ANY)
