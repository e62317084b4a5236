"""Load the fake-quantization kernels: NNCF's for CUDA, safely against killed processes and missing compilers.

The first use on a GPU compiles them (a minute or more, once). torch guards that with a lock file that is removed only
at the end: a process killed during compilation leaves it behind, and every later one would wait for it forever. An
flock, which the operating system releases with its process, distinguishes a stale lock file from one in use.

NNCF refuses to train on a GPU without nvcc, which torch's wheels do not bring; here `FakeQuantize` does it. On a
processor it does it always.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
from nncf.torch.quantization.extensions import (
    CUDA_EXT_SRC_LIST,
    EXT_INCLUDE_DIRS,
    QuantizedFunctionsCPULoader,
    QuantizedFunctionsCUDALoader,
)
from torch.utils import cpp_extension

from eyas_device.bundle import sha256
from eyas_host.quant.fake_quantize import FakeQuantize
from eyas_host.support.errors import CompressError
from eyas_host.support.files import cache_folder, try_flock, write_bytes
from eyas_host.support.machine import cuda_compiler
from eyas_host.support.progress import warn

_BATON = "lock"
"""Lock file of torch.utils.cpp_extension."""
_TIMEOUT_S = "1200"
"""NNCF's default is a minute, which two busy cores exceed."""
_FOLDER = "TORCH_EXTENSIONS_DIR"
_LOCK, _CHECKSUMS = ".eyas.lock", ".eyas.json"


@functools.cache
def load_kernels() -> None:
    """Let NNCF compute with `FakeQuantize` on a processor, and compile kernels at the first use on a GPU."""
    os.environ.setdefault("NNCF_EXTENSION_LOAD_TIMEOUT", _TIMEOUT_S)
    QuantizedFunctionsCPULoader.load = staticmethod(lambda: FakeQuantize)
    QuantizedFunctionsCUDALoader.load = staticmethod(cuda_kernels)


def cuda_kernels() -> Any:
    """NNCF's CUDA kernels, or `FakeQuantize` with one warning where they cannot be compiled."""
    if not cuda_compiler(os.environ, shutil.which):
        reason = "there is no CUDA compiler (nvcc)"
    else:
        build_folder()
        folder = QuantizedFunctionsCUDALoader.get_build_dir()
        try:
            with _whole_build(Path(folder)):
                return cpp_extension.load(
                    QuantizedFunctionsCUDALoader.name(),
                    CUDA_EXT_SRC_LIST,
                    extra_include_paths=EXT_INCLUDE_DIRS,
                    build_directory=folder,
                )
        except (subprocess.CalledProcessError, OSError, RuntimeError, ImportError) as error:
            reason = f"they cannot be compiled ({(str(error).strip().splitlines() or [type(error).__name__])[0]})"
    warn(f"int8 training runs without NNCF's CUDA kernels, with the same results but slower: {reason}; see eyas doctor")
    return FakeQuantize


def compiled() -> bool:
    """Whether the CUDA kernels are compiled in this environment."""
    build_folder()
    return any(Path(QuantizedFunctionsCUDALoader.get_build_dir()).glob("*.so"))


def build_folder() -> Path:
    """The folder of the compiled kernels, one for each environment: sharing it would recompile at every switch.

    Without a usable home it is in a private folder of TMPDIR. Raises `CompressError` if `TORCH_EXTENSIONS_DIR` names a
    folder that cannot be used.
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
    return folder


@contextmanager
def _whole_build(folder: Path) -> Iterator[None]:
    """Hold a build folder for a block that compiles or loads; what a power cut damaged in it is compiled again.

    Loading a library that was cut short would kill the process. So its checksum is kept from the time when it worked.
    """
    with _one_process(folder):
        if not _is_whole(folder):
            _clear(folder)
        yield
        libraries = {path.name: sha256(path) for path in folder.glob("*.so")}
        if libraries and libraries != _recorded(folder):
            write_bytes(folder / _CHECKSUMS, msgspec.json.encode(libraries))


def _is_whole(folder: Path) -> bool:
    """Whether a finished build of earlier is there, as it was."""
    try:
        libraries = list(folder.glob("*.so"))
        recorded = _recorded(folder)
        if recorded is None:
            return bool(libraries) and all(map(_is_whole_library, libraries))
        return {path.name: sha256(path) for path in libraries} == recorded
    except OSError:
        return False


def _recorded(folder: Path) -> dict[str, str] | None:
    """Checksums of the libraries when they were last loaded, None if there are none."""
    try:
        return msgspec.json.decode((folder / _CHECKSUMS).read_bytes(), type=dict[str, str])
    except (OSError, msgspec.DecodeError, UnicodeDecodeError):
        return None


def _is_whole_library(path: Path) -> bool:
    """Whether a 64-bit little-endian ELF file has its end, where its table of sections lies."""
    with path.open("rb") as stream:
        header = stream.read(64)
    if len(header) < 64 or header[:6] != b"\x7fELF\x02\x01":
        return False
    (offset,) = struct.unpack_from("<Q", header, 0x28)
    entry_size, entries = struct.unpack_from("<HH", header, 0x3A)
    return bool(path.stat().st_size >= offset + entry_size * entries)


def _clear(folder: Path) -> None:
    """Remove all but the lock from a build folder."""
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != _LOCK:
            path.unlink()


@contextmanager
def _one_process(folder: Path) -> Iterator[None]:
    """Hold the lock of a build folder, without a lock file that a killed process left there."""
    with (folder / _LOCK).open("w") as stream:
        try_flock(stream, fcntl.LOCK_EX, wait=True)
        (folder / _BATON).unlink(missing_ok=True)
        yield
