"""Pairs of images that look alike and have different labels: one of the two is probably wrong."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import msgspec
import numpy as np

from eyas_host.data.duplicates import BITS, Hashes, Ints, link_hashes
from eyas_host.data.file_info import FileInfo
from eyas_host.data.sources import LabelledImage


class LabelPair(msgspec.Struct, frozen=True):
    """Two images of different labels that look alike."""

    one: LabelledImage
    two: LabelledImage
    bits: int
    """Bits, of 256, in which their perceptual hashes differ."""

    @property
    def identical(self) -> bool:
        """Whether they are the same file, byte by byte."""
        return self.one.sha256 == self.two.sha256


def find_label_pairs(
    images: Sequence[LabelledImage], files: Mapping[str, FileInfo], max_bits: int
) -> tuple[LabelPair, ...]:
    """Each image with the nearest one of another label, if that differs in at most `max_bits` of 256 bits.

    Identical files come first, then by distance and path; a pair comes once. `files` has the hash of each image.
    """
    if not images:
        return ()
    joined = b"".join(files[image.sha256].hash for image in images)
    hashes = np.frombuffer(joined, dtype=np.uint8).reshape(len(images), BITS // 8)
    labels = np.unique([image.label for image in images], return_inverse=True)[1].ravel()
    files_of = np.unique([image.sha256 for image in images], return_inverse=True)[1].ravel()
    pairs: dict[tuple[int, int], int] = {}
    for rows in _mixed(hashes, labels, max_bits):
        words = np.ascontiguousarray(hashes[rows]).view(np.uint64)
        for row, own in zip(rows, words, strict=True):
            distances = np.bitwise_count(words ^ own).sum(axis=1).astype(np.int64)
            # half a bit for another file: of images with the same hash, the identical one is nearer
            ranks = 2 * distances + (files_of[rows] != files_of[row])
            ranks[labels[rows] == labels[row]] = 2 * BITS + 2
            nearest = int(ranks.argmin())
            if distances[nearest] <= max_bits and ranks[nearest] <= 2 * BITS + 1:
                other = int(rows[nearest])
                pairs[min(int(row), other), max(int(row), other)] = int(distances[nearest])
    found = [LabelPair(images[one], images[two], bits) for (one, two), bits in pairs.items()]
    return tuple(sorted(found, key=lambda pair: (not pair.identical, pair.bits, pair.one.path, pair.two.path)))


def _mixed(hashes: Hashes, labels: Ints, max_bits: int) -> Iterator[Ints]:
    """Rows of each component of linked hashes that has more than one label."""
    unique, back = np.unique(hashes, axis=0, return_inverse=True)
    components = link_hashes(unique, max_bits)[back.ravel()]
    order = np.argsort(components, kind="stable")
    for rows in np.split(order, np.flatnonzero(np.diff(components[order])) + 1):
        if len(np.unique(labels[rows])) > 1:
            yield rows
