"""PNG files: their chunks, and the file that a decoder is given.

Decoders read ancillary chunks in their own ways (which frame of an animation, whose orientation) and complain about
damaged ones on standard error; so they are read here, and the decoder gets the image alone.
"""

from __future__ import annotations

import zlib
from typing import NamedTuple

_SIGNATURE = 8
_MAX_CHUNKS = 100_000
_NEEDED = (b"IHDR", b"PLTE", b"IDAT", b"IEND")
_KEPT = (b"tRNS", b"eXIf", b"acTL")
_COLOURS = {0: "grey", 2: "colour", 3: "palette", 4: "grey", 6: "colour"}


class Png(NamedTuple):
    """What the chunks of a PNG say."""

    data: bytes | memoryview
    """The file without ancillary chunks; a palette's transparency is composited on black."""
    bits: int
    colour: str
    """grey, colour or palette."""
    alpha: bool
    """Whether it has an alpha channel or a transparent palette."""
    key: tuple[int, ...]
    """The one transparent grey or red-green-blue value, as stored; empty if there is none."""
    exif: bytes
    animated: bool


def png_chunks(data: bytes | memoryview) -> list[tuple[bytes, int, int]] | None:
    """Type, start and end of every chunk up to IEND; None if the file is cut short or no PNG.

    Source: ISO/IEC 15948, 5.3 and 11.2.2: IHDR is the first chunk. A chunk that is longer than the file is damage, and
    OpenCV 5.0 allocates its length (up to 2 GiB) before it notices. What follows IEND is ignored, as decoders do.
    """
    chunks = []
    position = _SIGNATURE
    for _ in range(_MAX_CHUNKS):
        kind = bytes(data[position + 4 : position + 8])
        end = position + 12 + int.from_bytes(data[position : position + 4], "big")
        if len(kind) < 4 or end > len(data):
            return None
        chunks.append((kind, position, end))
        if kind == b"IEND":
            return chunks if chunks[0][0] == b"IHDR" and chunks[0][2] == _SIGNATURE + 25 else None
        position = end
    return None


def read_png(data: bytes | memoryview) -> Png | None:
    """Read the chunks of a PNG; None if it is cut short or damaged."""
    chunks = png_chunks(data)
    if chunks is None:
        return None
    found = {kind: bytes(data[start + 8 : end - 4]) for kind, start, end in reversed(chunks) if kind in _KEPT}
    bits, kind = data[24], data[25]
    colour = _COLOURS.get(kind)
    if colour is None or bits not in (1, 2, 4, 8, 16):
        return None
    transparency = found.get(b"tRNS", b"")
    key = tuple(int.from_bytes(transparency[at : at + 2], "big") for at in (0, 2, 4)[: 3 if kind == 2 else 1])
    opaque_palette = transparency if kind == 3 else b""
    return Png(
        data=_image_alone(data, chunks, opaque_palette),
        bits=bits,
        colour=colour,
        alpha=kind in (4, 6) or bool(transparency),
        key=key if kind in (0, 2) and len(transparency) >= 2 * len(key) else (),
        exif=found.get(b"eXIf", b""),
        animated=b"acTL" in found,
    )


def _image_alone(
    data: bytes | memoryview, chunks: list[tuple[bytes, int, int]], transparency: bytes
) -> bytes | memoryview:
    """The file with the chunks that the image needs; the palette is composited on black with its `transparency`."""
    if all(kind in _NEEDED for kind, _, _ in chunks):
        return data
    parts = [bytes(data[:_SIGNATURE])]
    for kind, start, end in chunks:
        if kind == b"PLTE" and transparency:
            alphas = transparency.ljust(256, b"\xff")
            body = bytes((value * alphas[i // 3] + 127) // 255 for i, value in enumerate(data[start + 8 : end - 4]))
            parts.append(_chunk(kind, body))
        elif kind in _NEEDED:
            parts.append(bytes(data[start:end]))
    return b"".join(parts)


def _chunk(kind: bytes, body: bytes) -> bytes:
    return len(body).to_bytes(4, "big") + kind + body + zlib.crc32(kind + body).to_bytes(4, "big")
