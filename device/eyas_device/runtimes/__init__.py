"""Inference runtimes behind one small protocol; each is imported only when a bundle is run with it."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Protocol, cast

import numpy as np
import numpy.typing as npt

from eyas_device.bundle import Artefact, Bundle, RuntimeName
from eyas_device.errors import BundleError, ImageError, RuntimeUnavailable
from eyas_device.preprocess import Pixels
from eyas_device.support.closing import Closing

Logits = npt.NDArray[np.float32]
"""float32 [classes], before temperature and softmax."""

RUNTIMES = {
    "litert": "eyas_device.runtimes.litert:LiteRT",
    "tflite": "eyas_device.runtimes.tflite:Tflite",
    "openvino": "eyas_device.runtimes.openvino:OpenVINO",
    "onnx": "eyas_device.runtimes.onnx:OnnxRuntime",
    "onnx-cuda": "eyas_device.runtimes.onnx:OnnxCuda",
    "onnx-tensorrt": "eyas_device.runtimes.onnx:OnnxTensorRT",
}
"""Name -> class; also the order of preference."""

_RUNS: dict[str, RuntimeName] = {"tflite": "litert", "onnx-cuda": "onnx", "onnx-tensorrt": "onnx"}
"""Runtime -> whose artefacts it runs, where that is not its own name."""

_INSTALL = {
    "litert": "pip install eyas-device",
    "tflite": "pip install 'eyas-device[tflite]' (numpy 1, Python 3.11 or older) or 'eyas-device[tensorflow]'",
    "openvino": "pip install 'eyas-device[openvino]'",
    "onnx": "pip install 'eyas-device[onnx]'",
    "onnx-cuda": "install onnxruntime-gpu in place of onnxruntime",
    "onnx-tensorrt": "install JetPack's onnxruntime-gpu with TensorRT",
}


class Runtime(Protocol):
    """One loaded model. Not for use by several threads at once."""

    name: str
    """A key of `RUNTIMES`."""
    version: str
    """Of the library that runs the model."""

    def infer(self, pixels: Pixels) -> Logits:
        """Logits, float32 [classes], of one prepared image, uint8 [size, size, 3] BGR.

        The array belongs to the runtime and is overwritten by the next call: copy what has to last. Raises
        `ImageError` for an image of another shape or dtype.
        """

    def infer_written(self, write: Callable[[Pixels], object]) -> Logits:
        """Logits of the image that `write` puts into the memory it is called with, uint8 [size, size, 3] BGR.

        That is the runtime's own input where it can be: nothing is copied. `write` must not keep it.
        """

    def close(self) -> None:
        """Free the model; closing twice is fine."""

    def __enter__(self) -> Runtime: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None: ...


class ImageRuntime(Closing):
    """What every runtime shares: it takes one image of one shape."""

    precision_hint: str = ""
    """What the library was told to compute in, where it may choose."""
    _shape: tuple[int, int, int]

    @classmethod
    def lacks(cls) -> str:
        """What the library lacks to run models here; empty if nothing."""
        return ""

    def infer(self, pixels: Pixels) -> Logits:
        """Logits, float32 [classes], of one prepared image; `Runtime.infer` says the rest."""
        if pixels.shape != self._shape or pixels.dtype != np.uint8:  # numpy would stretch a wrong shape without a word
            raise ImageError(f"image of {pixels.dtype} {pixels.shape}; uint8 {self._shape} is needed: prepare it")
        return self.infer_written(lambda out: np.copyto(out, pixels))

    def infer_written(self, write: Callable[[Pixels], object]) -> Logits:
        """Logits of the image that `write` puts into the runtime's input; `Runtime.infer_written` says the rest."""
        raise NotImplementedError


class Selection(NamedTuple):
    """What answers: a runtime and the artefact that it runs."""

    runtime: str
    """A key of `RUNTIMES`."""
    artefact: Artefact


def open_runtime(
    bundle: Bundle, runtime: str | None = None, artefact: str | None = None, *, threads: int = 1
) -> Runtime:
    """Load what `bundle` says `runtime` should run, or the artefact called `artefact`.

    Without `runtime`, the first of `RUNTIMES` that the bundle serves and that works here. `threads` is how many CPU
    threads inference may use. Raises `RuntimeUnavailable` if the runtime is unknown or does not work here, and
    `BundleError` if the bundle has nothing for it or the model does not fit the manifest.
    """
    chosen = choose(bundle, runtime, artefact)
    loader: Callable[..., Any] = load(chosen.runtime)
    size, classes = bundle.manifest.preprocessing.size, len(bundle.manifest.labels)
    return cast(Runtime, loader(bundle.path(chosen.artefact), size=size, classes=classes, threads=threads))


def runs(runtime: str) -> str:
    """Whose artefacts `runtime` runs. Raises `RuntimeUnavailable` for an unknown runtime."""
    if runtime not in RUNTIMES:
        raise RuntimeUnavailable(f"runtime {runtime!r} is not known; allowed are {', '.join(RUNTIMES)}")
    return _RUNS.get(runtime, runtime)


def choose(bundle: Bundle, runtime: str | None = None, artefact: str | None = None) -> Selection:
    """What `open_runtime` loads for the same arguments; raises the same errors."""
    if runtime is not None:
        return Selection(runtime, bundle.artefact(runs(runtime), artefact))
    wanted = {a.name: a for a in bundle.manifest.artefacts}
    if artefact is not None and artefact not in wanted:
        raise BundleError(f"{bundle.root}: no artefact {artefact!r}; the bundle has: {', '.join(wanted)}")
    served = [wanted[artefact].runtime] if artefact else list(bundle.manifest.use)
    candidates = [name for name in RUNTIMES if runs(name) in served]
    if not candidates:
        raise BundleError(f"{bundle.root}: the manifest's `use` names no runtime; pack the bundle again")
    reasons = []
    for name in candidates:
        try:
            load(name)
        except RuntimeUnavailable as error:
            reasons.append(str(error))
        else:
            return Selection(name, bundle.artefact(runs(name), artefact))
    raise RuntimeUnavailable(f"{bundle.root}: no runtime for this bundle: {'; '.join(reasons)}")


def load(name: str) -> type[ImageRuntime]:
    """Import the class of a known runtime. Raises `RuntimeUnavailable` with its install line if it cannot work here."""
    module, attribute = RUNTIMES[name].split(":")
    try:
        loaded = cast(type[ImageRuntime], getattr(importlib.import_module(module), attribute))
    except ImportError as error:
        raise RuntimeUnavailable(f"runtime {name} cannot be used ({error}); {_INSTALL[name]}") from None
    if lacking := loaded.lacks():
        raise RuntimeUnavailable(f"runtime {name} cannot be used ({lacking}); {_INSTALL[name]}")
    return loaded


def misfit(path: Path, what: object, needed: str) -> BundleError:
    """The error for a model whose inputs or outputs are not what the manifest promises."""
    return BundleError(f"{path}: the model has {what}; {needed} is needed: pack the bundle again")


def broken(path: Path, error: Exception) -> BundleError:
    """The error for a file that the runtime refuses to load."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return BundleError(f"{path}: the model cannot be loaded ({lines[0]})")
