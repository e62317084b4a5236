"""Inference runtimes behind one small protocol; each is imported only when a bundle is run with it."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import TracebackType
from typing import Protocol, cast

import numpy as np
import numpy.typing as npt

from eyas_device.bundle import Artefact, Bundle
from eyas_device.closing import Closing
from eyas_device.errors import BundleError, PictureError, RuntimeUnavailable
from eyas_device.preprocess import Pixels

Logits = npt.NDArray[np.float32]
"""float32 [classes], before temperature and softmax."""

RUNTIMES = {
    "litert": "eyas_device.runtimes.litert:LiteRT",
    "openvino": "eyas_device.runtimes.openvino:OpenVINO",
    "onnx": "eyas_device.runtimes.onnx:OnnxRuntime",
}
"""Name -> class; also the order of preference."""

_INSTALL = {
    "litert": "pip install eyas",
    "openvino": "pip install 'eyas[openvino]'",
    "onnx": "pip install 'eyas[onnx]'",
}


class Runtime(Protocol):
    """One loaded model. Not for use by several threads at once."""

    name: str
    """`litert`, `openvino` or `onnx`."""
    version: str
    """Of the library that runs the model."""

    def infer(self, pixels: Pixels) -> Logits:
        """Logits, float32 [classes], of one prepared picture, uint8 [size, size, 3] BGR.

        The array belongs to the runtime and is overwritten by the next call: copy what has to last. Raises
        `PictureError` for a picture of another shape or dtype.
        """

    def close(self) -> None:
        """Free the model; closing twice is fine."""

    def __enter__(self) -> Runtime: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None: ...


class PictureIn(Closing):
    """What every runtime shares: it takes one picture of one shape."""

    _shape: tuple[int, int, int]

    def _expect(self, pixels: Pixels) -> None:
        """Raise `PictureError` unless `pixels` fits the model; numpy would stretch a wrong shape without a word."""
        if pixels.shape != self._shape or pixels.dtype != np.uint8:
            raise PictureError(f"picture of {pixels.dtype} {pixels.shape}; uint8 {self._shape} is needed: prepare it")


def open_runtime(
    bundle: Bundle, runtime: str | None = None, artefact: str | None = None, *, threads: int = 1
) -> Runtime:
    """Load what `bundle` says `runtime` should run, or the artefact called `artefact`.

    Without `runtime`, the first of litert, openvino and onnx that the bundle serves and that is installed. `threads` is
    how many CPU threads inference may use. Raises `RuntimeUnavailable` if the runtime is unknown or not installed, and
    `BundleError` if the bundle has nothing for it or the model does not fit the manifest.
    """
    chosen = choose(bundle, runtime, artefact)
    loader = load(chosen.runtime)
    size, classes = bundle.manifest.preprocessing.size, len(bundle.manifest.labels)
    return cast(Runtime, loader(bundle.path(chosen), size=size, classes=classes, threads=threads))


def choose(bundle: Bundle, runtime: str | None = None, artefact: str | None = None) -> Artefact:
    """The artefact that `open_runtime` loads for the same arguments; raises the same errors."""
    if runtime is not None:
        if runtime not in RUNTIMES:
            raise RuntimeUnavailable(f"runtime {runtime!r} is not known; allowed are {', '.join(RUNTIMES)}")
        return bundle.artefact(runtime, artefact)
    if artefact is not None:
        for candidate in bundle.manifest.artefacts:
            if candidate.name == artefact:
                return candidate
        have = ", ".join(a.name for a in bundle.manifest.artefacts)
        raise BundleError(f"{bundle.root}: no artefact {artefact!r}; the bundle has: {have}")
    served = [name for name in RUNTIMES if name in bundle.manifest.use]
    if not served:
        raise BundleError(f"{bundle.root}: the manifest's `use` names no runtime; pack the bundle again")
    reasons = []
    for name in served:
        try:
            load(name)
        except RuntimeUnavailable as error:
            reasons.append(str(error))
        else:
            return bundle.artefact(name)
    raise RuntimeUnavailable(f"{bundle.root}: no runtime for this bundle: {'; '.join(reasons)}")


def load(name: str) -> type:
    """Import the class of a known runtime. Raises `RuntimeUnavailable` with its install line if that does not work."""
    module, attribute = RUNTIMES[name].split(":")
    try:
        return cast(type, getattr(importlib.import_module(module), attribute))
    except ImportError as error:
        raise RuntimeUnavailable(f"runtime {name} cannot be used ({error}); {_INSTALL[name]}") from None


def misfit(path: Path, what: object, needed: str) -> BundleError:
    """The error for a model whose inputs or outputs are not what the manifest promises."""
    return BundleError(f"{path}: the model has {what}; {needed} is needed: pack the bundle again")


def broken(path: Path, error: Exception) -> BundleError:
    """The error for a file that the runtime refuses to load."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return BundleError(f"{path}: the model cannot be loaded ({lines[0]})")
