"""The index: every labelled picture, read once: its hash, size and mode, and whether it can be read at all."""

from __future__ import annotations

import hashlib
import io
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec
import numpy as np
from PIL import Image

from eyas_device.errors import PictureError
from eyas_device.preprocess import decode
from eyas_host.data.duplicates import BITS, Hashes, perceptual_hash
from eyas_host.data.sources import Picture, list_pictures, thin
from eyas_host.recipe.data import DataSection
from eyas_host.support.errors import DataError
from eyas_host.support.progress import meter

_A_TURN = 256
"""Pictures that wait for a free thread at most."""
_SHOWN = 10


class Look(msgspec.Struct, frozen=True):
    """What a picture file holds, without its pixels."""

    width: int
    """Pixels, as decoded (EXIF orientation applied)."""
    height: int
    mode: str
    """grey or colour, with `+alpha` where there is an alpha channel."""
    bits: int
    """A channel, in the file; models see 8."""
    hash: bytes
    """Perceptual hash, 32 bytes."""


class Index(msgspec.Struct, frozen=True):
    """All pictures of a data set, and what was left out."""

    pictures: tuple[Picture, ...]
    labels: tuple[str, ...]
    unreadable: tuple[str, ...] = ()
    notices: tuple[str, ...] = ()
    looks: dict[str, Look] = {}
    """sha256 -> what the file holds."""
    copies: tuple[tuple[Picture, Picture], ...] = ()
    """Exact copies that were dropped, each with the picture that stands for it."""

    def counts(self) -> Counter[str]:
        """Pictures a label."""
        return Counter(p.label for p in self.pictures)

    def hashes(self, pictures: Sequence[Picture]) -> Hashes:
        """Perceptual hashes of some of its pictures, uint8 [n, 32]."""
        joined = b"".join(self.looks[picture.sha256].hash for picture in pictures)
        return np.frombuffer(joined, dtype=np.uint8).reshape(len(pictures), BITS // 8)


def build_index(data: DataSection) -> Index:
    """List and read every picture that `data` names; no pixels are kept.

    Raises `DataError` for a source that cannot be used, fewer than two classes, an empty class, the same picture under
    two labels, or pictures that cannot be read (unless `skip_unreadable`); `MissingExtra` without the demonstration
    set.
    """
    candidates, notices = list_pictures(data)
    if data.limit:
        candidates = thin(candidates, data.limit)
    pictures, looks, unreadable = [], {}, []
    with meter("reading pictures", len(candidates)) as bar:
        for found in _read_all(candidates):
            if isinstance(found, str):
                unreadable.append(found)
            else:
                picture, look = found
                pictures.append(picture)
                looks[picture.sha256] = look
            bar.advance()
    if unreadable and not data.skip_unreadable:
        shown = "\n".join(f"  {line}" for line in unreadable[:_SHOWN])
        more = f"\n  and {len(unreadable) - _SHOWN} more" if len(unreadable) > _SHOWN else ""
        raise DataError(
            f"{len(unreadable)} unreadable picture{'s' * (len(unreadable) > 1)}; mend or remove them, or set "
            f"[data] skip_unreadable = true\n{shown}{more}"
        )
    kept, copies = _unique(pictures)
    index = Index(
        pictures=kept,
        labels=tuple(sorted({p.label for p in candidates})),
        unreadable=tuple(unreadable),
        notices=notices,
        looks=looks,
        copies=copies,
    )
    counts = index.counts()
    for label in index.labels:
        if not counts[label]:
            raise DataError(f"class {label!r} has no readable picture; add some or remove its folder")
    return index


def _read_all(pictures: Sequence[Picture]) -> Iterator[tuple[Picture, Look] | str]:
    """Each picture with its hash and look, or why it cannot be read, in order; decoded on all cores."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for start in range(0, len(pictures), _A_TURN):
            yield from pool.map(_read, pictures[start : start + _A_TURN])


def _read(picture: Picture) -> tuple[Picture, Look] | str:
    try:
        data = Path(picture.path).read_bytes()
        pixels = decode(data, where=picture.path)
    except PictureError as error:
        return str(error)
    except OSError as error:
        return f"{picture.path}: cannot be read ({error.strerror})"
    mode, bits = _mode(data)
    look = Look(pixels.shape[1], pixels.shape[0], mode, bits, perceptual_hash(pixels))
    return msgspec.structs.replace(picture, sha256=hashlib.sha256(data).hexdigest()), look


def _mode(data: bytes) -> tuple[str, int]:
    """Mode and bits a channel from the file's header; `unknown` where only OpenCV knows the format."""
    if data.startswith(b"\x89PNG"):  # the first chunk holds bit depth and colour type: ISO/IEC 15948, 11.2.2
        depth, kind = data[24], data[25]
        mode = "grey" if kind in (0, 4) else "colour"
        return mode + ("+alpha" if kind in (4, 6) else ""), 8 if kind == 3 else depth
    try:
        with Image.open(io.BytesIO(data)) as picture:
            mode = picture.mode
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return "unknown", 8
    alpha = "+alpha" if mode in ("LA", "La", "PA", "RGBA", "RGBa") else ""
    grey = mode in ("1", "L", "LA", "La", "F") or mode.startswith("I")
    return ("grey" if grey else "colour") + alpha, {"1": 1, "I": 32, "F": 32}.get(mode, 16 if "16" in mode else 8)


def _unique(pictures: Sequence[Picture]) -> tuple[tuple[Picture, ...], tuple[tuple[Picture, Picture], ...]]:
    """One picture for each hash, and its exact copies; the same bytes under two labels are a mistake in the labels.

    The one that stays was taken first, so that a split by time cannot put a copy of the past into the future.
    """
    kept: dict[str, Picture] = {}
    copies = []
    for picture in pictures:
        first = kept.setdefault(picture.sha256, picture)
        if first is picture:
            continue
        if first.label != picture.label:
            raise DataError(
                f"the same picture has two labels: {first.path} ({first.label}) and {picture.path} ({picture.label}); "
                "remove the wrong one"
            )
        if picture.time is not None and (first.time is None or picture.time < first.time):
            kept[picture.sha256], picture, first = picture, first, picture
        copies.append((picture, first))
    return tuple(kept.values()), tuple(copies)
