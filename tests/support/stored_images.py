"""Image files of every kind with the colours that they mean; written by Pillow, tifffile and by hand, not by OpenCV."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import tifffile
from PIL import Image, ImageOps

HEIGHT, WIDTH = 24, 40
_Y, _X = np.mgrid[:HEIGHT, :WIDTH]
RGB = np.dstack([_X * 6, _Y * 10, (_X + _Y) * 3]).astype(np.uint8)
RGB[:8, :8] = (250, 20, 30)
GREY = RGB[..., 1].copy()
ALPHA = np.full((HEIGHT, WIDTH), 255, np.uint8)
ALPHA[:, 20:] = 0
ALPHA[12:, 10:20] = 128
_DEEP_GREY = (GREY.astype(np.uint16) << 8) | 0x33
_DEEP_RGB = (RGB.astype(np.uint16) << 8) | 0x33


class Stored(NamedTuple):
    data: bytes
    means: np.ndarray
    """Colours uint8 [h, w, 3], RGB."""
    tolerance: int = 1


def three(grey: np.ndarray) -> np.ndarray:
    return np.dstack([grey.astype(np.uint8)] * 3)


def on_black(colours: np.ndarray, alpha: np.ndarray = ALPHA) -> np.ndarray:
    colours = three(colours) if colours.ndim == 2 else colours
    return np.round(colours * (alpha[..., None] / 255)).astype(np.uint8)


def saved(image: np.ndarray | Image.Image, kind: str, **options: Any) -> bytes:
    stream = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(stream, kind, **options)
    return stream.getvalue()


def tiff(pixels: np.ndarray, **options: Any) -> bytes:
    stream = io.BytesIO()
    tifffile.imwrite(stream, pixels, **options)
    return stream.getvalue()


def by_pillow(data: bytes) -> np.ndarray:
    return np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB"))


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(rows: np.ndarray, depth: int, colour: int, *, extra: bytes = b"", spare: bytes = b"") -> bytes:
    """A PNG of packed rows, uint8 [h, bytes]; `extra` chunks before the pixels, `spare` bytes behind them."""
    header = struct.pack(">IIBBBBB", WIDTH, HEIGHT, depth, colour, 0, 0, 0)
    body = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows) + spare)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + extra + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def big_endian(values: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(values.reshape(HEIGHT, -1).astype(">u2")).view(np.uint8)


def packed(values: np.ndarray, bits: int) -> np.ndarray:
    """Values of a few bits, one behind the other, rows padded to bytes."""
    return np.packbits((values[..., None] >> np.arange(bits - 1, -1, -1) & 1).reshape(HEIGHT, -1), axis=1)


def plain_tiff(body: bytes, bits: int, *more: tuple[int, int, int]) -> bytes:
    """A grey TIFF of one uncompressed strip; `more` tags as (tag, type, value)."""
    tags = [(256, 4, WIDTH), (257, 4, HEIGHT), (258, 3, bits), (259, 3, 1), (262, 3, 1), (277, 3, 1), (278, 4, HEIGHT)]
    tags += [(279, 4, len(body)), *more]
    start = 8 + 2 + 12 * (len(tags) + 1) + 4
    entries = b"".join(
        struct.pack("<HHI", tag, kind, 1) + (struct.pack("<I", value) if kind == 4 else struct.pack("<HH", value, 0))
        for tag, kind, value in sorted([*tags, (273, 4, start)])
    )
    return b"II*\0" + struct.pack("<IH", 8, len(tags) + 1) + entries + bytes(4) + body


def bmp(
    body: bytes, bits: int, *, packing: int = 0, masks: bytes = b"", header: int = 40, palette: bytes = b""
) -> bytes:
    """A bottom-up BMP; the masks lie in the header from 52 bytes on, else behind it."""
    start = 14 + header + (len(masks) if header == 40 else 0) + len(palette)
    fields = struct.pack("<IiiHHIIiiII", header, WIDTH, HEIGHT, 1, bits, packing, len(body), 0, 0, len(palette) // 4, 0)
    fields += masks + bytes(max(0, header - 40 - len(masks)))
    return b"BM" + struct.pack("<IHHI", start + len(body), 0, 0, start) + fields + palette + body


def few_levels(values: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """The upper bits, and the 8-bit values that they mean."""
    upper = values.astype(np.uint16) >> (8 - bits)
    return upper, np.round(upper * 255 / ((1 << bits) - 1)).astype(np.uint8)


def files() -> dict[str, Stored]:
    """Name -> file and colours."""
    return dict([*_pngs(), *_webps(), *_bmps(), *_jpegs(), *_tiffs(), *_turned()])


def _pngs() -> Iterator[tuple[str, Stored]]:
    rgba, grey_alpha = np.dstack([RGB, ALPHA]), np.dstack([GREY, ALPHA])
    deep_alpha = ALPHA.astype(np.uint16) * 257
    palette = Image.fromarray(RGB).quantize(64)
    index, colours = np.array(palette), np.array(palette.convert("RGB"))
    bright = GREY > 100
    clear = np.where((RGB == (250, 20, 30)).all(-1)[..., None], 0, RGB)
    clear_grey = three(np.where(GREY == 20, 0, GREY))
    yield "png alpha", Stored(saved(rgba, "PNG"), on_black(RGB))
    yield "png grey alpha", Stored(saved(Image.fromarray(grey_alpha, "LA"), "PNG"), on_black(GREY))
    yield "png palette", Stored(saved(palette, "PNG"), colours)
    first = int(index[0, 0])
    yield (
        "png palette one clear",
        Stored(saved(palette, "PNG", transparency=first), np.where((index == first)[..., None], 0, colours)),
    )
    half = np.full_like(ALPHA, 128)
    yield "png palette half", Stored(saved(palette, "PNG", transparency=bytes([128] * 64)), on_black(colours, half))
    key = chunk(b"tRNS", struct.pack(">HHH", 250, 20, 30))
    yield "png key", Stored(png(RGB.reshape(HEIGHT, -1), 8, 2, extra=key), clear)
    key = chunk(b"tRNS", struct.pack(">H", 20))
    yield "png grey key", Stored(png(GREY, 8, 0, extra=key), clear_grey)
    key = chunk(b"tRNS", struct.pack(">H", 20 << 8 | 0x33))
    yield "png 16 grey key", Stored(png(big_endian(_DEEP_GREY), 16, 0, extra=key), clear_grey)
    key = chunk(b"tRNS", struct.pack(">HHH", *(value << 8 | 0x33 for value in (250, 20, 30))))
    yield "png 16 key", Stored(png(big_endian(_DEEP_RGB), 16, 2, extra=key), clear)
    yield "png 16 grey", Stored(png(big_endian(_DEEP_GREY), 16, 0), three(GREY))
    yield "png 16", Stored(png(big_endian(_DEEP_RGB), 16, 2), RGB)
    yield "png 16 alpha", Stored(png(big_endian(np.dstack([_DEEP_RGB, deep_alpha])), 16, 6), on_black(RGB))
    yield "png 16 grey alpha", Stored(png(big_endian(np.dstack([_DEEP_GREY, deep_alpha])), 16, 4), on_black(GREY))
    yield "png 1", Stored(png(packed(bright.astype(int), 1), 1, 0), three(bright * 255))
    key = chunk(b"tRNS", struct.pack(">H", 1))
    yield "png 1 key", Stored(png(packed(bright.astype(int), 1), 1, 0, extra=key), three(bright * 0))
    for bits in (2, 4):
        upper, means = few_levels(GREY, bits)
        yield f"png {bits}", Stored(png(packed(upper, bits), bits, 0), three(means))
    rows = RGB.reshape(HEIGHT, -1)
    yield "png damaged text", Stored(png(rows, 8, 2, extra=chunk(b"tEXt", b"a\0b")[:-1] + b"!"), RGB)
    yield "png damaged profile", Stored(png(rows, 8, 2, extra=chunk(b"iCCP", b"x\0\0" + zlib.compress(b"y" * 90))), RGB)
    yield "png spare pixels", Stored(png(rows, 8, 2, spare=b"z" * 400), RGB)
    yield "png trailing bytes", Stored(saved(RGB, "PNG") + b"garbage" * 9, RGB)
    others = [Image.fromarray(255 - RGB), Image.fromarray(RGB // 2)]
    for default in (False, True):
        data = saved(RGB, "PNG", save_all=True, append_images=others, duration=99, default_image=default)
        yield f"apng{' default' * default}", Stored(data, RGB)


def _webps() -> Iterator[tuple[str, Stored]]:
    yield "webp", Stored(saved(RGB, "WEBP", lossless=True), RGB)
    yield "webp alpha", Stored(saved(np.dstack([RGB, ALPHA]), "WEBP", lossless=True, exact=True), on_black(RGB))
    data = saved(RGB, "WEBP", lossless=True, save_all=True, append_images=[Image.fromarray(255 - RGB)])
    yield "webp animated", Stored(data, RGB)


def _bmps() -> Iterator[tuple[str, Stored]]:
    bgr = RGB[::-1, :, ::-1]
    nothing = np.zeros_like(ALPHA)
    masks = struct.pack("<IIII", 0xFF0000, 0xFF00, 0xFF, 0xFF000000)
    yield "bmp 32", Stored(bmp(np.dstack([bgr, nothing]).tobytes(), 32), RGB)
    for header in (108, 124):
        data = bmp(np.dstack([bgr, ALPHA[::-1]]).tobytes(), 32, packing=3, masks=masks, header=header)
        yield f"bmp alpha {header}", Stored(data, on_black(RGB))
    yield "bmp no alpha", Stored(bmp(np.dstack([bgr, nothing]).tobytes(), 32, packing=3, masks=masks, header=108), RGB)
    (red, r), (green, g), (blue, b) = few_levels(RGB[..., 0], 5), few_levels(RGB[..., 1], 6), few_levels(RGB[..., 2], 5)
    values = (red << 11 | green << 5 | blue)[::-1].astype("<u2").tobytes()
    masks = struct.pack("<III", 0xF800, 0x7E0, 0x1F)
    yield "bmp 565", Stored(bmp(values, 16, packing=3, masks=masks), np.dstack([r, g, b]))
    green, g = few_levels(RGB[..., 1], 5)
    values = (red << 10 | green << 5 | blue)[::-1].astype("<u2").tobytes()
    yield "bmp 555", Stored(bmp(values, 16), np.dstack([r, g, b]))
    runs = b"".join(bytes(v for value in row for v in (1, value)) + b"\0\0" for row in GREY[::-1].tolist()) + b"\0\1"
    palette = b"".join(bytes([value] * 3 + [0]) for value in range(256))
    yield "bmp rle", Stored(bmp(runs, 8, packing=1, palette=palette), three(GREY))


def _jpegs() -> Iterator[tuple[str, Stored]]:
    plain = saved(RGB, "JPEG", quality=100, subsampling=0)
    second = saved(255 - RGB, "JPEG", quality=100, subsampling=0)
    kinds = {
        "jpeg progressive": saved(RGB, "JPEG", quality=100, progressive=True),
        "jpeg restarts": saved(RGB, "JPEG", quality=100, restart_marker_blocks=2),
        "jpeg stored rgb": saved(RGB, "JPEG", quality=100, subsampling=0, keep_rgb=True),
        "jpeg cmyk": saved(Image.fromarray(RGB).convert("CMYK"), "JPEG", quality=100),
    }
    for name, data in kinds.items():
        yield name, Stored(data, by_pillow(data), 2)
    adobe = kinds["jpeg cmyk"].index(b"\xff\xee")
    bare = kinds["jpeg cmyk"][:adobe] + kinds["jpeg cmyk"][adobe + 16 :]
    yield "jpeg cmyk plain", Stored(bare, by_pillow(bare), 2)
    for name, data in {
        "jpeg padded": plain + bytes(300),
        "jpeg with a film": plain + b"\0\0\0\x18ftypmp42" + bytes(range(256)),
        "jpeg with a second one": plain + second,
        "jpeg multi-picture": saved(
            RGB, "MPO", quality=100, subsampling=0, save_all=True, append_images=[Image.fromarray(255 - RGB)]
        ),
    }.items():
        yield name, Stored(data, by_pillow(plain), 2)


def _tiffs() -> Iterator[tuple[str, Stored]]:
    rgba = np.dstack([RGB, ALPHA])
    deep = np.dstack([_DEEP_RGB, ALPHA.astype(np.uint16) * 257])
    weighted = np.dstack([(_DEEP_RGB * (ALPHA[..., None] / 255)).astype(np.uint16), deep[..., 3]])
    yield "tiff white is zero", Stored(tiff(GREY, photometric="miniswhite"), three(255 - GREY))
    yield "tiff 16 white is zero", Stored(tiff(65535 - _DEEP_GREY, photometric="miniswhite"), three(GREY))
    yield "tiff 16 big-endian", Stored(tiff(_DEEP_GREY, byteorder=">"), three(GREY))
    yield "tiff 16", Stored(tiff(_DEEP_RGB, photometric="rgb"), RGB)
    yield "tiff 16 tiles", Stored(tiff(_DEEP_GREY, tile=(16, 16)), three(GREY))
    for bits in (10, 12, 14):
        body = packed(_DEEP_GREY >> (16 - bits), bits).tobytes()
        yield f"tiff {bits} packed", Stored(plain_tiff(body, bits), three(GREY))
    for name, pixels, extra, means in (
        ("alpha", rgba, "unassalpha", on_black(RGB)),
        ("premultiplied", np.dstack([on_black(RGB), ALPHA]), "assocalpha", on_black(RGB)),
        ("no alpha", rgba, "unspecified", RGB),
        ("16 alpha", deep, "unassalpha", on_black(RGB)),
        ("16 premultiplied", weighted, "assocalpha", on_black(RGB)),
        ("16 no alpha", deep, "unspecified", RGB),
    ):
        yield f"tiff {name}", Stored(tiff(pixels, photometric="rgb", extrasamples=[extra]), means)
    yield "tiff planes", Stored(tiff(np.moveaxis(RGB, -1, 0), photometric="rgb", planarconfig="separate"), RGB)
    yield "tiff big", Stored(tiff(RGB, photometric="rgb", bigtiff=True), RGB)
    yield "tiff pages", Stored(saved(RGB, "TIFF", save_all=True, append_images=[Image.fromarray(255 - RGB)]), RGB)
    bright = GREY > 100
    yield "tiff fax", Stored(saved(bright, "TIFF", compression="group4"), three(bright * 255))
    for name in ("tiff_lzw", "tiff_adobe_deflate", "packbits"):
        yield f"tiff {name}", Stored(saved(RGB, "TIFF", compression=name), RGB)
    data = saved(RGB, "TIFF", compression="jpeg", quality=95)
    yield "tiff jpeg", Stored(data, by_pillow(data), 3)
    yield "tiff predictor", Stored(saved(RGB, "TIFF", compression="tiff_lzw", tiffinfo={317: 2}), RGB)
    palette = Image.fromarray(RGB).quantize(64)
    yield "tiff palette", Stored(saved(palette, "TIFF"), np.array(palette.convert("RGB")))
    data = saved(Image.fromarray(RGB).convert("CMYK"), "TIFF")
    yield "tiff cmyk", Stored(data, by_pillow(data))


def jpeg_turned_late(orientation: int, order: str, kind: int) -> bytes:
    """A JPEG whose Exif segment follows another one of the same kind; the orientation has 16 (3) or 32 bits (4)."""
    value = struct.pack(order + ("HH" if kind == 3 else "I"), *((orientation, 0) if kind == 3 else (orientation,)))
    entry = struct.pack(order + "HHHI", 1, 274, kind, 1) + value + bytes(4)
    exif = b"Exif\0\0" + (b"II*\0\x08\0\0\0" if order == "<" else b"MM\0*\0\0\0\x08") + entry
    segments = [b"http://ns.adobe.com/xap/1.0/\0<x/>", exif]
    plain = saved(RGB, "JPEG", quality=100, subsampling=0)
    return plain[:2] + b"".join(b"\xff\xe1" + struct.pack(">H", 2 + len(one)) + one for one in segments) + plain[2:]


def _turned() -> Iterator[tuple[str, Stored]]:
    options: dict[str, dict[str, Any]] = {
        "JPEG": {"quality": 100, "subsampling": 0},
        "PNG": {},
        "WEBP": {"lossless": True},
        "TIFF": {},
    }
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        for kind, settings in options.items():
            data = saved(RGB, kind, exif=exif, **settings)
            yield f"{kind} orientation {orientation}", Stored(data, by_pillow(data), 2)
        data = jpeg_turned_late(orientation, "<>"[orientation % 2], 3 + orientation // 2 % 2)
        yield f"JPEG late orientation {orientation}", Stored(data, by_pillow(data), 2)
        deep = tiff(_DEEP_RGB, photometric="rgb", extratags=[(274, 3, 1, orientation, True)])
        upright = Image.fromarray(RGB)
        upright.getexif()[0x0112] = orientation
        yield f"TIFF 16 orientation {orientation}", Stored(deep, np.asarray(ImageOps.exif_transpose(upright)))


def refused() -> dict[str, tuple[bytes, str]]:
    """Name -> file and a part of the message: values without a plain meaning as 8-bit colours."""
    unit = GREY / 255
    jpeg = bytearray(saved(RGB, "JPEG"))
    frame = jpeg.index(b"\xff\xc0")
    twelve, lossless, arithmetic = bytearray(jpeg), bytearray(jpeg), bytearray(jpeg)
    twelve[frame + 4], lossless[frame + 1], arithmetic[frame + 1] = 12, 0xC3, 0xC9
    swapped = struct.pack("<III", 0xFF, 0xFF00, 0xFF0000)
    odd = bmp(np.dstack([RGB[::-1], ALPHA]).tobytes(), 32, packing=3, masks=swapped)
    return {
        "tiff float": (tiff(unit.astype(np.float32)), "samples are floats; unsigned integers of 8 or 16 bits"),
        "tiff half": (tiff(unit.astype(np.float16)), "samples are floats"),
        "tiff double": (tiff(unit), "samples are floats"),
        "tiff nan": (tiff(np.full((HEIGHT, WIDTH), np.nan, np.float32)), "samples are floats"),
        "tiff signed": (tiff(GREY.astype(np.int16)), "samples are signed integers"),
        "tiff 32": (tiff(GREY.astype(np.uint32)), "32 bits per sample; 8 or 16 are allowed"),
        "tiff lab": (saved(Image.fromarray(RGB).convert("LAB"), "TIFF"), "colours stored as CIE Lab"),
        "tiff grey alpha": (
            tiff(
                np.dstack([GREY, ALPHA]), photometric="minisblack", extrasamples=["unassalpha"], planarconfig="contig"
            ),
            "a grey TIFF with an alpha or other further channel; save it without",
        ),
        "tiff 16 planes": (
            tiff(np.moveaxis(_DEEP_RGB, -1, 0), photometric="rgb", planarconfig="separate"),
            "16-bit channels in separate planes; save it with interleaved channels",
        ),
        "jpeg 12": (bytes(twelve), "a JPEG of 12 bits per sample; 8 are allowed"),
        "jpeg lossless": (bytes(lossless), "a lossless JPEG; save it as a baseline or progressive JPEG"),
        "jpeg arithmetic": (bytes(arithmetic), "an arithmetic-coded JPEG; save it as"),
        "bmp rgb order": (odd, "an unusual order of its channels; save it with 24 bits"),
        "avif": (b"\0\0\0\x1cftypavif" + bytes(99), "an AVIF image; allowed are JPEG"),
        "heic": (b"\0\0\0\x18ftypheic" + bytes(99), "an HEIC image; allowed are JPEG"),
        "jpeg 2000": (b"\0\0\0\x0cjP  \r\n\x87\n" + bytes(99), "a JPEG 2000 image; allowed"),
        "openexr": (b"\x76\x2f\x31\x01" + bytes(99), "an OpenEXR image; allowed"),
        "radiance": (b"#?RADIANCE\n" + bytes(99), "a Radiance HDR image; allowed"),
        "lfs": (b"version https://git-lfs.github.com/spec/v1\noid", "a pointer of Git LFS; fetch the file with"),
        "web page": (b"<!DOCTYPE html><html>404", "a web page; allowed"),
    }
