"""NNCF's kernels are loaded by one process at a time, whatever a killed process left behind, and may be missing."""

from __future__ import annotations

import copy
import fcntl
import shutil
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from nncf.torch.extensions import ExtensionNamespace
from nncf.torch.quantization import quantize_functions
from nncf.torch.quantization.extensions import QuantizedFunctionsCUDALoader
from torch import Tensor, nn

from eyas_host.quant import kernels
from eyas_host.quant.fake_quantize import FakeQuantize
from eyas_host.support.errors import CompressError


@pytest.fixture
def seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[set[str]]:
    """What was in the folder of the CUDA kernels each time that they were compiled or loaded."""
    found: list[set[str]] = []

    def load(*_: object, **__: object) -> None:
        found.append({path.name for path in tmp_path.iterdir()})

    for name in ("NNCF_EXTENSION_LOAD_TIMEOUT", "TORCH_EXTENSIONS_DIR"):  # restored after the test
        monkeypatch.setenv(name, "")
    monkeypatch.setattr(kernels, "cuda_compiler", lambda environment, which: "/usr/bin/nvcc")
    monkeypatch.setattr(QuantizedFunctionsCUDALoader, "get_build_dir", classmethod(lambda cls: str(tmp_path)))
    monkeypatch.setattr(kernels.cpp_extension, "load", load)
    return found


def test_a_stale_lock_file_is_ignored(tmp_path: Path, seen: list[set[str]]) -> None:
    (tmp_path / "lock").touch()
    kernels.cuda_kernels()
    assert seen == [{".eyas.lock"}]


def test_a_compiling_process_is_waited_for(tmp_path: Path, seen: list[set[str]]) -> None:
    with (tmp_path / ".eyas.lock").open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        (tmp_path / "lock").touch()
        waiting = threading.Thread(target=kernels.cuda_kernels)
        waiting.start()
        time.sleep(0.3)
        assert waiting.is_alive() and (tmp_path / "lock").exists() and not seen
    waiting.join(10)
    assert seen == [{".eyas.lock"}]


@pytest.fixture
def gpu_without_nvcc(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ExtensionNamespace:
    """NNCF's CUDA functions as on a workstation whose torch finds a GPU, but which has no nvcc."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setattr(QuantizedFunctionsCUDALoader, "load", QuantizedFunctionsCUDALoader.load)  # restored afterwards
    return ExtensionNamespace(QuantizedFunctionsCUDALoader())


def gradients(model: nn.Module, pixels: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    model(pixels).square().mean().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_a_gpu_without_nvcc_trains_to_the_same_gradients_with_one_warning(
    gpu_without_nvcc: ExtensionNamespace,
    quantized: nn.Module,
    shape_frames: np.ndarray,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = copy.deepcopy(quantized).eval()
    pixels = torch.from_numpy(shape_frames[:4]).permute(0, 3, 1, 2).float()
    with torch.no_grad():
        expected = model(pixels)
    wanted = gradients(model, pixels)
    kernels.load_kernels.__wrapped__()
    monkeypatch.setattr(quantize_functions, "QuantizedFunctionsCPU", gpu_without_nvcc)
    with torch.no_grad():
        assert torch.equal(model(pixels), expected)
    found = gradients(model, pixels)
    assert found.keys() == wanted.keys() and len(found) > 200
    largest = max(float(grad.abs().max()) for grad in wanted.values())
    for name, grad in wanted.items():
        torch.testing.assert_close(found[name], grad, rtol=1e-4, atol=1e-6 * largest, msg=name)
    printed = capsys.readouterr().err
    assert printed.count("slower") == 1 and "no CUDA compiler (nvcc)" in printed


def test_an_nvcc_that_fails_is_named_and_replaced(
    gpu_without_nvcc: ExtensionNamespace,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/nvcc").write_text("#!/bin/sh\necho 'nvcc fatal: Unsupported gpu architecture' >&2; exit 1\n")
    (tmp_path / "bin/nvcc").chmod(0o755)
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "built"))
    kernels.load_kernels.__wrapped__()
    assert gpu_without_nvcc.get("Quantize_forward") is FakeQuantize.Quantize_forward
    assert "cannot be compiled" in capsys.readouterr().err


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "file" / "below"))
    with pytest.raises(CompressError, match=r"TORCH_EXTENSIONS_DIR = .*below: cannot be written"):
        kernels.compiled()


LIBRARY = Path(msgspec._core.__file__)
"""A library to damage."""


def test_a_build_that_worked_is_kept(tmp_path: Path, seen: list[set[str]]) -> None:
    library = tmp_path / "kernels.so"
    shutil.copy(LIBRARY, library)
    (tmp_path / "kernels.o").touch()
    for _ in range(2):  # of an earlier version of Eyas, and with its checksum
        kernels.cuda_kernels()
        assert library.read_bytes() == LIBRARY.read_bytes() and (tmp_path / "kernels.o").exists()
    assert len(seen) == 2


def zero_page(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes(4096) + data[middle + 4096 :]


CUTS = [lambda data: b"", lambda data: data[:50], lambda data: data[: len(data) // 2], lambda data: data[:-1]]


@pytest.mark.parametrize(
    ("worked", "damage"), [*((worked, cut) for worked in (False, True) for cut in CUTS), (True, zero_page)]
)
def test_a_damaged_library_is_never_loaded(
    damage: Callable[[bytes], bytes], worked: bool, tmp_path: Path, seen: list[set[str]]
) -> None:
    """Mapping a file that was cut short kills the process."""
    library = tmp_path / "kernels.so"
    if worked:
        shutil.copy(LIBRARY, library)
        kernels.cuda_kernels()
    library.write_bytes(damage(LIBRARY.read_bytes()))
    (tmp_path / "kernels.o").mkdir()  # something else that the compiler would stumble over
    kernels.cuda_kernels()
    assert seen[-1] == {".eyas.lock"}


def test_without_a_home_the_kernels_are_built_in_a_private_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("TORCH_EXTENSIONS_DIR", "XDG_CACHE_HOME"):
        monkeypatch.setenv(name, "")
    monkeypatch.setenv("HOME", "/dev/null")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert kernels.build_folder().is_dir()
    (private,) = tmp_path.iterdir()
    assert kernels.build_folder().is_relative_to(private) and private.stat().st_mode & 0o077 == 0
