"""Encoded images of many kinds, and how they are damaged."""

from __future__ import annotations

import functools
import io
from collections.abc import Iterable, Iterator

import cv2
import numpy as np

FORMATS = (".png", ".jpg", ".bmp", ".webp", ".tif")
"""Suffixes of files that hold what they say."""


@functools.cache
def encoded_image(number: int) -> bytes:
    """An encoded image; other numbers are other images."""
    pixels = np.random.default_rng(number).integers(0, 256, (12, 16, 3), dtype=np.uint8)
    return cv2.imencode(FORMATS[number % len(FORMATS)], pixels)[1].tobytes()


@functools.cache
def sample_images() -> dict[str, bytes]:
    """Kind of image -> one of it, encoded."""
    return dict(_draw_samples())


def damage(data: bytes, changes: Iterable[tuple[str, int, int]]) -> bytes:
    """Apply changes, each of a kind, a position and a byte, to a file."""
    for kind, place, value in changes:
        at = place % (len(data) + 1)
        byte = bytes([value])
        data = {
            "flip": data[:at] + byte + data[at + 1 :],
            "cut": data[:at],
            "insert": data[:at] + byte * 3 + data[at:],
            "zero": data[:at] + bytes(min(64, len(data) - at)) + data[at + 64 :],
            "append": data + byte * 20,
            "repeat": data + data[:at],
        }[kind]
    return data


def _draw_samples() -> Iterator[tuple[str, bytes]]:
    from PIL import Image

    rng = np.random.default_rng(7)
    pixels = rng.integers(0, 256, (20, 24, 3), dtype=np.uint8)
    for suffix in (*FORMATS, ".gif"):
        yield suffix, cv2.imencode(suffix, pixels)[1].tobytes()
    yield "deep.png", cv2.imencode(".png", pixels.astype(np.uint16) * 16)[1].tobytes()
    yield "float.tif", cv2.imencode(".tif", pixels.astype(np.float32))[1].tobytes()
    image = Image.fromarray(pixels)
    for name, kind, mode, more in (
        ("cmyk.jpg", "JPEG", "CMYK", {}),
        ("progressive.jpg", "JPEG", "RGB", {"progressive": True}),
        ("palette.png", "PNG", "P", {}),
        ("alpha.png", "PNG", "RGBA", {}),
        ("bit.png", "PNG", "1", {}),
        ("lzw.tif", "TIFF", "RGB", {"compression": "tiff_lzw"}),
        ("pages.tif", "TIFF", "RGB", {"save_all": True, "append_images": [image]}),
        ("animated.webp", "WEBP", "RGB", {"save_all": True, "append_images": [image]}),
    ):
        stream = io.BytesIO()
        image.convert(mode).save(stream, kind, **more)
        yield name, stream.getvalue()
