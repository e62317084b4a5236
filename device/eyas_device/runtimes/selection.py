"""The remembered choice: which runtime and artefact of a bundle were measured to be the fastest on this device."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import msgspec

from eyas_device.bundle import MANIFEST, Bundle, sha256
from eyas_device.errors import EyasError, RuntimeUnavailable
from eyas_device.runtimes import RUNTIMES, load, runs
from eyas_device.support.files import atomic_write

SELECTION_FILE = "choice.json"
_MOST_BYTES = 1 << 20

Positive = Annotated[float, msgspec.Meta(gt=0)]


class Measured(msgspec.Struct, frozen=True, kw_only=True):
    """One of the candidates."""

    runtime: str
    artefact: str
    latency_ms: Positive
    """Median of decoding, preprocessing, inference and softmax of one frame."""
    passed: bool
    """Whether it passed the golden check; only such a one is chosen."""


class SavedSelection(msgspec.Struct, frozen=True, kw_only=True):
    """What answers for one bundle on this device, and why."""

    name: str
    """Of the bundle."""
    version: str
    manifest_sha256: str
    """Of the bundle's manifest: the choice is for this very bundle."""
    runtime: str
    """A key of `eyas_device.runtimes.RUNTIMES`."""
    artefact: str
    threads: Annotated[int, msgspec.Meta(ge=1, le=1024)]
    """Inference threads that it was measured with."""
    latency_ms: Positive
    measured: tuple[Measured, ...] = ()
    time: float = 0.0
    """When it was made, seconds since 1970."""


def write_selection(state: Path, choice: SavedSelection) -> Path:
    """Remember `choice` in the folder `state`; returns the file.

    It is replaced as a whole: whoever reads, also after a power cut, finds the old choice or the new one. Raises
    `EyasError` if the folder cannot be written.
    """
    path = state / SELECTION_FILE
    try:
        state.mkdir(parents=True, exist_ok=True)
        atomic_write(path, msgspec.json.format(msgspec.json.encode(choice)) + b"\n")  # the service may be another user
    except OSError as error:
        raise EyasError(f"{path}: cannot be written ({error.strerror}); give a --state folder that can be") from None
    return path


def read_selection(state: Path, bundle: Bundle) -> SavedSelection | None:
    """What was chosen for `bundle` on this device.

    None if nothing was, if it was for another bundle or another manifest, if the artefact is not there or the runtime
    does not work here any more, or if the file is damaged: then the bundle's own preference holds.
    """
    path = state / SELECTION_FILE
    try:
        if not path.is_file():  # a pipe would block
            return None
        with path.open("rb") as stream:
            data = stream.read(_MOST_BYTES + 1)
        if len(data) > _MOST_BYTES:
            return None
        choice = msgspec.json.decode(data, type=SavedSelection)
        recorded = manifest_sha256(bundle)
    except (OSError, msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
    if choice.manifest_sha256 != recorded or choice.runtime not in RUNTIMES:
        return None
    served = runs(choice.runtime)
    if not any(a.name == choice.artefact and a.runtime == served for a in bundle.manifest.artefacts):
        return None
    try:
        load(choice.runtime)
    except RuntimeUnavailable:
        return None
    return choice


def manifest_sha256(bundle: Bundle) -> str:
    """Which bundle it is: hex sha256 of its manifest, which holds those of all its files."""
    return sha256(bundle.root / MANIFEST)
