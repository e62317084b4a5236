"""The saved selection: the runtime and artefact that were measured to be the fastest on this device."""

from __future__ import annotations

from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Annotated

import msgspec

from eyas_device.bundle import Bundle
from eyas_device.errors import EyasError, RuntimeUnavailable
from eyas_device.runtimes import RUNTIMES, artefact_runtime, load
from eyas_device.support.files import atomic_write

SELECTION_FILE = "selection.json"
_MAX_BYTES = 1 << 20
_PACKAGES = (
    "eyas",
    "ai-edge-litert",
    "tflite-runtime",
    "tensorflow",
    "openvino",
    "onnxruntime",
    "onnxruntime-gpu",
    "numpy",
    "opencv-python-headless",
    "opencv-python",
    "msgspec",
)

Positive = Annotated[float, msgspec.Meta(gt=0)]


class Measured(msgspec.Struct, frozen=True, kw_only=True):
    """One measured candidate."""

    runtime: str
    artefact: str
    latency_ms: Positive
    """Median of decoding, preprocessing, inference and softmax of one frame."""
    passed: bool
    """Whether it passed the golden check; others are never selected."""


class SavedSelection(msgspec.Struct, frozen=True, kw_only=True):
    """Runtime and artefact selected for one bundle on this device, with the measurements."""

    name: str
    """Name of the bundle."""
    version: str
    manifest_sha256: str
    """sha256 of the bundle's manifest: the selection is for exactly this bundle."""
    runtime: str
    """A key of `eyas_device.runtimes.RUNTIMES`."""
    artefact: str
    threads: Annotated[int, msgspec.Meta(ge=1, le=1024)]
    """Inference threads during the measurement."""
    latency_ms: Positive
    measured: tuple[Measured, ...] = ()
    versions: dict[str, str] = {}
    """Versions of the libraries during the measurement (see `library_versions`): with others, all has to be measured
    again."""
    time: float = 0.0
    """When it was measured, seconds since 1970."""


def write_selection(state: Path, selection: SavedSelection) -> Path:
    """Save `selection` atomically in the folder `state` and return the file.

    Raises `EyasError` if the folder cannot be written.
    """
    path = state / SELECTION_FILE
    try:
        state.mkdir(parents=True, exist_ok=True)
        atomic_write(path, msgspec.json.format(msgspec.json.encode(selection)) + b"\n")
    except OSError as error:
        raise EyasError(f"{path}: cannot be written ({error.strerror}); give a --state folder that can be") from None
    return path


def read_selection(state: Path, bundle: Bundle) -> SavedSelection | None:
    """Read the selection for `bundle`; None if there is none that can be used.

    That is if it is for another manifest, if it was measured with other versions of the libraries, if the artefact is
    missing or the runtime no longer works here, or if the file is damaged: the bundle's own preference applies then.
    """
    path = state / SELECTION_FILE
    try:
        if not path.is_file():  # a pipe would block
            return None
        with path.open("rb") as stream:
            data = stream.read(_MAX_BYTES + 1)
        if len(data) > _MAX_BYTES:
            return None
        selection = msgspec.json.decode(data, type=SavedSelection)
        recorded = manifest_sha256(bundle)
    except (OSError, msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
    if selection.manifest_sha256 != recorded or selection.runtime not in RUNTIMES:
        return None
    if selection.versions != library_versions():
        return None
    runtime = artefact_runtime(selection.runtime)
    if not any(a.known and a.name == selection.artefact and a.runtime == runtime for a in bundle.manifest.artefacts):
        return None
    try:
        load(selection.runtime)
    except RuntimeUnavailable:
        return None
    return selection


def manifest_sha256(bundle: Bundle) -> str:
    """Identity of a bundle: hex sha256 of its manifest, of a reduced bundle that of the whole one."""
    return bundle.identity


def library_versions() -> dict[str, str]:
    """Versions of the installed packages that predictions and their latency depend on."""
    versions = {}
    for package in _PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    return versions
