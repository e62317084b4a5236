"""Near-duplicates: the same image stored twice, re-encoded, resized, or taken again a moment later.

An image's perceptual hash is the signs of its 255 lowest cosine frequencies after the mean. Re-encoding, resizing and
light change a few of them, other images about half (source of the idea: Zauner, "Implementation and benchmarking of
perceptual image hash functions", 2010).
"""

from __future__ import annotations

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
_PENDING = 1 << 20


def perceptual_hash(pixels: Pixels) -> bytes:
    """32 bytes: the signs of the 16 x 16 lowest frequencies (0 for the mean) of the image, grey, shrunk to 64 x 64.

    `pixels` are uint8 [h, w, 3] BGR.
    """
    grey = cv2.cvtColor(pixels, cv2.COLOR_BGR2GRAY)
    small = cv2.resize(grey, (_SIDE, _SIDE), interpolation=cv2.INTER_AREA).astype(np.float32)
    low = cv2.dct(small)[:_LOW, :_LOW].ravel()
    low[0] = 0.0
    return np.packbits(low > 1e-3 * _SIDE).tobytes()


def cluster_hashes(hashes: Hashes, most: int) -> Ints:
    """Cluster number [n] of each hash; two that differ in at most `most` bits, or a chain of such, share one.

    No pair is missed: of `most` + 1 bands of bits, two hashes that near are equal in at least one, so only images
    that share a band are compared. Memory grows with n, not with the pairs.
    """
    if len(hashes) < 2:
        return np.arange(len(hashes))
    unique, back = np.unique(hashes, axis=0, return_inverse=True)
    forest = _Forest(len(unique))
    words = np.ascontiguousarray(unique).view(np.uint64)
    bits = np.unpackbits(unique, axis=1)
    for band in range(most + 1):
        keys = np.unique(np.packbits(bits[:, band :: most + 1], axis=1), axis=0, return_inverse=True)[1].ravel()
        order = np.argsort(keys, kind="stable")
        keys = keys[order]
        left = np.arange(len(order))
        for offset in range(1, len(order)):
            left = left[left + offset < len(order)]
            left = left[keys[left] == keys[left + offset]]
            if offset & (offset - 1) == 0:
                left = left[_undecided(keys, forest.settled()[order])[left]]
            if not len(left):
                break
            one, two = order[left], order[left + offset]
            near = np.bitwise_count(words[one] ^ words[two]).sum(axis=1) <= most
            forest.join(one[near], two[near])
    return forest.settled()[back.ravel()]


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
    """Number of the connected component of each of `count` things, of which `one[i]` and `two[i]` are linked."""
    from scipy.sparse import coo_matrix  # half a second that a verb's help need not wait for
    from scipy.sparse.csgraph import connected_components

    graph = coo_matrix((np.ones(len(one), dtype=bool), (one, two)), shape=(count, count))
    return np.asarray(connected_components(graph, directed=False)[1], dtype=np.int64)


def _undecided(keys: Ints, clusters: Ints) -> npt.NDArray[np.bool_]:
    """Which of the sorted `keys` stand for more than one cluster still; the others need no comparison."""
    starts = np.flatnonzero(np.diff(keys, prepend=-1))
    mixed = np.minimum.reduceat(clusters, starts) != np.maximum.reduceat(clusters, starts)
    return np.asarray(np.repeat(mixed, np.diff(starts, append=len(keys))))


class _Forest:
    """Clusters that grow by joined pairs."""

    def __init__(self, count: int) -> None:
        self.clusters = np.arange(count)
        self._pairs: list[tuple[Ints, Ints]] = []
        self._waiting = 0

    def join(self, one: Ints, two: Ints) -> None:
        """The clusters of `one[i]` and `two[i]` become one."""
        self._pairs.append((one, two))
        self._waiting += len(one)
        if self._waiting > _PENDING:
            self.settled()

    def settled(self) -> Ints:
        """Cluster number of each, all joins done."""
        if self._waiting:
            one, two = (self.clusters[np.concatenate(side)] for side in zip(*self._pairs, strict=True))
            self.clusters = components(len(self.clusters), one, two)[self.clusters]
        self._pairs, self._waiting = [], 0
        return self.clusters
