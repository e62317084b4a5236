"""One part of a split: pictures in a fixed order, decoded when they are asked for."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import overload

import numpy as np

from eyas_device.preprocess import Pixels, Preprocessing, decode
from eyas_host.data.sources import Picture
from eyas_host.errors import DataError

KEPT_BYTES = 512 << 20
"""Decoded pictures that one part keeps at most; the others are read again each time."""


class Decoded(Sequence[Pixels]):
    """Pictures by number, uint8 [h, w, 3] in their own sizes, as the device would decode them for the model of `spec`.

    The first ones that fit into `room` bytes stay in memory: a training epoch asks for all of them in turn, where
    keeping the last ones would keep none.
    """

    def __init__(self, pictures: Sequence[Picture], spec: Preprocessing | None, room: int = KEPT_BYTES) -> None:
        self._pictures = pictures
        self._spec = spec
        self._room = room
        self._kept: dict[int, Pixels] = {}

    def __len__(self) -> int:
        return len(self._pictures)

    @overload
    def __getitem__(self, place: int) -> Pixels: ...
    @overload
    def __getitem__(self, place: slice) -> list[Pixels]: ...

    def __getitem__(self, place: int | slice) -> Pixels | list[Pixels]:
        """Raises `DataError` if a file changed since the split was made."""
        if isinstance(place, slice):
            return [self[number] for number in range(*place.indices(len(self)))]
        number = range(len(self))[place]
        pixels = self._kept.get(number)
        if pixels is None:
            pixels = _read(self._pictures[number], self._spec)
            if pixels.nbytes <= self._room:
                self._room -= pixels.nbytes
                self._kept[number] = pixels
        return pixels


class Part:
    """The pictures of one part, in a fixed order."""

    def __init__(self, pictures: Sequence[Picture], labels: Sequence[str], spec: Preprocessing | None = None) -> None:
        self.spec = spec
        self.pictures = tuple(pictures)
        self.labels = tuple(labels)
        place = {label: number for number, label in enumerate(labels)}
        self.targets = np.array([place[p.label] for p in pictures], dtype=np.int64)
        self.pixels = Decoded(self.pictures, spec)

    def __len__(self) -> int:
        return len(self.pictures)

    def forget(self) -> None:
        """Let go of the decoded pictures; they are read again when needed."""
        self.pixels = Decoded(self.pictures, self.spec)


def _read(picture: Picture, spec: Preprocessing | None) -> Pixels:
    try:
        data = Path(picture.path).read_bytes()
    except OSError:
        data = b""
    if hashlib.sha256(data).hexdigest() != picture.sha256:
        raise DataError(f"{picture.path}: missing or changed since the split was made; run again with --from split")
    return decode(data, spec=spec, where=picture.path)
