"""Sizes from headers: as the decoder finds them, for every format; and what is too large costs no memory."""

from __future__ import annotations

import io
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from eyas_device.errors import ImageError
from eyas_device.preprocess import decode, read_image
from eyas_device.support.image_header import MAX_PIXELS, MAX_SIDE, header_size

_SIDES = st.integers(1, 70)


def _encode(suffix: str, *flags: int, depth: type = np.uint8, channels: int = 3) -> Callable[[int, int], bytes]:
    def encode(width: int, height: int) -> bytes:
        pixels = np.random.default_rng(width).integers(0, 255, (height, width, channels)).astype(depth)
        good, data = cv2.imencode(suffix, pixels, list(flags))
        assert good
        return data.tobytes()

    return encode


def _save(kind: str, mode: str = "RGB", **options: Any) -> Callable[[int, int], bytes]:
    def save(width: int, height: int) -> bytes:
        stream = io.BytesIO()
        Image.new(mode, (width, height), 1).save(stream, kind, **options)
        return stream.getvalue()

    return save


def _os2_bmp(width: int, height: int) -> bytes:
    rows = bytes((3 * width + 3) // 4 * 4 * height)
    return struct.pack("<2sIHHIIHHHH", b"BM", 26 + len(rows), 0, 0, 26, 12, width, height, 1, 24) + rows


def _top_down_bmp(width: int, height: int) -> bytes:
    data = bytearray(_encode(".bmp")(width, height))
    data[22:26] = struct.pack("<i", -height)
    return bytes(data)


def _exif_jpeg(width: int, height: int) -> bytes:
    """A JPEG with a thumbnail of another size in its Exif segment, and fill bytes between segments."""
    whole, thumbnail = _encode(".jpg")(width, height), _encode(".jpg")(9, 7)
    exif = b"Exif\0\0" + thumbnail
    return whole[:2] + b"\xff\xe1" + struct.pack(">H", 2 + len(exif)) + exif + b"\xff\xff" + whole[2:]


ENCODERS: dict[str, Callable[[int, int], bytes]] = {
    "jpeg": _encode(".jpg"),
    "jpeg progressive": _encode(".jpg", cv2.IMWRITE_JPEG_PROGRESSIVE, 1),
    "jpeg restarts": _encode(".jpg", cv2.IMWRITE_JPEG_RST_INTERVAL, 1),
    "jpeg cmyk": _save("JPEG", "CMYK"),
    "jpeg thumbnail": _exif_jpeg,
    "png": _encode(".png"),
    "png 16": _encode(".png", depth=np.uint16),
    "png alpha": _encode(".png", channels=4),
    "png palette": _save("PNG", "P"),
    "bmp": _encode(".bmp"),
    "bmp top down": _top_down_bmp,
    "bmp os/2": _os2_bmp,
    "webp": _encode(".webp", cv2.IMWRITE_WEBP_QUALITY, 50),
    "webp lossless": _encode(".webp", cv2.IMWRITE_WEBP_QUALITY, 101),
    "webp alpha": _save("WEBP", "RGBA", quality=50),
    "tiff": _encode(".tif"),
    "tiff 16": _encode(".tif", depth=np.uint16),
    "tiff big": _save("TIFF", big_tiff=True),
    "tiff deflate": _save("TIFF", compression="tiff_deflate"),
    "gif": _save("GIF", "P"),
}


@pytest.mark.parametrize("kind", ENCODERS)
@settings(max_examples=15, deadline=None)
@given(width=_SIDES, height=_SIDES)
def test_the_header_has_the_decoders_size(kind: str, width: int, height: int) -> None:
    data = ENCODERS[kind](width, height)
    assert header_size(data) == (width, height)
    assert header_size(memoryview(data)) == (width, height)
    assert decode(data).shape == (height, width, 3)


@pytest.mark.parametrize("kind", ENCODERS)
def test_a_damaged_header_is_an_error_or_a_size_within_bounds(kind: str) -> None:
    data, rng = ENCODERS[kind](33, 21), np.random.default_rng(0)
    for cut in range(min(len(data), 120)):
        header_size(data[:cut])
        damaged = bytearray(data)
        damaged[cut] = rng.integers(256)
        try:
            pixels = decode(bytes(damaged), where="damaged")
        except ImageError as error:
            assert str(error).startswith("damaged: ")
        else:
            assert max(pixels.shape) <= MAX_SIDE and pixels.shape[0] * pixels.shape[1] <= MAX_PIXELS


_STARTS = [b"", b"\xff\xd8\xff\xc0", b"BM", b"RIFF....WEBPVP8X", b"II\x2b\x00", b"GIF8"]


@given(st.binary(max_size=64), st.sampled_from(_STARTS))
def test_any_bytes_are_an_image_or_an_error(data: bytes, start: bytes) -> None:
    with suppress(ImageError):
        decode(start + data)


@pytest.mark.parametrize(("width", "height"), [(4056, 3040), (8064, 6048)])
def test_the_largest_cameras_pass(width: int, height: int, tmp_path: Path) -> None:
    path = tmp_path / "large.jpg"
    assert cv2.imwrite(str(path), np.zeros((height, width, 3), np.uint8))
    assert read_image(path).shape == (height, width, 3)


def _png_bomb(width: int = 16_000, height: int = 16_000) -> bytes:
    """One bit a pixel, all black: 32 kB."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    rows = zlib.compress(bytes((width // 8 + 1) * height), 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def _tiff(width: int, height: int, *, tile: int = 0, order: str = "<") -> bytes:
    """An image file directory without pixels: sides, one bit a pixel, perhaps tiles."""
    tags = [(256, 4, width), (257, 4, height), (258, 3, 1), (259, 3, 8), (262, 3, 1)]
    tags += [(322, 4, tile), (323, 4, tile), (324, 4, 200), (325, 4, 50)] if tile else [(273, 4, 200), (279, 4, 50)]
    start = (b"II\x2a\x00" if order == "<" else b"MM\x00\x2a") + struct.pack(order + "I", 8)
    entries = b"".join(
        struct.pack(order + ("HHII" if kind == 4 else "HHIHH"), tag, kind, 1, *([n] if kind == 4 else [n, 0]))
        for tag, kind, n in tags
    )
    return start + struct.pack(order + "H", len(tags)) + entries + bytes(4) + bytes(200)


BOMBS = {
    "png": _png_bomb(),
    "jpeg": b"\xff\xd8\xff\xc0\x00\x11\x08\xff\xdc\xff\xdc\x03\x01\x22\x00\x02\x11\x01\x03\x11\x01" + bytes(2000),
    "gif": b"GIF89a" + struct.pack("<HH", 16_000, 16_000) + bytes(100),
    "bmp": struct.pack("<2sIIIIiiHH", b"BM", 0, 0, 54, 40, 16_000, -16_000, 1, 8) + bytes(2000),
    "webp": b"RIFF\x40\0\0\0WEBPVP8X\x0a\0\0\0\0\0\0\0" + 2 * struct.pack("<I", 15_999)[:3] + bytes(40),
    "tiff": _tiff(16_000, 16_000),
    "tiff big-endian": _tiff(16_000, 16_000, order=">"),
    "tiff tiles": _tiff(8, 8, tile=16_000),
    "png side": _png_bomb(20_000, 8),
}


@pytest.mark.parametrize("kind", BOMBS)
def test_what_is_too_large_is_named(kind: str) -> None:
    with pytest.raises(ImageError, match=r"^in/x: \d+x\d+ pixels.*at most (50|16384 a side) are allowed"):
        decode(BOMBS[kind], where="in/x")


_OTHERS = {
    "pnm": b"P6 30000 30000 255 ",
    "sun raster": b"\x59\xa6\x6a\x95" + bytes(40),
    "hdr": b"#?RADIANCE\n",
    "avif": b"\0\0\0\x1cftypavif",
    "jpeg 2000": b"\0\0\0\x0cjP  ",
}


@pytest.mark.parametrize("kind", _OTHERS)
def test_formats_without_a_known_header_are_not_decoded(kind: str) -> None:
    with pytest.raises(ImageError, match="allowed are JPEG, PNG, BMP, WebP, TIFF and GIF"):
        decode(_OTHERS[kind] + bytes(1000))


def _long_chunk() -> bytes:
    """A small PNG whose IDAT chunk says that it has 2 GiB."""
    data = bytearray(_encode(".png")(8, 8))
    at = data.index(b"IDAT") - 4
    data[at : at + 4] = b"\x7f\xff\xff\xff"
    return bytes(data)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (BOMBS["png"], "16000x16000 pixels, 256.0 megapixels; at most 50 are allowed: scale it down first"),
        (
            _long_chunk(),
            "not an image that can be decoded: a PNG that is cut short or damaged; allowed are JPEG, PNG, BMP, WebP, "
            "TIFF and GIF",
        ),
    ],
    ids=["pixels", "chunk"],
)
def test_a_bomb_costs_no_memory(data: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "bomb.png"
    path.write_bytes(data)
    assert path.stat().st_size < 50_000
    script = (
        "import resource, sys; from pathlib import Path; from eyas_device.preprocess import read_image\n"
        "from eyas_device.errors import ImageError\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "try: read_image(Path(sys.argv[1]))\n"
        "except ImageError as error: print(error)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    done = subprocess.run([sys.executable, "-c", script, str(path)], capture_output=True, text=True, check=True)
    printed, grown_kb = done.stdout.splitlines()
    assert printed == f"{path}: {message}"
    assert int(grown_kb) < 2_000
