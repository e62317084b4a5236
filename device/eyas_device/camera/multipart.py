"""Incremental parsers of `multipart/x-mixed-replace` streams, and of the chunks that they may come in.

Cameras differ: with or without a length for each part, with or without the leading dashes in the header's boundary,
with CRLF or bare line feeds. All of these are accepted, and all sizes are bounded.

Source: RFC 2046, 5.1.1 (common syntax of multipart); RFC 9112, 7.1 (chunks).
"""

from __future__ import annotations

import re

MAX_PART = 16 << 20
"""Maximum size of a part, bytes."""
MAX_HEADER = 16 << 10
"""Maximum size of a part's header, bytes."""
_MAX_BOUNDARY = 200
_MAX_DELIMITER = _MAX_BOUNDARY + 200
_BLANK_LINE = re.compile(rb"(?:^|\n)\r?\n")
_LENGTH = re.compile(rb"^content-length[ \t]*:[ \t]*(\d{1,20})[ \t]*\r?$", re.IGNORECASE | re.MULTILINE)


_MAX_CHUNK_LINE = 4096
_CHUNK_SIZE = re.compile(rb"[ \t]*([0-9a-fA-F]{1,16})[ \t]*(?:;[^\r\n]*)?\r?")


class ChunkDecoder:
    """Removes the chunks' sizes, extensions and line ends from a body; takes bytes in pieces of any size."""

    def __init__(self) -> None:
        self.ended = False
        """Whether the last chunk has been read; bytes after it are ignored."""
        self._line = b""
        self._left = 0
        """Bytes of the present chunk that have not come yet."""
        self._between = False
        """Whether a chunk has ended, but not its line."""

    def decode(self, data: bytes) -> bytes:
        """The body's next bytes. Raises `ValueError` for what is no chunk."""
        body, view = bytearray(), memoryview(data)
        while len(view) and not self.ended:
            if self._left:
                body += view[: self._left]
                taken = min(self._left, len(view))
                self._left -= taken
                self._between = self._left == 0
                view = view[taken:]
                continue
            line, end, rest = bytes(view).partition(b"\n")
            self._line += line
            if len(self._line) > _MAX_CHUNK_LINE:
                raise ValueError(f"the size of a chunk is longer than {_MAX_CHUNK_LINE} bytes")
            view = memoryview(rest)
            if end:
                self._take_line()
        return bytes(body)

    def _take_line(self) -> None:
        line, self._line = self._line, b""
        if self._between and line in (b"", b"\r"):
            self._between = False
            return
        match = _CHUNK_SIZE.fullmatch(line)
        if match is None or self._between:
            raise ValueError(f"{line[:40]!r} is not the size of a chunk")
        self._left = int(match[1], 16)
        self.ended = self._left == 0


class MultipartParser:
    """Takes bytes in chunks of any size and returns parts."""

    def __init__(self, boundary: str, *, max_part: int = MAX_PART, max_header: int = MAX_HEADER) -> None:
        """`boundary` is the parameter of the content type. Raises `ValueError` if it is not valid."""
        if not 1 <= len(boundary) <= _MAX_BOUNDARY or not boundary.isascii() or not boundary.isprintable():
            raise ValueError(f"its boundary {boundary[:80]!r} is not 1 to {_MAX_BOUNDARY} printable characters")
        token = re.escape(boundary.strip().lstrip("-").encode())
        # Bounded repeats bound the length of a delimiter, and so the work for hostile bytes.
        self._delimiter = re.compile(rb"(?:^|\r?\n)-{2,80}" + token + rb"(--)?[ \t]{0,80}\r?\n")
        self._max_part, self._max_header = max_part, max_header
        self._buffer = bytearray()
        self._searched = 0
        self._state = "between"
        self._length: int | None = None

    @property
    def ended(self) -> bool:
        """Whether the closing delimiter has been read; bytes after it are ignored."""
        return self._state == "ended"

    def feed(self, data: bytes) -> None:
        """Add the next bytes of the stream."""
        if not self.ended:
            self._buffer += data

    def next_part(self) -> bytes | None:
        """The body of the next complete part; None if more bytes are needed or the stream has ended.

        Raises `ValueError`, on each call, once the stream exceeds a bound.
        """
        while True:
            if self._state == "between" and not self._past_delimiter():
                return None
            if self._state == "header" and not self._past_header():
                return None
            if self._state == "ended":
                return None
            if self._state == "body":
                return self._body()

    def _past_delimiter(self) -> bool:
        match = self._find(self._delimiter, self._max_part + _MAX_DELIMITER, "no boundary")
        if match is None:
            return False
        self._enter("ended" if match[1] else "header", match.end())
        return True

    def _past_header(self) -> bool:
        match = self._find(_BLANK_LINE, self._max_header, "no end of a part's header")
        if match is None:
            return False
        length = _LENGTH.search(self._buffer, 0, match.end())
        self._length = int(length[1]) if length else None
        if self._length is not None and self._length > self._max_part:
            raise ValueError(f"a part of {self._length} bytes is announced; at most {self._max_part} are allowed")
        self._enter("body", match.end())
        return True

    def _body(self) -> bytes | None:
        if self._length is not None:
            if len(self._buffer) < self._length:
                return None
            body = bytes(self._buffer[: self._length])
            self._enter("between", self._length)
            return body
        match = self._find(self._delimiter, self._max_part + _MAX_DELIMITER, "no end of a part")
        if match is None:
            return None
        body = bytes(self._buffer[: match.start()])
        self._enter("ended" if match[1] else "header", match.end())
        return body

    def _enter(self, state: str, consumed: int) -> None:
        del self._buffer[:consumed]
        self._searched = 0
        self._state = state

    def _find(self, pattern: re.Pattern[bytes], limit: int, problem: str) -> re.Match[bytes] | None:
        """Match `pattern` within `limit` bytes; None if it may still follow. Raises `ValueError` if it cannot."""
        match = pattern.search(self._buffer, self._searched)
        if match is not None and match.end() <= limit:
            return match
        if len(self._buffer) > limit:
            raise ValueError(f"{problem} within {limit} bytes")
        self._searched = max(0, len(self._buffer) - _MAX_DELIMITER)
        return None
