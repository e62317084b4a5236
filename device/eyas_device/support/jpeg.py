"""JPEG files: the frame header, and whether the file is whole.

Source: ITU-T T.81, annex B.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

_EOI, _SOS = 0xD9, 0xDA
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_KINDS = {0xC3: "lossless", 0xC5: "hierarchical", 0xC6: "hierarchical", 0xC7: "hierarchical", 0xCB: "lossless"}
"""Frame markers that OpenCV does not decode; those above are coded arithmetically, besides."""
_IN_SCAN = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")
"""A marker in entropy-coded data, where FF is followed by 00 or by a restart marker (B.1.1.5)."""


class JpegFrame(NamedTuple):
    """The first frame header."""

    marker: int
    precision: int
    """Bits per sample."""
    width: int
    height: int


def jpeg_frame(data: bytes | memoryview) -> JpegFrame | None:
    """The first frame header (B.2.2); None without one."""
    for marker, at in _segments(data):
        if marker in _FRAMES:
            if at + 9 > len(data):
                return None
            height, width = _big(data, at + 5), _big(data, at + 7)
            return JpegFrame(marker, data[at + 4], width, height) if width and height else None
    return None


def jpeg_exif(data: bytes | memoryview) -> bytes:
    """The first Exif segment; empty if there is none."""
    for marker, at in _segments(data):
        if marker == 0xE1 and bytes(data[at + 4 : at + 10]) == b"Exif\0\0":
            return bytes(data[at + 4 : at + 2 + _big(data, at + 2)])
    return b""


def jpeg_problem(frame: JpegFrame) -> str:
    """Why a JPEG is not decoded, the same with every OpenCV; empty if it is."""
    if frame.marker > 0xC8:
        return "an arithmetic-coded JPEG; save it as a baseline or progressive JPEG"
    if frame.marker in _KINDS:
        return f"a {_KINDS[frame.marker]} JPEG; save it as a baseline or progressive JPEG"
    return f"a JPEG of {frame.precision} bits per sample; 8 are allowed" if frame.precision != 8 else ""


def is_cut_short(data: bytes | memoryview) -> bool:
    """Whether a JPEG ends before its end marker; OpenCV before 4.11 fills what is missing with grey, silently.

    Bytes behind the end marker (padding, a second image, a film) are no concern; another image's start before it is. A
    file that lacks the end marker alone cannot be told from one that lacks more.
    """
    data = bytes(data)
    start = next((at for marker, at in _segments(data) if marker == _SOS), None)
    if start is None:
        return True
    if data.endswith(b"\xff\xd9") and not _starts_within(data, start):
        return False  # nearly all: the search below takes longer
    position = start + 2 + max(2, _big(data, start + 2))
    while found := _IN_SCAN.search(data, position):
        marker = data[found.start() + 1]
        if marker in (_EOI, 0xD8):
            return marker != _EOI
        position = found.end() if marker == 0x01 else found.start() + 2 + max(2, _big(data, found.start() + 2))
    return True


def _starts_within(data: bytes, start: int) -> bool:
    """Whether another JPEG may start behind `start`; much faster than `bytes.find`."""
    import numpy as np  # not for verbs that decode nothing

    shifts = (start, start + 1)
    return any(bool((np.frombuffer(data, "<u2", (len(data) - at) // 2, at) == 0xD8FF).any()) for at in shifts)


def _segments(data: bytes | memoryview) -> Iterator[tuple[int, int]]:
    """Marker and position of the segments up to the first scan; bytes between them are skipped, as libjpeg does."""
    position, end = 2, len(data) - 3
    while position < end:
        if data[position] != 0xFF:
            found = bytes(data[position:]).find(b"\xff")
            if found < 0:
                return
            position += found
            continue
        marker = data[position + 1]
        if marker == 0xFF:  # fill
            position += 1
        elif marker in (0x00, 0x01) or 0xD0 <= marker <= 0xD8:  # stands alone
            position += 2
        else:
            yield marker, position
            if marker in (_EOI, _SOS):
                return
            position += 2 + max(2, _big(data, position + 2))


def _big(data: bytes | memoryview, at: int) -> int:
    return int.from_bytes(data[at : at + 2], "big")
