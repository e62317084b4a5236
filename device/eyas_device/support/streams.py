"""Standard streams that fail: closed ones, full disks, closed terminals and character sets that lack a character.

A camera has nobody who watches its output, so no stream may end the program that writes to it. `open_streams` replaces
the standard streams for the time of a command:

- A closed descriptor 0, 1 or 2 is opened on /dev/null: otherwise the next file or socket would get its number, and with
  it whatever a library prints.
- A write that fails is dropped and counted; later ones are tried again.
- A reader that has closed the pipe is reported once, as `BrokenPipeError`, for standard output only.
- A character that the encoding lacks is replaced by one that looks like it (lines of a table, "…", "°"), or escaped.
"""

from __future__ import annotations

import codecs
import io
import os
import re
import select
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TextIO

PLAIN = "eyas.plain"
"""The name of the error handler for encodings that lack a character."""

_LIKE = {
    **dict.fromkeys("─━═┄┅┈┉╌╍╴╶╸╺–—‐‑−", "-"),  # noqa: RUF001
    **dict.fromkeys("│┃║┆┇┊┋╎╏╵╷╹╻", "|"),
    **dict.fromkeys("•·●▪", "*"),
    **dict.fromkeys("‘’′", "'"),  # noqa: RUF001
    **dict.fromkeys("“”″", '"'),
    **dict.fromkeys("µμ", "u"),
    **dict(zip("…°×→←█�", "~ x><#?", strict=True)),  # noqa: RUF001
    **{"±": "+-", "≥": ">=", "≤": "<="},  # noqa: PIE800
}
"""Typography -> what to write where the encoding lacks it, as wide where columns depend on it."""


def _replace_plainly(error: UnicodeError) -> tuple[str | bytes, int]:
    """Replace what an encoding lacks, as an error handler of `codecs`."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return "".join(map(_plain, error.object[error.start : error.end])), error.end


def _plain(character: str) -> str:
    if "\N{BOX DRAWINGS LIGHT HORIZONTAL}" <= character <= "\N{BOX DRAWINGS HEAVY LEFT AND LIGHT RIGHT}":
        return _LIKE.get(character, "+")
    return _LIKE.get(character) or character.encode("ascii", "backslashreplace").decode()


codecs.register_error(PLAIN, _replace_plainly)


class Output(io.RawIOBase):
    """A descriptor that takes what can be written; what it did not take is counted."""

    def __init__(self, descriptor: int, *, reports_reader: bool) -> None:
        super().__init__()
        self.error: OSError | None = None
        """Error of the last write; None if it succeeded."""
        self.first_error: OSError | None = None
        """The first error of all, other than a reader that left."""
        self.reported = False
        """Whether somebody has reported the error already."""
        self._descriptor, self._reports_reader = descriptor, reports_reader
        self._torn = self._abandoned = False

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._descriptor

    def isatty(self) -> bool:
        return os.isatty(self._descriptor)

    def write(self, data: object, /) -> int:
        """Write all of `data` or drop the rest; returns its length. `BrokenPipeError` once if the reader has left."""
        view = memoryview(data).cast("B")  # type: ignore[arg-type]
        if self._abandoned:
            return len(view)
        try:
            if self._torn:  # the next line must not continue one that was cut
                self._write_all(memoryview(b"\n"))
                self._torn = False
            self._write_all(view)
            self.error = None
        except BrokenPipeError:
            self._abandoned = True
            if self._reports_reader:
                raise
        except OSError as error:
            self.error = error
            self.first_error = self.first_error or error
        return len(view)

    def _write_all(self, view: memoryview) -> None:
        left = view
        while left:
            try:
                left = left[os.write(self._descriptor, left) :]
            except BlockingIOError:  # somebody made the pipe non-blocking
                select.select([], [self._descriptor], [])
                continue
            except OSError:
                self._torn = self._torn or len(left) < len(view)
                raise


@contextmanager
def open_streams() -> Iterator[None]:
    """Replace `sys.stdout` and `sys.stderr` by streams that cannot fail, until the block ends.

    Streams that are not those of the process (a test's, say) stay.
    """
    for number, mode in ((0, os.O_RDONLY), (1, os.O_WRONLY), (2, os.O_WRONLY)):
        _open_closed(number, mode)
    sys.stdin = sys.stdin or open(0, closefd=False, encoding="utf-8")  # noqa: SIM115 - lives as long as the process
    before = sys.stdout, sys.stderr
    sys.stdout = _replaced(sys.stdout, 1, reports_reader=True)
    sys.stderr = _replaced(sys.stderr, 2, reports_reader=False)
    try:
        yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):
                stream.flush()
        sys.stdout, sys.stderr = before


def output_of(stream: TextIO) -> Output | None:
    """What a stream of `open_streams` writes to; None for another stream."""
    raw = getattr(getattr(stream, "buffer", None), "raw", None)
    return raw if isinstance(raw, Output) else None


def to_json(value: object, stream: TextIO) -> str:
    r"""Encode `value` as one line of JSON that `stream` can carry: what its encoding lacks is written as `\uXXXX`."""
    import msgspec  # not for `--help`

    return escape_json(msgspec.json.encode(value).decode(), stream)


def escape_json(text: str, stream: TextIO) -> str:
    r"""Write what the encoding of `stream` lacks, and what would act on a terminal, as `\uXXXX` in a text of JSON."""
    if not text.isprintable():  # line breaks stand between values: within strings JSON has escaped them
        text = "".join(c if c.isprintable() or c == "\n" else _escape_character(c) for c in text)
    encoding = getattr(stream, "encoding", None) or "utf-8"
    try:
        text.encode(encoding)
    except (UnicodeEncodeError, LookupError):
        return re.sub(r"[^\x00-\x7f]", lambda match: _escape_character(match[0]), text)
    return text


def _escape_character(character: str) -> str:
    units = character.encode("utf-16-be", "surrogatepass")
    return "".join(f"\\u{units[n]:02x}{units[n + 1]:02x}" for n in range(0, len(units), 2))


def _open_closed(number: int, mode: int) -> None:
    try:
        os.fstat(number)
    except OSError:
        opened = os.open(os.devnull, mode)
        if opened != number:
            os.dup2(opened, number)
            os.close(opened)


def _replaced(stream: TextIO | None, number: int, *, reports_reader: bool) -> TextIO:
    try:
        if stream is not None and stream.fileno() != number:
            return stream
    except (OSError, ValueError):
        return stream or sys.__stderr__ or io.StringIO()
    raw = Output(number, reports_reader=reports_reader)
    live = number == 2 or raw.isatty() or bool(os.environ.get("PYTHONUNBUFFERED"))
    return io.TextIOWrapper(
        io.BufferedWriter(raw),
        encoding=getattr(stream, "encoding", None) or "utf-8",
        errors=PLAIN,
        line_buffering=live,
    )
