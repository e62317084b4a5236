"""Inference runtimes behind one small protocol; each is imported only when it is used."""

from __future__ import annotations

import importlib
import os
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
from eyas_device.support.packages import install_line
from eyas_device.support.quiet import disable_usage_reports

ENGINE_CACHE = "EYAS_ENGINE_CACHE"
"""Environment variable: folder in which a runtime keeps what it builds for this device; child processes share it."""

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

_ARTEFACT_RUNTIMES: dict[str, RuntimeName] = {"tflite": "litert", "onnx-cuda": "onnx", "onnx-tensorrt": "onnx"}
"""Runtime -> the `Artefact.runtime` that it runs, where that is not its own name."""

_EXTRAS = {"litert": "", "tflite": "tflite", "openvino": "openvino", "onnx": "onnx"}
"""Runtime -> extra that installs it; LiteRT comes with eyas-device."""
_INSTALL = {
    "tflite": " (numpy 1, Python 3.11 or older), or 'eyas-device[tensorflow]'",
    "onnx-cuda": "install onnxruntime-gpu in place of onnxruntime",
    "onnx-tensorrt": "install an onnxruntime-gpu that was built with TensorRT, on a Jetson that of JetPack",
}
"""What else there is to say about it."""


class Runtime(Protocol):
    """A runtime with one loaded model. Not thread-safe."""

    name: str
    """A key of `RUNTIMES`."""
    version: str
    """Version of the library that runs the model."""

    def infer(self, pixels: Pixels) -> Logits:
        """Run the model on one prepared image, uint8 [size, size, 3] BGR; returns logits, float32 [classes].

        The array belongs to the runtime and is overwritten by the next call. Raises `ImageError` for an image of
        another shape or dtype.
        """

    def infer_in_place(self, write: Callable[[Pixels], object]) -> Logits:
        """As `infer`, on the image that `write` puts into the buffer it is called with, uint8 [size, size, 3] BGR.

        Where possible the buffer is the runtime's input tensor, so that nothing is copied. `write` must not keep it.
        """

    def close(self) -> None:
        """Free the model; closing twice is fine."""

    def __enter__(self) -> Runtime: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None: ...


class ImageRuntime(Closing):
    """Base class of all runtimes: one fixed-shape uint8 HWC image as input."""

    precision_hint: str = ""
    """Precision that the library is asked to compute in, where it has a choice."""
    _shape: tuple[int, int, int]

    @classmethod
    def missing_feature(cls) -> str:
        """What the library needs and does not have here; empty if nothing."""
        return ""

    def infer(self, pixels: Pixels) -> Logits:
        if pixels.shape != self._shape or pixels.dtype != np.uint8:  # numpy would silently broadcast a wrong shape
            raise ImageError(f"image of {pixels.dtype} {pixels.shape}; uint8 {self._shape} is needed: use `prepare`")
        return self.infer_in_place(lambda out: np.copyto(out, pixels))

    def infer_in_place(self, write: Callable[[Pixels], object]) -> Logits:
        raise NotImplementedError


class Selection(NamedTuple):
    """A runtime and the artefact that it runs."""

    runtime: str
    """A key of `RUNTIMES`."""
    artefact: Artefact


def open_runtime(
    bundle: Bundle, runtime: str | None = None, artefact: str | None = None, *, threads: int = 1
) -> Runtime:
    """Load the preferred artefact of `runtime`, or the artefact called `artefact`.

    Args:
        bundle: The verified bundle.
        runtime: A key of `RUNTIMES`; by default the first that the bundle supports and that works here.
        artefact: Name of an artefact; by default the one that the bundle prefers for the runtime.
        threads: CPU threads for inference.

    Raises:
        RuntimeUnavailable: The runtime is unknown or does not work here.
        BundleError: The bundle has no artefact for it, or the model does not match the manifest.

    """
    chosen = choose(bundle, runtime, artefact)
    loader: Callable[..., Any] = load(chosen.runtime)
    size, classes = bundle.manifest.preprocessing.size, len(bundle.manifest.labels)
    return cast(Runtime, loader(bundle.path(chosen.artefact), size=size, classes=classes, threads=threads))


def artefact_runtime(runtime: str) -> str:
    """The `Artefact.runtime` whose artefacts `runtime` runs. Raises `RuntimeUnavailable` for an unknown runtime."""
    if runtime not in RUNTIMES:
        raise RuntimeUnavailable(f"runtime {runtime!r} is not known; allowed are {', '.join(RUNTIMES)}")
    return _ARTEFACT_RUNTIMES.get(runtime, runtime)


def choose(bundle: Bundle, runtime: str | None = None, artefact: str | None = None) -> Selection:
    """Select what `open_runtime` loads for the same arguments; raises the same errors."""
    if runtime is not None:
        return Selection(runtime, bundle.artefact(artefact_runtime(runtime), artefact))
    artefacts = {a.name: a for a in bundle.manifest.artefacts}
    if artefact is not None and artefact not in artefacts:
        raise BundleError(f"{bundle.root}: no artefact {artefact!r}; the bundle has: {', '.join(artefacts)}")
    if artefact is not None and not artefacts[artefact].known:
        raise RuntimeUnavailable(f"{bundle.root}: {artefacts[artefact].unknown}")
    supported = [artefacts[artefact].runtime] if artefact else bundle.runtimes()
    candidates = [name for name in RUNTIMES if artefact_runtime(name) in supported]
    if not candidates:
        raise BundleError(f"{bundle.root}: the manifest's `use` names no runtime; pack the bundle again")
    reasons = []
    for name in candidates:
        try:
            load(name)
        except RuntimeUnavailable as error:
            reasons.append(str(error))
        else:
            return Selection(name, bundle.artefact(artefact_runtime(name), artefact))
    raise RuntimeUnavailable(f"{bundle.root}: no runtime for this bundle: {'; '.join(reasons)}")


def load(name: str) -> type[ImageRuntime]:
    """Import the class of a known runtime. Raises `RuntimeUnavailable` with the install command if it cannot work."""
    disable_usage_reports()
    module, attribute = RUNTIMES[name].split(":")
    try:
        loaded = cast(type[ImageRuntime], getattr(importlib.import_module(module), attribute))
    except ImportError as error:
        raise RuntimeUnavailable(f"runtime {name} cannot be used ({error}); {_fix(name)}") from None
    if missing := loaded.missing_feature():
        raise RuntimeUnavailable(f"runtime {name} cannot be used ({missing}); {_fix(name)}")
    return loaded


def _fix(name: str) -> str:
    """How to install a known runtime."""
    line = install_line(_EXTRAS[name]) if name in _EXTRAS else ""
    return line + _INSTALL.get(name, "")


def use_engine_cache(state: Path) -> None:
    """Keep built engines in the state folder, if it exists and nothing else is set; see `ENGINE_CACHE`."""
    if state.is_dir():
        os.environ.setdefault(ENGINE_CACHE, str(state / "engines"))


def model_mismatch(path: Path, actual: object, needed: str) -> BundleError:
    """Error for a model whose inputs or outputs do not match the manifest."""
    return BundleError(f"{path}: the model has {actual}; {needed} is needed: pack the bundle again")


def load_error(path: Path, error: Exception) -> BundleError:
    """Error for a file that the runtime cannot load."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return BundleError(f"{path}: the model cannot be loaded ({lines[0]})")
