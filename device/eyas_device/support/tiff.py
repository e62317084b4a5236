"""TIFF files: the first page's tags, and whether OpenCV shows that page as it is meant.

Exif data is a TIFF file, too: its orientation is read here for PNG and WebP.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np

_TYPES = {1: "u1", 3: "u2", 4: "u4", 13: "u4", 16: "u8"}
"""Field type -> numpy's type, of the fields that are read."""
_SIZES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8, 17: 8, 18: 8}
"""Field type -> bytes of a value."""
_WANTED = frozenset({256, 257, 258, 259, 262, 273, 274, 277, 279, 284, 324, 325, 338, 339})
_MAX_ENTRIES, _MAX_PAGES = 4096, 64
_ORIENTATION = 274
_GREY, _RGB, _PALETTE, _CMYK, _YCBCR = (0, 1), 2, 3, 5, 6
_PHOTOMETRIC = {4: "a mask", 8: "CIE Lab", 9: "CIE Lab", 10: "CIE Lab", 32803: "a colour filter array"}
_PHOTOMETRIC |= {32844: "LogL", 32845: "LogLuv", 34892: "linear raw"}
_FORMATS = {2: "signed integers", 3: "floats", 5: "complex integers", 6: "complex floats"}


class Tiff(NamedTuple):
    """The first page of a TIFF file."""

    tags: Mapping[int, Sequence[int]]
    pages: bool
    """Whether further pages follow."""
    cut: bool
    """Whether values or pixels lie behind the end of the file."""

    def number(self, tag: int, default: int) -> int:
        """The first value of a tag."""
        values = self.tags.get(tag, ())
        return int(values[0]) if len(values) else default


def read_tiff(data: bytes | memoryview) -> Tiff | None:
    """Read the tags of the first page; None if there is no complete directory.

    Source: TIFF 6.0, section 2; BigTIFF has wider counts and offsets.
    """
    layout = _Layout.of(data)
    first, at = _read_page(data, layout, layout.number(data, layout.wide, layout.wide))
    if first is None:
        return None
    cut, pages = first.cut or _pixels_end(first) > len(data), 1
    while at and not cut and pages < _MAX_PAGES:
        page, at = _read_page(data, layout, at)
        cut = page is None or page.cut or _pixels_end(page) > len(data)
        pages += 1
    return first._replace(pages=pages > 1, cut=cut)


class _Layout(NamedTuple):
    """Byte order and widths of a file."""

    order: Literal["little", "big"]
    wide: int
    """Bytes of offsets."""
    entry: int
    """Bytes of a directory's entry."""
    length: int
    """Bytes of a directory's length."""

    @classmethod
    def of(cls, data: bytes | memoryview) -> _Layout:
        order: Literal["little", "big"] = "little" if bytes(data[:2]) == b"II" else "big"
        big = int.from_bytes(data[2:4], order) == 43
        return cls(order, *((8, 20, 8) if big else (4, 12, 2)))

    def number(self, data: bytes | memoryview, at: int, size: int) -> int:
        return int.from_bytes(data[at : at + size], self.order)


def _read_page(data: bytes | memoryview, layout: _Layout, at: int) -> tuple[Tiff | None, int]:
    """The page whose directory starts at `at`, and where the next one does; None if it is not complete."""
    _, wide, entry_bytes, count_bytes = layout
    entries = layout.number(data, at, count_bytes) if 0 < at <= len(data) - count_bytes else 0
    after = at + count_bytes + entries * entry_bytes
    if not 0 < entries <= _MAX_ENTRIES or after + wide > len(data):
        return None, 0
    tags: dict[int, Sequence[int]] = {}
    cut = False
    for entry in range(at + count_bytes, after, entry_bytes):
        tag, code = layout.number(data, entry, 2), layout.number(data, entry + 2, 2)
        count = layout.number(data, entry + 4, wide)
        size = count * _SIZES.get(code, 0)
        start = entry + 4 + wide if size <= wide else layout.number(data, entry + 4 + wide, wide)
        if start + size > len(data):
            cut = True
            continue
        kind = _TYPES.get(code)
        if tag not in _WANTED or kind is None:
            continue
        numbers = np.frombuffer(
            data, dtype=("<" if layout.order == "little" else ">") + kind, count=count, offset=start
        )
        tags[tag] = numbers.tolist()
    return Tiff(tags, pages=False, cut=cut), layout.number(data, after, wide)


def _pixels_end(tiff: Tiff) -> int:
    """End of the last strip or tile; 0 if it is not known."""
    for offsets, counts in ((273, 279), (324, 325)):
        pairs = zip(tiff.tags.get(offsets, ()), tiff.tags.get(counts, ()), strict=False)
        end = max((offset + count for offset, count in pairs), default=0)
        if end:
            return end
    return 0


def tiff_problem(tiff: Tiff) -> str:
    """Why OpenCV would not show the page as it is meant; empty if it does."""
    photometric, samples, bits = tiff.number(262, 1), tiff.number(277, 1), tiff.number(258, 1)
    kind = tiff.number(339, 1)
    if kind in _FORMATS:
        return f"samples are {_FORMATS[kind]}; unsigned integers of 8 or 16 bits are allowed"
    if len({*tiff.tags.get(258, (1,))}) > 1 or bits not in (1, 2, 4, 8, 10, 12, 14, 16):
        return f"{bits} bits per sample; 8 or 16 are allowed"
    if photometric not in (*_GREY, _RGB, _PALETTE, _CMYK, _YCBCR):
        return f"colours stored as {_PHOTOMETRIC.get(photometric, f'kind {photometric}')}; grey or RGB are allowed"
    if photometric in _GREY and samples > 1 and bits != 16:
        return "a grey TIFF with an alpha or other further channel; save it without"
    colours = {_RGB: (3, 4), _CMYK: (4,), _YCBCR: (3,)}.get(photometric, (1, 2))
    if samples not in colours:
        return f"{samples} samples per pixel; {' or '.join(map(str, colours))} are allowed"
    if bits > 8 and ((samples > 1 and bits != 16) or photometric not in (*_GREY, _RGB)):
        return f"colours of {bits} bits per sample, of a kind that is not supported; save it as RGB of 8 or 16 bits"
    if bits == 16 and samples > 1 and tiff.number(284, 1) == 2:
        return "16-bit channels in separate planes; save it with interleaved channels"
    return ""


def exif_orientation(exif: bytes) -> int:
    """Orientation 1 to 8 in Exif data; 1 if it has none."""
    exif = exif.removeprefix(b"Exif\0\0")
    tiff = read_tiff(exif) if exif[:2] in (b"II", b"MM") else None
    found = 1 if tiff is None else tiff.number(_ORIENTATION, 1)
    return found if 1 <= found <= 8 else 1
