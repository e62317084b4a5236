"""The bundle: a directory with a compiled model and everything a device needs to run and verify it.

    manifest.json   contents, preprocessing, measured evidence
    litert-int8.tflite, openvino-int8.xml + .bin, ...   the artefacts
    golden.npz      small JPEG images, what each artefact predicted for them on the host, and the settings that it used
    reference.npz   statistics of the training images, for out-of-distribution detection
    CARD.md, README.md, NOTICE

The consumer defines what it accepts: this contract lives on the device side, and the host writes to it.
"""

from __future__ import annotations

import hashlib
import math
import re
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, Literal, get_args

import msgspec
import numpy as np
import numpy.typing as npt

from eyas_device import __version__, decision
from eyas_device.decision import Decision
from eyas_device.errors import BundleError, ImageError
from eyas_device.preprocess import Pixels, Preprocessing, decode, image_size
from eyas_device.reference import Reference, read_reference
from eyas_device.support.versions import version_numbers

SCHEMA = 1
_MAX_NPZ_BYTES = 16 << 20
"""Maximum uncompressed size of one `.npz`, and of all golden images: a device has little memory."""
MANIFEST = "manifest.json"
GOLDEN = "golden.npz"
REFERENCE = "reference.npz"

RuntimeName = Literal["litert", "openvino", "onnx"]
Precision = Literal["fp32", "int8", "int16"]
_RUNTIMES, _PRECISIONS = frozenset(get_args(RuntimeName)), frozenset(get_args(Precision))


class File(msgspec.Struct, frozen=True):
    """One file of the bundle."""

    path: str
    """Relative to the bundle, forward slashes."""
    sha256: str
    size_bytes: int


class Artefact(msgspec.Struct, frozen=True):
    """One compiled model: its runtime, precision and files (the first is the one to load)."""

    name: str
    runtime: str
    """A `RuntimeName`, or a runtime of tomorrow: see `known`."""
    precision: str
    """A `Precision`, or one of tomorrow."""
    files: tuple[File, ...]

    @property
    def known(self) -> bool:
        """Whether this agent knows runtime and precision; other artefacts are installed with the rest but never run."""
        return self.runtime in _RUNTIMES and self.precision in _PRECISIONS

    @property
    def unknown(self) -> str:
        """Why an artefact that is not `known` cannot be run."""
        return (
            f"artefact {self.name!r} is {self.precision} for {self.runtime}, which this agent ({__version__}) does not "
            "know: update the agent"
        )


class Confidence(msgspec.Struct, frozen=True):
    """How logits z become calibrated probabilities: softmax(z / temperature + bias).

    The temperature corrects how sure a network is, the bias how frequent it takes each label to be: a network that was
    trained with class weights takes all of them to be equally frequent. Source: Guo et al., "On Calibration of Modern
    Neural Networks", 2017 (temperature and vector scaling).
    """

    temperature: float = 1.0
    """Logits are divided by it before the softmax; fitted on the validation set."""
    bias: tuple[float, ...] = ()
    """Added to each label's logit after the division, in the order of the labels, nats; empty: zeros."""
    threshold: float = 0.5
    """Below this confidence a prediction is reported as uncertain."""


class Lineage(msgspec.Struct, frozen=True):
    """sha256 of the inputs that the bundle was made from."""

    data: str = ""
    split: str = ""
    recipe: str = ""
    parent: str | None = None


class Governance(msgspec.Struct, frozen=True):
    """What may be done with the images that the model sees."""

    images: str = "allowed"
    """`allowed`, or `never`: no image leaves a device, whatever its configuration says. Another word counts as that."""

    @property
    def images_allowed(self) -> bool:
        """Whether images may leave a device."""
        return self.images == "allowed"


class Manifest(msgspec.Struct, frozen=True):
    """`manifest.json`. Unknown fields are ignored, so that an older agent reads a newer minor version."""

    schema: int
    name: str
    version: str
    labels: tuple[str, ...]
    preprocessing: Preprocessing
    artefacts: tuple[Artefact, ...]
    use: dict[str, str]
    """Runtime -> name of its preferred artefact: int8 only where it was measured to be faster than float."""
    reasons: dict[str, str] = {}
    """Runtime -> why that artefact is preferred."""
    confidence: Confidence = Confidence()
    decision: Decision | None = None
    """Decision rule from misclassification costs; None: the label with the largest logit."""
    lineage: Lineage = Lineage()
    evidence: dict[str, dict[str, Any]] = {}
    """Artefact -> measurements on the host: accuracy, parity, latency."""
    golden: File | None = None
    golden_tolerance: float = 0.05
    """Largest allowed absolute difference between a probability and the recorded one on a golden image."""
    reference: File | None = None
    governance: Governance = Governance()
    notices: tuple[str, ...] = ()
    min_agent_version: str = "0.1.0"
    created: str = ""
    origin: str = ""
    """sha256 of the manifest of the whole bundle, where this is a reduced one: some of its artefacts were left out."""

    def files(self) -> list[File]:
        """All recorded files: those of the artefacts, the golden images and the reference."""
        extras = [file for file in (self.golden, self.reference) if file is not None]
        return [file for artefact in self.artefacts for file in artefact.files] + extras


class PredictionSettings(msgspec.Struct, frozen=True):
    """What in a manifest decides about predictions; the golden images carry a copy, so that a change is noticed."""

    labels: tuple[str, ...]
    preprocessing: Preprocessing
    confidence: Confidence
    decision: Decision | None
    golden_tolerance: float
    governance: Governance
    reference: str
    """sha256 of the OOD reference; empty without one."""

    @classmethod
    def of(cls, manifest: Manifest) -> PredictionSettings:
        """The settings of a manifest."""
        values = {name: getattr(manifest, name) for name in cls.__struct_fields__ if name != "reference"}
        return cls(**values, reference=manifest.reference.sha256 if manifest.reference else "")


class Golden(msgspec.Struct, frozen=True):
    """Decoded images and what each artefact predicted for them on the host."""

    frames: tuple[Pixels, ...]
    probabilities: Mapping[str, npt.NDArray[np.float32]]
    """Artefact name -> float32 [images, classes]."""
    labels: Mapping[str, tuple[str, ...]] = {}
    """Artefact name -> predicted label of each image."""
    uncertain: Mapping[str, tuple[bool, ...]] = {}
    """Artefact name -> whether each prediction was uncertain."""
    settings: PredictionSettings | None = None
    """The manifest's settings at packing; None for a bundle of an early version, which recorded probabilities alone."""


class Bundle:
    """A bundle whose manifest is valid and whose files have the recorded hashes.

    >>> bundle = Bundle.open("runs/shapes/bundle")
    >>> bundle.manifest.labels
    ('cross', 'disc', 'stripes')
    """

    def __init__(self, root: Path, manifest: Manifest) -> None:
        self.root = root
        self.manifest = manifest

    @classmethod
    def open(cls, root: Path | str) -> Bundle:
        """Read the manifest and check every file's size and sha256.

        Raises `BundleError` if the directory is not a bundle, needs another schema or a newer agent, or was altered.
        """
        root = Path(root)
        bundle = cls(root, read_manifest(root))
        for file in bundle.manifest.files():
            bundle._verify(file)
        return bundle

    @property
    def identity(self) -> str:
        """Which model this is, as hex sha256: that of the whole bundle's manifest, also of a reduced bundle."""
        return self.manifest.origin or sha256(self.root / MANIFEST)

    def runtimes(self) -> list[str]:
        """The runtimes of the manifest's `use` for which the bundle has an artefact that this agent knows."""
        known = {artefact.runtime for artefact in self.manifest.artefacts if artefact.known}
        return [runtime for runtime in self.manifest.use if runtime in known]

    def artefact(self, runtime: str, name: str | None = None) -> Artefact:
        """The preferred artefact of `runtime`, or the one called `name`.

        Where the preferred one is of a precision that this agent does not know, it is the float one, else the first
        that it knows. Raises `BundleError` if there is none.
        """
        requested = name or self.manifest.use.get(runtime)
        known = [artefact for artefact in self.manifest.artefacts if artefact.known and artefact.runtime == runtime]
        for artefact in known:
            if artefact.name == requested:
                return artefact
        preferred = next((artefact for artefact in self.manifest.artefacts if artefact.name == requested), None)
        if preferred is not None and preferred.runtime == runtime and name is None and known:
            return min(known, key=lambda artefact: artefact.precision != "fp32")
        if preferred is not None and not preferred.known:
            raise BundleError(f"{self.root}: {preferred.unknown}")
        available = ", ".join(a.name for a in self.manifest.artefacts) or "none"
        raise BundleError(
            f"{self.root}: no artefact {requested or ''!r} for runtime {runtime!r}; the bundle has: {available}"
        )

    def path(self, artefact: Artefact) -> Path:
        """The file that a runtime loads for `artefact`."""
        return self.root / artefact.files[0].path

    def golden(self) -> Golden:
        """Load the golden images. Raises `BundleError` if they are missing or malformed."""
        if self.manifest.golden is None:
            raise BundleError(f"{self.root}: the bundle has no golden images; pack it again")
        path = self.root / self.manifest.golden.path
        data = self._arrays(self.manifest.golden)
        try:
            images = sorted((name for name in data if name.startswith("image_")), key=lambda name: int(name[6:]))
        except ValueError:
            raise BundleError(f"{path}: golden images without a number; pack the bundle again") from None
        frames = self._decode_images([data[name] for name in images])
        probabilities = {k.removeprefix("p."): data[k] for k in data if k.startswith("p.")}
        shape = (len(frames), len(self.manifest.labels))
        complete = all(p.shape == shape and p.dtype.kind == "f" for p in probabilities.values())
        if not frames or not probabilities or not complete:
            raise BundleError(f"{path}: images and recorded probabilities do not match; pack the bundle again")
        golden = Golden(frames=frames, probabilities=probabilities)
        return _with_predictions(golden, data, path) if "settings" in data else golden

    def _decode_images(self, images: Sequence[npt.NDArray[Any]]) -> tuple[Pixels, ...]:
        """Decode golden images, JPEG files as uint8 [bytes], as a camera's frames are decoded."""
        where = f"{self.root}: golden image"
        left, frames = _MAX_NPZ_BYTES, []
        for number, image in enumerate(images):
            data = image.tobytes()
            size = image_size(data) if image.dtype == np.uint8 and image.ndim == 1 else None
            if size is None:
                raise BundleError(f"{where} {number}: not a JPEG file; pack the bundle again")
            left -= 3 * size[0] * size[1]
            if left < 0:
                raise BundleError(f"{where}s: unpack to more than {_MAX_NPZ_BYTES >> 20} MiB; pack the bundle again")
            try:
                frames.append(decode(data, spec=self.manifest.preprocessing))
            except ImageError as error:
                raise BundleError(f"{where} {number}: {error}; pack the bundle again") from None
        return tuple(frames)

    def reference(self) -> Reference | None:
        """Load the statistics of the training images; None if the bundle has none.

        Raises `BundleError` if it is malformed.
        """
        if self.manifest.reference is None:
            return None
        data = self._arrays(self.manifest.reference)
        reference = read_reference(data)
        if reference is None:
            raise BundleError(f"{self.root / self.manifest.reference.path}: malformed; pack the bundle again")
        return reference

    def _arrays(self, file: File) -> dict[str, npt.NDArray[Any]]:
        """The arrays of an `.npz`, refused if they would unpack to more than `_MAX_NPZ_BYTES`."""
        path = self.root / file.path
        try:
            with zipfile.ZipFile(path) as archive:
                if sum(member.file_size for member in archive.infolist()) > _MAX_NPZ_BYTES:
                    raise BundleError(f"{path}: unpacks to more than {_MAX_NPZ_BYTES >> 20} MiB; pack the bundle again")
            with np.load(path, allow_pickle=False) as data:
                return {name: data[name] for name in data.files}
        except BundleError:
            raise
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error, NotImplementedError) as error:
            raise BundleError(f"{path}: cannot be read ({error})") from None

    def _verify(self, file: File) -> None:
        path = self.root / file.path
        try:
            if not path.is_file():  # a pipe would block
                raise BundleError(f"{path}: there is no such file; copy the bundle again")
            size = path.stat().st_size
            digest = sha256(path) if size == file.size_bytes else ""
        except OSError as error:
            raise BundleError(f"{path}: {error.strerror}; copy the bundle again") from None
        if digest != file.sha256:
            raise BundleError(
                f"{path}: differs from what the manifest records ({size} bytes, {file.size_bytes} recorded; "
                "sha256 mismatch): damaged or altered; copy the bundle again"
            )


def read_manifest(root: Path) -> Manifest:
    """Read and validate `manifest.json` of the bundle at `root`. Raises `BundleError` naming the problem."""
    path = root / MANIFEST
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise BundleError(f"{path}: {error.strerror}; is {root} a bundle?") from None
    try:
        fields = msgspec.json.decode(raw, type=dict[str, msgspec.Raw])
        version, needed = (_decode_field(fields, name) for name in ("schema", "min_agent_version"))
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise BundleError(f"{path}: not a manifest ({error})") from None
    if version != SCHEMA:
        raise BundleError(
            f"{path}: schema {version!r}; this agent ({__version__}) reads schema {SCHEMA}: "
            "update the agent or pack again"
        )
    if isinstance(needed, str) and version_numbers(needed) > version_numbers(__version__):
        raise BundleError(f"{path}: needs eyas {needed} or newer; this is {__version__}: update the agent")
    try:
        manifest = _decode_manifest(raw)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise BundleError(f"{path}: {error}") from None
    _validate(manifest, path)
    return manifest


def _decode_field(fields: Mapping[str, msgspec.Raw], name: str) -> object:
    return msgspec.json.decode(fields[name]) if name in fields else None


def _decode_manifest(raw: bytes) -> Manifest:
    """Decode a manifest; artefacts of tomorrow whose entries have another shape are left out."""
    try:
        return msgspec.json.decode(raw, type=Manifest)
    except msgspec.ValidationError:
        tree = msgspec.json.decode(raw)
        entries = tree.get("artefacts")
        if not isinstance(entries, list):
            raise
        tree["artefacts"] = [entry for entry in entries if not _is_of_tomorrow(entry)]
        return msgspec.convert(tree, Manifest)


def _is_of_tomorrow(entry: object) -> bool:
    """Whether an artefact's entry cannot be read and names a runtime or precision that this agent does not know."""
    try:
        msgspec.convert(entry, Artefact)
    except msgspec.ValidationError:
        if not isinstance(entry, dict):
            return False
        runtime, precision = entry.get("runtime"), entry.get("precision")
        if not (isinstance(runtime, str) and isinstance(precision, str)):
            return False
        return runtime not in _RUNTIMES or precision not in _PRECISIONS
    return False


def _validate(manifest: Manifest, path: Path) -> None:
    """Raise `BundleError` for values that the types allow but a bundle does not."""
    if len(manifest.labels) < 2 or len(set(manifest.labels)) != len(manifest.labels):
        raise BundleError(f"{path}: labels {manifest.labels}; two or more different ones are needed")
    if not 8 <= manifest.preprocessing.size <= 2048:
        raise BundleError(f"{path}: preprocessing.size {manifest.preprocessing.size}; 8 to 2048 is allowed")
    if not 0 < manifest.preprocessing.crop_fraction <= 1:
        raise BundleError(
            f"{path}: preprocessing.crop_fraction {manifest.preprocessing.crop_fraction}; above 0 to 1 is allowed"
        )
    confidence = manifest.confidence
    if not 0 < confidence.temperature < math.inf:
        raise BundleError(f"{path}: confidence.temperature {confidence.temperature}; it must be above 0")
    if confidence.bias and len(confidence.bias) != len(manifest.labels):
        raise BundleError(
            f"{path}: confidence.bias has {len(confidence.bias)} values; {len(manifest.labels)}, one for each label, "
            "or none are needed"
        )
    if not all(math.isfinite(bias) for bias in confidence.bias):
        raise BundleError(f"{path}: confidence.bias {confidence.bias}; finite values are needed")
    if not 0 <= confidence.threshold <= 1:
        raise BundleError(f"{path}: confidence.threshold {confidence.threshold}; 0 to 1 is allowed")
    if manifest.decision is not None and (problem := decision.find_problem(manifest.decision, manifest.labels)):
        raise BundleError(f"{path}: decision: {problem}")
    if not 0 <= manifest.golden_tolerance <= 1:
        raise BundleError(f"{path}: golden_tolerance {manifest.golden_tolerance}; 0 to 1 is allowed")
    if manifest.origin and re.fullmatch("[0-9a-f]{64}", manifest.origin) is None:
        raise BundleError(f"{path}: origin {manifest.origin!r}; the sha256 of a manifest is needed")
    names = [artefact.name for artefact in manifest.artefacts]
    if not names or len(set(names)) != len(names):
        raise BundleError(f"{path}: artefacts {names}; at least one is needed, each with its own name")
    for artefact in manifest.artefacts:
        if not artefact.files and artefact.known:
            raise BundleError(f"{path}: artefact {artefact.name!r} has no files")
    if not any(artefact.known for artefact in manifest.artefacts):
        kinds = ", ".join(f"{a.name} ({a.precision} for {a.runtime})" for a in manifest.artefacts)
        raise BundleError(f"{path}: this agent ({__version__}) knows none of its artefacts: {kinds}; update the agent")
    for runtime, name in manifest.use.items():
        if runtime in _RUNTIMES and not any(a.name == name and a.runtime == runtime for a in manifest.artefacts):
            raise BundleError(f"{path}: use.{runtime} is {name!r}, which is not a {runtime} artefact of this bundle")
    for file in manifest.files():
        pure = PurePosixPath(file.path)
        if pure.is_absolute() or ".." in pure.parts or not pure.parts or not file.path.isprintable():
            raise BundleError(f"{path}: file {file.path!r} is not a plain path inside the bundle")


def _with_predictions(golden: Golden, data: Mapping[str, npt.NDArray[Any]], path: Path) -> Golden:
    """Add the recorded settings, labels and uncertainty. Raises `BundleError` if they are malformed."""
    try:
        settings = msgspec.json.decode(data["settings"].tobytes(), type=PredictionSettings)
        labels = {name: tuple(map(str, data[f"label.{name}"].tolist())) for name in golden.probabilities}
        uncertain = {name: tuple(map(bool, data[f"uncertain.{name}"].tolist())) for name in golden.probabilities}
    except (msgspec.DecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise BundleError(f"{path}: malformed settings or predictions ({error}); pack the bundle again") from None
    if any(len(values) != len(golden.frames) for values in (*labels.values(), *uncertain.values())):
        raise BundleError(f"{path}: images and recorded predictions do not match; pack the bundle again")
    return msgspec.structs.replace(golden, labels=labels, uncertain=uncertain, settings=settings)


def sha256(path: Path) -> str:
    """Hex sha256 of a file, read in chunks."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
