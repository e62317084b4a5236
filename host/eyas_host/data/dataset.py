"""One part of a split: images in a fixed order, decoded when they are asked for."""

from __future__ import annotations

import hashlib
import mmap
import multiprocessing
from collections.abc import Sequence
from pathlib import Path
from typing import overload

import numpy as np

from eyas_device.preprocess import Pixels, Preprocessing, decode
from eyas_host.data.sources import LabelledImage
from eyas_host.support.errors import DataError

KEPT_BYTES = 512 << 20
"""Decoded images that one part keeps at most; the others are read again each time."""


class Decoded(Sequence[Pixels]):
    """Images by number, uint8 [h, w, 3] in their own sizes, as the device would decode them for the model of `spec`.

    The first ones that fit into `KEPT_BYTES` stay in memory: a training epoch asks for all of them in turn, where
    keeping the last ones would keep none.
    """

    def __init__(self, images: Sequence[LabelledImage], spec: Preprocessing | None) -> None:
        self._images = images
        self._spec = spec
        self._shelf: _Shelf | None = None

    def __len__(self) -> int:
        return len(self._images)

    @overload
    def __getitem__(self, place: int) -> Pixels: ...
    @overload
    def __getitem__(self, place: slice) -> list[Pixels]: ...

    def __getitem__(self, place: int | slice) -> Pixels | list[Pixels]:
        """Raises `DataError` if a file changed since the split was made."""
        if isinstance(place, slice):
            return [self[number] for number in range(*place.indices(len(self)))]
        number = range(len(self))[place]
        shelf = self.share()
        pixels = shelf.get(number)
        if pixels is None:
            pixels = _read(self._images[number], self._spec)
            shelf.put(number, pixels)
        return pixels

    def share(self) -> _Shelf:
        """Set up what is kept; done before a fork, it is shared with the processes that are forked."""
        if self._shelf is None:
            self._shelf = _Shelf(len(self), KEPT_BYTES)
        return self._shelf


class ImageDataset:
    """The images of one part, in a fixed order."""

    def __init__(
        self, images: Sequence[LabelledImage], labels: Sequence[str], spec: Preprocessing | None = None
    ) -> None:
        self.spec = spec
        self.images = tuple(images)
        self.labels = tuple(labels)
        place = {label: number for number, label in enumerate(labels)}
        self.targets = np.array([place[p.label] for p in images], dtype=np.int64)
        self.pixels = Decoded(self.images, spec)

    def __len__(self) -> int:
        return len(self.images)

    def forget(self) -> None:
        """Let go of the decoded images; they are read again when needed."""
        self.pixels = Decoded(self.images, self.spec)


class _Shelf:
    """Some arrays uint8 [h, w, 3] in memory that is shared with forked processes; pages are taken as they are filled.

    `put` takes each number once and only while there is room. Any of the processes may put and get.
    """

    def __init__(self, count: int, room: int) -> None:
        self._room = room
        self._pixels = mmap.mmap(-1, max(room, mmap.PAGESIZE))
        table = mmap.mmap(-1, max(4 * 8 * (count + 1), mmap.PAGESIZE))
        self._places = np.frombuffer(table, dtype=np.int64, count=4 * (count + 1)).reshape(count + 1, 4)
        """A number's start, height, width and whether it is there; the last row: the start of what is free."""
        self._lock = multiprocessing.get_context("fork").Lock()

    def get(self, number: int) -> Pixels | None:
        with self._lock:
            start, height, width, there = self._places[number].tolist()
        if not there:
            return None
        size = height * width * 3
        return np.frombuffer(self._pixels, dtype=np.uint8, count=size, offset=start).reshape(height, width, 3)

    def put(self, number: int, pixels: Pixels) -> None:
        with self._lock:
            start = int(self._places[-1, 0])
            if self._places[number, 3] or start + pixels.nbytes > self._room:
                return
            end = start + pixels.nbytes
            np.frombuffer(self._pixels, dtype=np.uint8, count=pixels.nbytes, offset=start)[:] = pixels.ravel()
            self._places[-1, 0] = end
            self._places[number] = start, *pixels.shape[:2], 1


def _read(image: LabelledImage, spec: Preprocessing | None) -> Pixels:
    try:
        data = Path(image.path).read_bytes()
    except OSError:
        data = b""
    if hashlib.sha256(data).hexdigest() != image.sha256:
        raise DataError(f"{image.path}: missing or changed since the split was made; run again with --from split")
    return decode(data, spec=spec, where=image.path)
