"""The index of a data set: hash, size and mode of every labelled image, and which files cannot be read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import msgspec
import numpy as np

from eyas_host.data.duplicates import BITS, Hashes
from eyas_host.data.file_info import FileInfo, UnreadableImage, read_file_infos
from eyas_host.data.shards import check_unchanged
from eyas_host.data.sources import Candidates, LabelledImage, list_images, subsample
from eyas_host.data.stored_values import StoredImageFile, check_bits, describe_values
from eyas_host.recipe.data import DataSection
from eyas_host.support.errors import DataError
from eyas_host.support.progress import meter

_SHOWN = 10
_KEPT_FIRST = {"": 0, "test": 0, "validation": 1, "train": 2}
"""Of copies in several given splits, the one in the split with the smallest number is kept."""


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
    kept, copies, remarks = _unique(read.images, found.origins, found.source_of)
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
        results = read_file_infos([image.path for image in candidates.images], bits)
        for image, result in zip(candidates.images, results, strict=True):
            if isinstance(result, UnreadableImage):
                read.unreadable.append(result)
            else:
                sha256, read.files[sha256] = result
                read.images.append(msgspec.structs.replace(image, sha256=sha256))
            bar.advance()
    check_unchanged(candidates.stamps)
    return read


def _unique(
    images: Sequence[LabelledImage], origins: Mapping[tuple[str, str], str], source_of: Mapping[tuple[str, str], int]
) -> tuple[tuple[LabelledImage, ...], tuple[tuple[LabelledImage, LabelledImage], ...], list[str]]:
    """One image per hash, the exact copies of each, and remarks about copies in two splits or groups.

    The earliest copy is kept, so that a split by time cannot put a copy of the past into the future. Raises `DataError`
    for the same bytes under two labels, with all that the copies contradict, unless a later source corrects an earlier
    one by `source_of`.
    """
    kept: dict[str, LabelledImage] = {}
    copies, contradictions = [], []
    corrected: dict[str, str] = {}
    for image in sorted(images, key=lambda image: _KEPT_FIRST[image.split]):
        first = kept.setdefault(image.sha256, image)
        if first is image:
            continue
        sources = [source_of.get((one.path, one.label), 0) for one in (first, image)]
        if first.label != image.label and sources[0] != sources[1]:
            later, earlier = (first, image) if sources[0] > sources[1] else (image, first)
            kept[image.sha256] = later
            if earlier.path != later.path:
                copies.append((earlier, later))  # their groups are linked, as those of any copy
            corrected[image.sha256] = f"{_named(earlier, origins)} by {_named(later, origins)}"
            continue
        if first.label != image.label:
            contradictions.append(f"{_named(first, origins)} and {_named(image, origins)}")
            continue
        if image.time is not None and (first.time is None or image.time < first.time):
            kept[image.sha256], image, first = image, first, image
        copies.append((image, first))
    remarks = list(_copy_remarks(copies))
    if not contradictions:
        if corrected:
            example = next(iter(corrected.values()))
            remarks.append(f"{_are(len(corrected), 'image')} corrected by a later source, e.g. {example}")
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
