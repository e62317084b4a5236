"""Near-duplicates: the same image stored twice, re-encoded, resized, or taken again a moment later.

The perceptual hash of an image is the signs of its 255 lowest DCT coefficients without the mean. Re-encoding, resizing
and lighting flip a few of them, different images differ in about half (Zauner, "Implementation and benchmarking of
perceptual image hash functions", 2010).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

from eyas_device.preprocess import Pixels

Ints = npt.NDArray[np.int64]
Hashes = npt.NDArray[np.uint8]
"""Perceptual hashes: uint8 [n, 32], 256 bits each."""

_SIDE = 64
_LOW = 16
BITS = _LOW * _LOW
_MAX_PENDING = 1 << 20
_MAX_PAIRWISE = 256
"""Hashes of which all pairs are compared."""


def perceptual_hash(pixels: Pixels) -> bytes:
    """Perceptual hash, 32 bytes, of uint8 [h, w, 3] BGR `pixels`.

    The signs of the 16 x 16 lowest DCT coefficients (0 for the mean) of the image in grey at 64 x 64 pixels.
    """
    grey = cv2.cvtColor(pixels, cv2.COLOR_BGR2GRAY)
    small = cv2.resize(grey, (_SIDE, _SIDE), interpolation=cv2.INTER_AREA).astype(np.float32)
    low = cv2.dct(small)[:_LOW, :_LOW].ravel()
    low[0] = 0.0
    return np.packbits(low > 1e-3 * _SIDE).tobytes()


def cluster_hashes(hashes: Hashes, max_bits: int) -> Ints:
    """Cluster index [n] of each hash uint8 [n, 32]: near-duplicates, without chaining.

    Hashes within a Hamming distance of `max_bits` are linked. Linked hashes are one cluster while each lies within
    2 x `max_bits` of a representative; a longer chain is divided into such clusters, so that two linked hashes at the
    border of a divided chain may be in different clusters.
    """
    unique, back = np.unique(hashes, axis=0, return_inverse=True)
    clusters = link_hashes(unique, max_bits)
    sizes = np.bincount(clusters, minlength=1)
    rows = np.flatnonzero(sizes[clusters] > 2)  # hardly any: a list with an array for each cluster would be long
    rows = rows[np.argsort(clusters[rows], kind="stable")]
    starts = np.flatnonzero(np.diff(clusters[rows], prepend=-1))
    count = len(sizes)
    for linked in np.split(rows, starts[1:]) if len(rows) else ():
        for cluster in _compact(unique, linked, 2 * max_bits):
            clusters[cluster] = count
            count += 1
    return clusters[back.ravel()]


def link_hashes(unique: Hashes, max_bits: int) -> Ints:
    """Component index [n] of each of the different hashes, linked transitively by distances of at most `max_bits`.

    No link is missed: of `max_bits` + 1 bands of bits, two such hashes agree in at least one, so only hashes that share
    a band are compared, most of them by their first 64 bits. Memory grows with n, not with the number of pairs.
    """
    if len(unique) < 2 or not max_bits:
        return np.arange(len(unique))
    clusters = _Clusters(len(unique))
    words = np.ascontiguousarray(unique).view(np.uint64)
    bits = np.unpackbits(unique, axis=1)
    for band in range(max_bits + 1):
        keys = _band_keys(bits[:, band :: max_bits + 1])
        order = np.argsort(keys, kind="stable")
        keys, first_words = keys[order], words[order, 0]
        left = np.arange(len(order))
        for offset in range(1, len(order)):
            left = left[: np.searchsorted(left, len(order) - offset)]
            left = left[keys[left] == keys[left + offset]]
            if offset & (offset - 1) == 0:
                left = left[_undecided(keys, clusters.labels()[order])[left]]
            if not len(left):
                break
            likely = left[np.bitwise_count(first_words[left] ^ first_words[left + offset]) <= max_bits]
            one, two = order[likely], order[likely + offset]
            near = np.bitwise_count(words[one] ^ words[two]).sum(axis=1) <= max_bits
            clusters.merge(one[near], two[near])
    return clusters.labels().copy()


def _band_keys(bits: Hashes) -> npt.NDArray[Any]:
    """Keys [n] that are equal where rows of uint8 `bits` [n, width] of 0 and 1 are; short ones sort fastest."""
    packed = np.packbits(bits, axis=1)
    if packed.shape[1] > 8:
        return np.asarray(np.unique(packed, axis=0, return_inverse=True)[1].ravel())
    size = next(size for size in (1, 2, 4, 8) if packed.shape[1] <= size)
    padded = np.zeros((len(packed), size), dtype=np.uint8)
    padded[:, : packed.shape[1]] = packed
    return padded.view(f"u{size}").ravel()


def _compact(hashes: Hashes, rows: Ints, radius: int) -> Iterator[Ints]:
    """Divide linked `rows` of `hashes` into clusters whose members lie within `radius` bits of a representative.

    The first representative is the hash nearest to the majority of each bit, the next one the nearest of the rest; of
    few rows it is the one from which the farthest is nearest.
    """
    words = np.ascontiguousarray(hashes[rows]).view(np.uint64)
    if len(rows) > _MAX_PAIRWISE:
        majority = np.packbits(np.unpackbits(hashes[rows], axis=1).mean(axis=0) > 0.5).view(np.uint64)
        order = np.argsort(np.bitwise_count(words ^ majority).sum(axis=1), kind="stable")
        rows, words = rows[order], words[order]
    while len(rows):
        first = 0
        if 2 < len(rows) <= _MAX_PAIRWISE:
            first = int(np.bitwise_count(words[:, None] ^ words[None]).sum(axis=2).max(axis=1).argmin())
        near = np.bitwise_count(words ^ words[first]).sum(axis=1) <= radius
        yield rows[near]
        rows, words = rows[~near], words[~near]


def nearest_hashes(hashes: Hashes, others: Hashes) -> tuple[Ints, Ints]:
    """Index [n] of the nearest of `others` to each hash, and the bits [n] in which the two differ.

    Without `others` every distance is `BITS`.
    """
    nearest, distances = np.zeros(len(hashes), dtype=np.int64), np.full(len(hashes), BITS, dtype=np.int64)
    words = np.ascontiguousarray(others).view(np.uint64)
    for row, own in enumerate(np.ascontiguousarray(hashes).view(np.uint64) if len(others) else ()):
        bits = np.bitwise_count(words ^ own).sum(axis=1)
        nearest[row] = bits.argmin()
        distances[row] = bits[nearest[row]]
    return nearest, distances


def components(count: int, one: Ints, two: Ints) -> Ints:
    """Connected component of each of `count` nodes, with an edge between `one[i]` and `two[i]`."""
    from scipy.sparse import coo_matrix  # takes half a second to import
    from scipy.sparse.csgraph import connected_components

    graph = coo_matrix((np.ones(len(one), dtype=bool), (one, two)), shape=(count, count))
    return np.asarray(connected_components(graph, directed=False)[1], dtype=np.int64)


def _undecided(keys: npt.NDArray[Any], clusters: Ints) -> npt.NDArray[np.bool_]:
    """Which of the sorted `keys` still cover more than one cluster; the others need no comparison."""
    starts = np.flatnonzero(np.concatenate([[True], keys[1:] != keys[:-1]]))
    mixed = np.minimum.reduceat(clusters, starts) != np.maximum.reduceat(clusters, starts)
    return np.asarray(np.repeat(mixed, np.diff(starts, append=len(keys))))


class _Clusters:
    """Union-find over `count` hashes that merges pairs in batches."""

    def __init__(self, count: int) -> None:
        self._labels = np.arange(count)
        self._pairs: list[tuple[Ints, Ints]] = []
        self._pending = 0

    def merge(self, one: Ints, two: Ints) -> None:
        """Merge the clusters of `one[i]` and `two[i]`."""
        self._pairs.append((one, two))
        self._pending += len(one)
        if self._pending > _MAX_PENDING:
            self.labels()

    def labels(self) -> Ints:
        """Cluster index of each hash, with all merges applied."""
        if self._pending:
            one, two = (self._labels[np.concatenate(side)] for side in zip(*self._pairs, strict=True))
            self._labels = components(len(self._labels), one, two)[self._labels]
        self._pairs, self._pending = [], 0
        return self._labels
