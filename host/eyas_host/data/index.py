"""The index of a data set: hash, size and mode of every labelled image, and which files cannot be read."""

from __future__ import annotations

import hashlib
import io
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np
from PIL import Image

from eyas_device.errors import ImageError
from eyas_device.preprocess import Preprocessing
from eyas_host.data.duplicates import BITS, Hashes, perceptual_hash
from eyas_host.data.sources import Candidates, LabelledImage, list_images, subsample
from eyas_host.data.stored_values import StoredImageFile, StoredValues, check_bits, describe_values, examine
from eyas_host.recipe.data import DataSection
from eyas_host.support.errors import DataError
from eyas_host.support.machine import decoding_threads
from eyas_host.support.progress import meter

_READ_AHEAD = 256
"""Images submitted to the reading threads at a time."""
_SHOWN = 10
_KEPT_FIRST = {"": 0, "test": 0, "validation": 1, "train": 2}
"""Of copies in several given splits, the one in the split with the smallest number is kept."""


class FileInfo(msgspec.Struct, frozen=True):
    """Properties of an image file, without its pixels."""

    width: int
    """Pixels, as decoded (EXIF orientation applied)."""
    height: int
    mode: str
    """grey or colour, with `+alpha` where there is an alpha channel."""
    bits: int
    """Per channel, in the file; models see 8."""
    hash: bytes
    """Perceptual hash, 32 bytes."""
    values: StoredValues = StoredValues()
    """What it stores that is to be reported."""


class UnreadableImage(NamedTuple):
    """A file that is no whole image."""

    path: str
    why: str

    def __str__(self) -> str:
        return f"{self.path}: {self.why}"


class Index(msgspec.Struct, frozen=True):
    """All images of a data set, and the files that were left out."""

    images: tuple[LabelledImage, ...]
    labels: tuple[str, ...]
    unreadable: tuple[UnreadableImage, ...] = ()
    notices: tuple[str, ...] = ()
    left_out: Mapping[str, int] = {}
    """Reason -> files of the sources that are no images, or not meant as such."""
    files: dict[str, FileInfo] = {}
    """sha256 -> properties of the file."""
    remarks: tuple[str, ...] = ()
    """How the tables were read, what looks odd about the sources, and what the images store, a line a kind."""
    copies: tuple[tuple[LabelledImage, LabelledImage], ...] = ()
    """Exact copies that were dropped, each with the image that replaces it."""

    def counts(self) -> Counter[str]:
        """Images per label."""
        return Counter(p.label for p in self.images)

    def hashes(self, images: Sequence[LabelledImage]) -> Hashes:
        """Perceptual hashes of some of the images, uint8 [n, 32]."""
        joined = b"".join(self.files[image.sha256].hash for image in images)
        return np.frombuffer(joined, dtype=np.uint8).reshape(len(images), BITS // 8)


class ReadImages(NamedTuple):
    """The images of the sources as they were read, copies included."""

    candidates: Candidates
    images: list[LabelledImage]
    files: dict[str, FileInfo]
    """sha256 -> properties of the file."""
    unreadable: list[UnreadableImage]


def build_index(data: DataSection, bits: int = 0) -> Index:
    """List and read every image of `data`; no pixels are kept.

    `bits` is `[image] bits`. Raises `DataError` for an unusable source, fewer than two classes, an empty class, the
    same image under two labels, 16-bit images that do not use those bits, or unreadable images (unless
    `skip_unreadable`); `MissingExtra` without the demonstration set.
    """
    read = read_images(data, bits)
    unreadable = read.unreadable
    if unreadable and not data.skip_unreadable:
        shown = "\n".join(f"  {line}" for line in unreadable[:_SHOWN])
        more = f"\n  and {len(unreadable) - _SHOWN} more" if len(unreadable) > _SHOWN else ""
        raise DataError(
            f"{len(unreadable)} unreadable image{'s' * (len(unreadable) > 1)}; fix or remove them, or set "
            f"[data] skip_unreadable = true\n{shown}{more}"
        )
    found = read.candidates
    kept, copies, remarks = _unique(read.images, found.origins)
    stored = [(image.path, read.files[image.sha256]) for image in kept]
    values = [StoredImageFile(path, file.width, file.height, file.values) for path, file in stored]
    check_bits(values, bits)
    index = Index(
        images=kept,
        labels=tuple(sorted({p.label for p in found.images})),
        unreadable=tuple(unreadable),
        notices=found.notices,
        left_out=found.left_out,
        files=read.files,
        remarks=(*found.remarks, *remarks, *describe_values(values, bits)),
        copies=copies,
    )
    counts = index.counts()
    for label in index.labels:
        if not counts[label]:
            raise DataError(f"class {label!r} has no readable image; add some or remove its folder")
    return index


def read_images(data: DataSection, bits: int = 0) -> ReadImages:
    """List and read every image of `data`, also copies and what cannot be read. Raises `DataError` as `list_images`."""
    candidates = list_images(data)
    if data.limit:
        candidates = candidates._replace(images=subsample(candidates.images, data.limit))
    read = ReadImages(candidates, [], {}, [])
    with meter("reading images", len(candidates.images)) as bar:
        for result in _read_all(candidates.images, bits):
            if isinstance(result, UnreadableImage):
                read.unreadable.append(result)
            else:
                image, file = result
                read.images.append(image)
                read.files[image.sha256] = file
            bar.advance()
    return read


def _read_all(images: Sequence[LabelledImage], bits: int) -> Iterator[tuple[LabelledImage, FileInfo] | UnreadableImage]:
    """Each image with its hash and file properties, or why it cannot be read, in order; decoded on all usable cores."""
    spec = Preprocessing(size=1, bits=bits or 16)  # decoded in full: the size plays no part
    with ThreadPoolExecutor(decoding_threads()) as pool:
        for start in range(0, len(images), _READ_AHEAD):
            yield from pool.map(lambda image: _read(image, spec), images[start : start + _READ_AHEAD])


def _read(image: LabelledImage, spec: Preprocessing) -> tuple[LabelledImage, FileInfo] | UnreadableImage:
    try:
        data = Path(image.path).read_bytes()
        pixels, values = examine(data, spec, where=image.path)
    except ImageError as error:
        return UnreadableImage(image.path, str(error).removeprefix(f"{image.path}: "))
    except OSError as error:
        return UnreadableImage(image.path, f"cannot be read ({error.strerror})")
    mode, bits = _mode(data)
    file = FileInfo(pixels.shape[1], pixels.shape[0], mode, bits, perceptual_hash(pixels), values)
    return msgspec.structs.replace(image, sha256=hashlib.sha256(data).hexdigest()), file


def _mode(data: bytes) -> tuple[str, int]:
    """Mode and bits per channel from the file's header; `unknown` if only OpenCV knows the format."""
    if data.startswith(b"\x89PNG"):  # the first chunk holds bit depth and colour type: ISO/IEC 15948, 11.2.2
        depth, kind = data[24], data[25]
        mode = "grey" if kind in (0, 4) else "colour"
        return mode + ("+alpha" if kind in (4, 6) else ""), 8 if kind == 3 else depth
    try:
        with Image.open(io.BytesIO(data)) as image:
            mode = image.mode
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return "unknown", 8
    alpha = "+alpha" if mode in ("LA", "La", "PA", "RGBA", "RGBa") else ""
    grey = mode in ("1", "L", "LA", "La", "F") or mode.startswith("I")
    return ("grey" if grey else "colour") + alpha, {"1": 1, "I": 32, "F": 32}.get(mode, 16 if "16" in mode else 8)


def _unique(
    images: Sequence[LabelledImage], origins: Mapping[tuple[str, str], str]
) -> tuple[tuple[LabelledImage, ...], tuple[tuple[LabelledImage, LabelledImage], ...], list[str]]:
    """One image per hash, the exact copies of each, and remarks about copies in two splits or groups.

    The earliest copy is kept, so that a split by time cannot put a copy of the past into the future. Raises `DataError`
    for the same bytes under two labels, with all that the copies contradict.
    """
    kept: dict[str, LabelledImage] = {}
    copies, contradictions = [], []
    for image in sorted(images, key=lambda image: _KEPT_FIRST[image.split]):
        first = kept.setdefault(image.sha256, image)
        if first is image:
            continue
        if first.label != image.label:
            contradictions.append(f"{_named(first, origins)} and {_named(image, origins)}")
            continue
        if image.time is not None and (first.time is None or image.time < first.time):
            kept[image.sha256], image, first = image, first, image
        copies.append((image, first))
    remarks = list(_copy_remarks(copies))
    if not contradictions:
        return tuple(kept.values()), tuple(copies), remarks
    further = "".join(f"\nand {line}" for line in remarks)
    if len(contradictions) == 1:
        raise DataError(
            f"the same image has two labels: {contradictions[0]}; remove the wrong one (eyas labels check "
            f"RECIPE shows the two){further}"
        )
    shown = "".join(f"\n  {line}" for line in contradictions[:_SHOWN])
    more = f"\n  and {len(contradictions) - _SHOWN} more" if len(contradictions) > _SHOWN else ""
    raise DataError(
        f"{len(contradictions)} images have two labels; remove the wrong copy of each (eyas labels check RECIPE shows "
        f"them side by side){shown}{more}{further}"
    )


def _named(image: LabelledImage, origins: Mapping[tuple[str, str], str]) -> str:
    """`a.png (ring)`, with the table and line if one names it."""
    origin = origins.get((image.path, image.label))
    return f"{image.path} ({image.label}{f', {origin}' if origin else ''})"


def _copy_remarks(copies: Sequence[tuple[LabelledImage, LabelledImage]]) -> Iterator[str]:
    """What exact copies contradict besides labels, a line a kind with the count and an example."""
    twice = [copy for copy, first in copies if copy.path == first.path]
    if twice:
        yield f"{_are(len(twice), 'file')} named twice, e.g. {twice[0].path}: taken once"
    splits = [(copy, first) for copy, first in copies if copy.split != first.split]
    if splits:
        copy, first = splits[0]
        yield (
            f"{len(splits)} image{' lies' if len(splits) == 1 else 's lie'} in two splits, e.g. {first.path} and "
            f"{copy.path}: kept in test, else in validation, so that no copy is trained on"
        )
    groups = [(copy, first) for copy, first in copies if copy.group and first.group and copy.group != first.group]
    if groups:
        copy, first = groups[0]
        yield (
            f"{_are(len(groups), 'image')} in two groups, e.g. {first.path} in {first.group!r} and {copy.group!r}: by "
            "group, the two count as one"
        )


def _are(number: int, noun: str) -> str:
    return f"{number} {noun} is" if number == 1 else f"{number} {noun}s are"
