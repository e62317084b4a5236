"""The images of one split in a fixed order, decoded on access."""

from __future__ import annotations

import hashlib
import mmap
import multiprocessing
from collections.abc import Iterable, Iterator, Sequence
from typing import overload

import numpy as np
import numpy.typing as npt

from eyas_device.preprocess import Pixels, Preprocessing, decode
from eyas_host.data.image_bytes import read_image_bytes
from eyas_host.data.sources import LabelledImage
from eyas_host.support.errors import DataError

MAX_CACHED_BYTES = 512 << 20
"""Maximum size of the decoded images that a data set keeps in memory; the others are decoded on each access."""
_WORTHWHILE = 0.5
"""Fraction of the images that must fit: of 1,000 images of 12 megapixels the cache would save a hundredth."""


class DecodedImages(Sequence[Pixels]):
    """Images uint8 [h, w, 3] in their own sizes, decoded as the device decodes them for `spec`.

    The first images that fit into `MAX_CACHED_BYTES` stay in memory, if about half of them fit: an epoch reads all
    images once, so a least-recently-used cache would never hit.
    """

    def __init__(self, images: Sequence[LabelledImage], spec: Preprocessing | None) -> None:
        self._images = images
        self._spec = spec
        self._cache: _SharedCache | None = None

    def __len__(self) -> int:
        return len(self._images)

    @overload
    def __getitem__(self, index: int) -> Pixels: ...
    @overload
    def __getitem__(self, index: slice) -> SomeImages: ...

    def __getitem__(self, index: int | slice) -> Pixels | SomeImages:
        """Decode an image, or choose some that are decoded on access.

        Raises `DataError` if a file changed since the split was made.
        """
        if isinstance(index, slice):
            return self.rows(range(*index.indices(len(self))))
        number = range(len(self))[index]
        cache = self.open_cache()
        pixels = cache.get(number)
        if pixels is None:
            pixels = _read(self._images[number], self._spec)
            cache.put(number, pixels)
        return pixels

    def rows(self, rows: Iterable[int]) -> SomeImages:
        """Some of the images, still decoded on access: no more than one need be in memory."""
        return SomeImages(self, [int(row) for row in rows])

    def __iter__(self) -> Iterator[Pixels]:
        """Each image once, in order; a single pass keeps none of them. Raises `DataError` as access by index does."""
        for number, image in enumerate(self._images):
            pixels = self._cache.get(number) if self._cache is not None else None
            yield _read(image, self._spec) if pixels is None else pixels

    def open_cache(self) -> _SharedCache:
        """Create the cache of decoded images; processes forked afterwards share it."""
        if self._cache is None:
            self._cache = _SharedCache(len(self), MAX_CACHED_BYTES)
        return self._cache


class SomeImages(Sequence[Pixels]):
    """Chosen rows of `DecodedImages`."""

    def __init__(self, images: DecodedImages, rows: list[int]) -> None:
        self._images = images
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> Pixels: ...
    @overload
    def __getitem__(self, index: slice) -> SomeImages: ...

    def __getitem__(self, index: int | slice) -> Pixels | SomeImages:
        """Decode an image, or choose some of these."""
        if isinstance(index, slice):
            return SomeImages(self._images, self._rows[index])
        return self._images[self._rows[index]]


class ImageDataset:
    """The images of one split with their class indices, in a fixed order.

    `units`, int64 [n], numbers the images' groups or near-duplicate clusters: images of one unit are not independent.
    Without it every image is a unit of its own.
    """

    def __init__(
        self,
        images: Sequence[LabelledImage],
        labels: Sequence[str],
        spec: Preprocessing | None = None,
        units: npt.NDArray[np.int64] | None = None,
    ) -> None:
        self.spec = spec
        self.images = tuple(images)
        self.labels = tuple(labels)
        class_of = {label: index for index, label in enumerate(labels)}
        self.targets = np.array([class_of[p.label] for p in images], dtype=np.int64)
        self.units = np.arange(len(self.images), dtype=np.int64) if units is None else units
        self.pixels = DecodedImages(self.images, spec)

    def __len__(self) -> int:
        return len(self.images)

    def release(self) -> None:
        """Free the decoded images; they are decoded again on access."""
        self.pixels = DecodedImages(self.images, self.spec)


class _SharedCache:
    """Arrays uint8 [h, w, 3] in memory shared with forked processes; pages are allocated as they are filled.

    `put` stores each index once and only while there is space, and nothing if images like the first one would fill it
    before half of them are stored. Every process may put and get.
    """

    def __init__(self, count: int, capacity: int) -> None:
        self._count, self._capacity = count, capacity
        self._pixels = mmap.mmap(-1, max(capacity, mmap.PAGESIZE))
        memory = mmap.mmap(-1, max(4 * 8 * (count + 1), mmap.PAGESIZE))
        self._table = np.frombuffer(memory, dtype=np.int64, count=4 * (count + 1)).reshape(count + 1, 4)
        """Row i: start, height, width of image i and whether it is stored; last row: start of the free space."""
        self._lock = multiprocessing.get_context("fork").Lock()

    def get(self, number: int) -> Pixels | None:
        with self._lock:
            start, height, width, stored = self._table[number].tolist()
        if not stored:
            return None
        size = height * width * 3
        return np.frombuffer(self._pixels, dtype=np.uint8, count=size, offset=start).reshape(height, width, 3)

    def put(self, number: int, pixels: Pixels) -> None:
        with self._lock:
            start = int(self._table[-1, 0])
            if not start and self._count * pixels.nbytes * _WORTHWHILE > self._capacity:
                return
            if self._table[number, 3] or start + pixels.nbytes > self._capacity:
                return
            end = start + pixels.nbytes
            np.frombuffer(self._pixels, dtype=np.uint8, count=pixels.nbytes, offset=start)[:] = pixels.ravel()
            self._table[-1, 0] = end
            self._table[number] = start, *pixels.shape[:2], 1


def _read(image: LabelledImage, spec: Preprocessing | None) -> Pixels:
    try:
        data = read_image_bytes(image.path)
    except OSError:
        data = b""
    if hashlib.sha256(data).hexdigest() != image.sha256:
        raise DataError(f"{image.path}: missing or changed since the split was made; run again with --from split")
    return decode(data, spec=spec, where=image.path)
