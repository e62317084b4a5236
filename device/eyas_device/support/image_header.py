"""Width and height from the header of an encoded image, without decoding it.

A few kilobytes can decode to gigabytes, so the size is known before a decoder sees the bytes. Formats that are not
parsed here are not decoded at all: JPEG, PNG, BMP, WebP, TIFF and GIF are what cameras and data sets use.
"""

from __future__ import annotations

from collections.abc import Callable

from eyas_device.support.jpeg import jpeg_frame
from eyas_device.support.png import png_chunks

MAX_PIXELS = 50_000_000
"""Most pixels of an image: above the 48 megapixels of today's largest camera modules."""
MAX_SIDE = 16_384
"""Largest side of an image, pixels."""
FORMATS = "JPEG, PNG, BMP, WebP, TIFF and GIF"
_TIFF_SIDES = {256: 0, 257: 1, 322: 2, 323: 3}
"""Tag -> place: width, height, and width and height of a tile, which is decoded as a whole."""
_BRANDS = {b"avif": "an AVIF image", b"avis": "an AVIF image", b"jxl ": "a JPEG XL image"}
_BRANDS |= dict.fromkeys((b"heic", b"heix", b"mif1", b"msf1", b"hevc", b"heim"), "an HEIC image")
_OTHERS = {
    b"\0\0\0\x0cjP  ": "a JPEG 2000 image",
    b"\xff\x4f\xff\x51": "a JPEG 2000 image",
    b"\0\0\0\x0cJXL ": "a JPEG XL image",
    b"\xff\x0a": "a JPEG XL image",
    b"\x76\x2f\x31\x01": "an OpenEXR image",
    b"#?R": "a Radiance HDR image",
    b"8BPS": "a Photoshop file",
    b"%PDF": "a PDF",
    b"<svg": "an SVG",
    b"<?xml": "an XML or SVG file",
    b"<!DOCTYPE": "a web page",
    b"<html": "a web page",
    b"PK\x03\x04": "a ZIP archive",
    b"version https://git-lfs": "a pointer of Git LFS; fetch the file with `git lfs pull`",
}
_TIFF_BYTES = {1: 1, 3: 2, 4: 4, 16: 8}
_MAX_TIFF_ENTRIES = 4096

Size = tuple[int, int]


def header_size(data: bytes | memoryview) -> Size | None:
    """Width and height of an encoded image, pixels, before its orientation is applied.

    For a TIFF these are the sides of what is decoded at once, if its tiles are larger than the image. None for other
    formats, and for a header that is cut off or damaged.
    """
    start = bytes(data[:16])
    parse: Callable[[bytes | memoryview], Size | None] | None = next(
        (parse for magic, _, parse in _PARSERS if start.startswith(magic)), None
    )
    size = parse(data) if parse is not None else None
    return size if size is not None and min(size) > 0 else None


def describe_start(data: bytes | memoryview) -> str:
    """What bytes that are not decoded are instead, for messages: `an AVIF image`; empty if that is not known."""
    start = bytes(data[:32])
    brand = start[8:12] if start[4:8] == b"ftyp" else b""
    if brand:
        return _BRANDS.get(brand, "a film or an image of a phone")
    known = next((name for magic, name, _ in _PARSERS if start.startswith(magic)), "")
    if known:
        return f"a {known} that is cut short or damaged"
    return next((what for magic, what in _OTHERS.items() if start.startswith(magic)), "")


def oversize(width: int, height: int) -> str:
    """What is wrong with an image of this size, for messages; empty if nothing is."""
    if max(width, height) > MAX_SIDE:
        return f"{width}x{height} pixels; at most {MAX_SIDE} a side are allowed"
    if width * height > MAX_PIXELS:
        return (
            f"{width}x{height} pixels, {width * height / 1e6:.1f} megapixels; at most {MAX_PIXELS / 1e6:.0f} are "
            "allowed: scale it down first"
        )
    return ""


def jpeg_size(data: bytes | memoryview) -> Size | None:
    """Width and height in a JPEG's first frame header."""
    frame = jpeg_frame(data) if bytes(data[:2]) == b"\xff\xd8" else None
    return None if frame is None else (frame.width, frame.height)


def _png_size(data: bytes | memoryview) -> Size | None:
    """Source: ISO/IEC 15948, 11.2.2."""
    return None if png_chunks(data) is None else (_big(data, 16, 4), _big(data, 20, 4))


def _gif_size(data: bytes | memoryview) -> Size | None:
    """Source: GIF89a specification, 18 (logical screen descriptor)."""
    return None if len(data) < 10 else (_little(data, 6, 2), _little(data, 8, 2))


def _bmp_size(data: bytes | memoryview) -> Size | None:
    """Source: Windows BITMAPCOREHEADER and BITMAPINFOHEADER; a negative height runs from the top."""
    if len(data) < 26:
        return None
    if _little(data, 14, 4) == 12:
        return _little(data, 18, 2), _little(data, 20, 2)
    width, height = (int.from_bytes(data[at : at + 4], "little", signed=True) for at in (18, 22))
    return abs(width), abs(height)


def _webp_size(data: bytes | memoryview) -> Size | None:
    """Source: RFC 9649, 2.5 to 2.7, and RFC 6386, 9.1; the canvas of an extended file bounds its frames."""
    if len(data) < 30 or bytes(data[8:12]) != b"WEBP":
        return None
    kind = bytes(data[12:16])
    if kind == b"VP8X":
        return 1 + _little(data, 24, 3), 1 + _little(data, 27, 3)
    if kind == b"VP8L":
        bits = _little(data, 21, 4)
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    if kind == b"VP8 ":
        return _little(data, 26, 2) & 0x3FFF, _little(data, 28, 2) & 0x3FFF
    return None


def _tiff_size(data: bytes | memoryview) -> Size | None:
    """Source: TIFF 6.0, sections 2 and 15; BigTIFF has wider counts and offsets."""
    order = "little" if bytes(data[:2]) == b"II" else "big"

    def number(at: int, size: int) -> int:
        return int.from_bytes(data[at : at + size], "little" if order == "little" else "big")

    big = number(2, 2) == 43
    wide, entry_bytes, count_bytes = (8, 20, 8) if big else (4, 12, 2)
    at = number(8, 8) if big else number(4, 4)
    if not 0 < at <= len(data) - count_bytes:
        return None
    sides = [0, 0, 0, 0]
    for index in range(min(number(at, count_bytes), _MAX_TIFF_ENTRIES)):
        entry = at + count_bytes + index * entry_bytes
        if entry + entry_bytes > len(data):
            break
        place, size = _TIFF_SIDES.get(number(entry, 2)), _TIFF_BYTES.get(number(entry + 2, 2))
        if place is not None and size is not None:
            if size > wide:
                return None
            sides[place] = max(sides[place], number(entry + 4 + wide, size))
    width, height, tile_width, tile_height = sides
    return (max(width, tile_width), max(height, tile_height)) if width and height else None


def _big(data: bytes | memoryview, at: int, size: int) -> int:
    return int.from_bytes(data[at : at + size], "big")


def _little(data: bytes | memoryview, at: int, size: int) -> int:
    return int.from_bytes(data[at : at + size], "little")


_PARSERS: tuple[tuple[bytes, str, Callable[[bytes | memoryview], Size | None]], ...] = (
    (b"\xff\xd8", "JPEG", jpeg_size),
    (b"\x89PNG\r\n\x1a\n", "PNG", _png_size),
    (b"GIF8", "GIF", _gif_size),
    (b"BM", "BMP", _bmp_size),
    (b"RIFF", "WebP", _webp_size),
    (b"II\x2a\x00", "TIFF", _tiff_size),
    (b"MM\x00\x2a", "TIFF", _tiff_size),
    (b"II\x2b\x00", "TIFF", _tiff_size),
    (b"MM\x00\x2b", "TIFF", _tiff_size),
)
"""First bytes of a format, its name and its parser."""
