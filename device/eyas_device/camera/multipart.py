"""The parts of a `multipart/x-mixed-replace` stream, from bytes in pieces of any size.

Cameras differ: some announce each part's length and some do not, some write the boundary's leading dashes into the
header and some do not, some end lines with a bare line feed. All of these are read. Everything is bounded.

Source: RFC 2046, 5.1.1 (common syntax of multipart).
"""

from __future__ import annotations

import re

MAX_PART = 16 << 20
"""Bytes that one part may have."""
MAX_HEADER = 16 << 10
"""Bytes that the header of one part may have."""
_MAX_BOUNDARY = 200
_MAX_DELIMITER = _MAX_BOUNDARY + 200
_BLANK_LINE = re.compile(rb"(?:^|\n)\r?\n")
_LENGTH = re.compile(rb"^content-length[ \t]*:[ \t]*(\d{1,20})[ \t]*\r?$", re.IGNORECASE | re.MULTILINE)


class Multipart:
    """Fed with bytes, gives parts; the same parts however the bytes are cut."""

    def __init__(self, boundary: str, *, max_part: int = MAX_PART, max_header: int = MAX_HEADER) -> None:
        """`boundary` is the parameter of the content type. Raises `ValueError` if it cannot be one."""
        if not 1 <= len(boundary) <= _MAX_BOUNDARY or not boundary.isascii() or not boundary.isprintable():
            raise ValueError(f"its boundary {boundary[:80]!r} is not 1 to {_MAX_BOUNDARY} printable characters")
        token = re.escape(boundary.strip().lstrip("-").encode())
        # Bounded repeats keep the length of a delimiter, and with it the work for hostile bytes, bounded.
        self._delimiter = re.compile(rb"(?:^|\r?\n)-{2,80}" + token + rb"(--)?[ \t]{0,80}\r?\n")
        self._max_part, self._max_header = max_part, max_header
        self._buffer = bytearray()
        self._searched = 0
        self._where = "between"
        self._length: int | None = None

    @property
    def ended(self) -> bool:
        """Whether the stream's closing delimiter was read; what is fed after it is ignored."""
        return self._where == "ended"

    def feed(self, data: bytes) -> None:
        """Take the next bytes of the stream."""
        if not self.ended:
            self._buffer += data

    def part(self) -> bytes | None:
        """The body of the next part that is complete; None if more bytes are needed or the stream has ended.

        Raises `ValueError`, again and again, where the stream breaks the bounds.
        """
        while True:
            if self._where == "between" and not self._past_delimiter():
                return None
            if self._where == "header" and not self._past_header():
                return None
            if self._where == "ended":
                return None
            if self._where == "body":
                return self._body()

    def _past_delimiter(self) -> bool:
        found = self._find(self._delimiter, self._max_part + _MAX_DELIMITER, "no boundary")
        if found is None:
            return False
        self._enter("ended" if found[1] else "header", found.end())
        return True

    def _past_header(self) -> bool:
        found = self._find(_BLANK_LINE, self._max_header, "no end of a part's header")
        if found is None:
            return False
        length = _LENGTH.search(self._buffer, 0, found.end())
        self._length = int(length[1]) if length else None
        if self._length is not None and self._length > self._max_part:
            raise ValueError(f"it announces a part of {self._length} bytes; at most {self._max_part} are allowed")
        self._enter("body", found.end())
        return True

    def _body(self) -> bytes | None:
        if self._length is not None:
            if len(self._buffer) < self._length:
                return None
            body = bytes(self._buffer[: self._length])
            self._enter("between", self._length)
            return body
        found = self._find(self._delimiter, self._max_part + _MAX_DELIMITER, "no end of a part")
        if found is None:
            return None
        body = bytes(self._buffer[: found.start()])
        self._enter("ended" if found[1] else "header", found.end())
        return body

    def _enter(self, where: str, used: int) -> None:
        del self._buffer[:used]
        self._searched = 0
        self._where = where

    def _find(self, pattern: re.Pattern[bytes], limit: int, fault: str) -> re.Match[bytes] | None:
        """Where `pattern` ends within `limit` bytes; None if it may still come. Raises `ValueError` if it cannot."""
        found = pattern.search(self._buffer, self._searched)
        if found is not None and found.end() <= limit:
            return found
        if len(self._buffer) > limit:
            raise ValueError(f"{fault} within {limit} bytes")
        self._searched = max(0, len(self._buffer) - _MAX_DELIMITER)
        return None
