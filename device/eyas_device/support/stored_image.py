"""Encoded images other than JPEG: how their pixels are stored, and their conversion to 8-bit BGR.

What the versions of OpenCV do differently, or not at all, is done here: transparency, orientation, the first image of
an animation, images that are cut short.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import cv2
import numpy as np
import numpy.typing as npt

from eyas_device.support.png import read_png
from eyas_device.support.tiff import exif_orientation, read_tiff, tiff_problem

Array = npt.NDArray[Any]
_CUT = "cut short or damaged; copy it again"
_BMP_MASKS: dict[int, dict[tuple[int, int, int], tuple[int, ...]]] = {
    32: {(0xFF0000, 0xFF00, 0xFF): ()},
    16: {(0x7C00, 0x3E0, 0x1F): (5, 5, 5), (0xF800, 0x7E0, 0x1F): (5, 6, 5)},
}
"""Bits per pixel -> masks of red, green and blue that OpenCV reads rightly -> bits of each channel."""

_FLIPS = {2: 1, 3: -1, 4: 0, 6: 1, 7: -1, 8: 0}
"""Orientation -> OpenCV's code to mirror the image, transposed from 5 on: 1 left to right, 0 upside down, -1 both."""


class StoredImage(NamedTuple):
    """How an image is stored."""

    kind: str
    data: bytes | memoryview
    """What the decoder is given."""
    bits: int = 8
    """Per channel, 16 also where the decoder scales 10, 12 or 14 bits to 16."""
    scaled: bool = False
    """Whether the decoder scales the values to all 16 bits."""
    as_stored: bool = True
    """Whether it is decoded as it is stored, or to 8-bit BGR at once."""
    alpha: Literal["none", "straight", "premultiplied"] = "straight"
    """What a fourth channel is, if there is one."""
    transparent: bool = False
    """Whether some of it may be transparent."""
    key: tuple[int, ...] = ()
    """The one transparent grey or red-green-blue value."""
    levels: tuple[int, ...] = ()
    """Bits of red, green and blue where they are less than 8."""
    orientation: int = 1
    """Exif orientation that is still to be applied."""
    inverted: bool = False
    """Whether the highest value is black."""
    further: str = ""
    """`frames` or `pages` if only the first of several is used."""


def inspect_image(data: bytes | memoryview) -> StoredImage | str:
    """How a PNG, TIFF, WebP, BMP or GIF is stored, or why it cannot be used, as a clause for a message."""
    start = bytes(data[:4])
    if start == b"\x89PNG":
        return _inspect_png(data)
    if start == b"RIFF":
        return _inspect_webp(data)
    if start[:2] == b"BM":
        return _inspect_bmp(data)
    if start == b"GIF8":
        return _inspect_gif(data)
    return _inspect_tiff(data)


def _inspect_png(data: bytes | memoryview) -> StoredImage | str:
    png = read_png(data)
    if png is None:
        return f"a PNG that is {_CUT}"
    return StoredImage(
        "PNG",
        png.data,
        bits=png.bits,
        transparent=png.alpha,
        key=png.key if png.bits >= 8 else tuple(value * 255 // ((1 << png.bits) - 1) for value in png.key),
        orientation=exif_orientation(png.exif),
        further="frames" if png.animated else "",
    )


def _inspect_tiff(data: bytes | memoryview) -> StoredImage | str:
    tiff = read_tiff(data)
    if tiff is None or tiff.cut:
        return f"a TIFF that is {_CUT}"
    if problem := tiff_problem(tiff):
        return f"a TIFF that is not supported: {problem}"
    bits, samples = tiff.number(258, 1), tiff.number(277, 1)
    extra = tiff.number(338, 0) if samples in (2, 4) and tiff.number(262, 1) != 5 else 0
    deep = bits > 8
    return StoredImage(
        "TIFF",
        data,
        bits=16 if deep else bits,
        scaled=deep and bits < 16,
        as_stored=deep,
        alpha={1: "premultiplied", 2: "straight"}.get(extra, "none"),  # type: ignore[arg-type]
        transparent=extra in (1, 2),
        inverted=deep and tiff.number(262, 1) == 0,
        further="pages" if tiff.pages else "",
    )


def _inspect_webp(data: bytes | memoryview) -> StoredImage | str:
    """Source: RFC 9649, 2.3 to 2.7: chunks of even length in a RIFF container."""
    end = 8 + _little(data, 4, 4)
    if end > len(data):
        return f"a WebP that is {_CUT}"
    flags = data[20] if bytes(data[12:16]) == b"VP8X" else 0
    transparent = bool(flags & 0x10) or (bytes(data[12:16]) == b"VP8L" and bool(data[24] & 0x10))
    exif, position = b"", 12
    while flags & 0x08 and position + 8 <= end:
        size = _little(data, position + 4, 4)
        if bytes(data[position : position + 4]) == b"EXIF":
            exif = bytes(data[position + 8 : position + 8 + size])
            break
        position += 8 + size + size % 2
    return StoredImage(
        "WebP",
        data,
        transparent=transparent,
        orientation=exif_orientation(exif),
        further="frames" if flags & 0x02 else "",
    )


def _inspect_bmp(data: bytes | memoryview) -> StoredImage | str:
    """Source: Windows BITMAPCOREHEADER to BITMAPV5HEADER."""
    pixels, header = _little(data, 10, 4), _little(data, 14, 4)
    if header == 12:
        width, height, bits, packing, size = _little(data, 18, 2), _little(data, 20, 2), _little(data, 24, 2), 0, 0
    else:
        width, height = (
            abs(int.from_bytes(data[at : at + 4], "little", signed=True)) for at in (18, 22)
        )  # a negative height: from the top
        bits, packing, size = _little(data, 28, 2), _little(data, 30, 4), _little(data, 34, 4)
    if packing in (1, 2):  # run lengths: the header alone knows where they end
        end = max(pixels + size, 0 if size else _little(data, 2, 4))
    else:
        end = pixels + (width * bits + 31) // 32 * 4 * height
    if end > len(data):
        return f"a BMP that is {_CUT}"
    masks = (0x7C00, 0x3E0, 0x1F) if bits == 16 else (0xFF0000, 0xFF00, 0xFF)
    alpha = 0
    if packing in (3, 6):
        masks = (_little(data, 54, 4), _little(data, 58, 4), _little(data, 62, 4))
        alpha = _little(data, 66, 4) if packing == 6 or header >= 56 else 0
    if bits in _BMP_MASKS and (masks not in _BMP_MASKS[bits] or alpha not in (0, 0xFF000000)):
        return "a BMP with an unusual order of its channels; save it with 24 bits per pixel"
    levels = _BMP_MASKS.get(bits, {}).get(masks, ())
    return StoredImage("BMP", data, alpha="straight" if alpha else "none", transparent=bool(alpha), levels=levels)


def _inspect_gif(data: bytes | memoryview) -> StoredImage | str:
    """Source: GIF89a specification, 18 to 27: blocks up to the trailer; what follows it is ignored."""
    position = 13 + _gif_colours(_little(data, 10, 1))
    frames, transparent = 0, False
    while position < len(data):
        block = data[position]
        if block == 0x3B:
            return StoredImage("GIF", data, transparent=transparent, further="frames" if frames > 1 else "")
        if block == 0x2C:
            frames += 1
            position += 11 + _gif_colours(_little(data, position + 9, 1))
        elif block == 0x21:
            control = _little(data, position + 1, 1) == 0xF9
            transparent = transparent or (control and bool(_little(data, position + 3, 1) & 1))
            position += 2
        else:
            break
        while size := _little(data, position, 1):  # sub-blocks
            position += 1 + size
        position += 1
    return f"a GIF that is {_CUT}"


def _gif_colours(flags: int) -> int:
    """Bytes of a colour table."""
    return 3 << (flags & 7) + 1 if flags & 0x80 else 0


def to_bgr(values: Array, stored: StoredImage, bits: int) -> npt.NDArray[np.uint8]:
    """Convert decoded values to uint8 BGR [h, w, 3].

    Args:
        values: uint8 or uint16 [h, w] or [h, w, 3|4], as the decoder delivers them.
        stored: How they were stored.
        bits: Bits that 16-bit images use; larger values become white.

    """
    deep = values.dtype == np.uint16
    key = _is_key(values, stored.key) if stored.key else None
    colours, alpha = values[..., :3] if values.ndim == 3 else values, None
    if values.ndim == 3 and values.shape[2] == 4 and stored.alpha != "none":
        alpha = values[..., 3]
        if stored.kind == "BMP" and not alpha.any():  # nobody means a BMP that is invisible
            alpha = None
    used = bits if deep and not stored.scaled else 16
    if stored.inverted:
        colours = ((1 << used) - 1 if deep else 255) - np.minimum(colours, (1 << used) - 1 if deep else 255)
    if deep:
        colours = np.minimum(colours >> (used - 8), 255).astype(np.uint8)
    if stored.levels:
        colours = _full_range(colours, stored.levels)
    if alpha is not None and stored.alpha == "straight":
        colours = _on_black(colours, alpha)
    if key is not None:
        colours = np.where(key if colours.ndim == 2 else key[..., None], np.uint8(0), colours)
    image = np.ascontiguousarray(colours)
    if image.ndim == 2 or image.shape[2] == 1:
        image = np.asarray(cv2.cvtColor(image, cv2.COLOR_GRAY2BGR), dtype=np.uint8)
    return oriented(image, stored.orientation)


def _is_key(values: Array, key: tuple[int, ...]) -> npt.NDArray[np.bool_]:
    """Where an image has its transparent value."""
    if values.ndim == 2:
        return np.asarray(values == key[0])
    return np.asarray((values[..., :3] == np.array(key[::-1] if len(key) == 3 else key * 3)).all(axis=-1))


def _on_black(colours: Array, alpha: Array) -> Array:
    opaque = 65535 if alpha.dtype == np.uint16 else 255
    if alpha.min() == opaque:
        return colours
    weight = alpha.astype(np.float32) / opaque
    return np.rint(colours * (weight if colours.ndim == 2 else weight[..., None])).astype(np.uint8)


def _full_range(colours: Array, levels: tuple[int, ...]) -> Array:
    """Stretch BGR values of few bits, which the decoder leaves in the upper bits, to 0 to 255."""
    tables = []
    for bits in reversed(levels):
        top = (1 << bits) - 1
        tables.append(((np.arange(256) >> 8 - bits) * 255 + top // 2) // top)
    return np.asarray(cv2.LUT(colours, np.stack(tables, axis=-1).astype(np.uint8)[None]))


def oriented(image: npt.NDArray[np.uint8], orientation: int) -> npt.NDArray[np.uint8]:
    """Turn and mirror an image [h, w, 3] upright. Source: Exif 2.32, tag 274."""
    if orientation >= 5:
        image = np.asarray(cv2.transpose(image), dtype=np.uint8)
    flip = _FLIPS.get(orientation)
    return image if flip is None else np.asarray(cv2.flip(image, flip), dtype=np.uint8)


def _little(data: bytes | memoryview, at: int, size: int) -> int:
    return int.from_bytes(data[at : at + size], "little")
