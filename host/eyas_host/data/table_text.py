"""Text of a table as spreadsheets and scripts write it: its encoding, and what is no text at all."""

from __future__ import annotations

import codecs
import re
from pathlib import Path

from eyas_host.support.errors import DataError

_SAVE_AS = "in the spreadsheet, save it as 'CSV UTF-8'"
_PANDAS = "with pandas: read it and write DataFrame.to_csv(path, index=False)"
_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"),  # before UTF-16's, which it begins with
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_BINARY = (
    (b"PK\x03\x04", "a workbook (.xlsx, .ods) or a ZIP archive", _SAVE_AS),
    (b"\xd0\xcf\x11\xe0", "an old workbook (.xls)", _SAVE_AS),
    (b"PAR1", "a Parquet file", _PANDAS),
    (b"ARROW1", "an Arrow or Feather file", _PANDAS),
    (b"\x89HDF", "an HDF5 file", _PANDAS),
    (b"SQLite format 3", "a database", _PANDAS),
    (b"\x80\x04", "a pickle", _PANDAS),
    (b"\x80\x05", "a pickle", _PANDAS),
    (b"\x1f\x8b", "a gzip archive", "unpack it"),
    (b"BZh", "a bzip2 archive", "unpack it"),
    (b"\xfd7zXZ", "an xz archive", "unpack it"),
    (b"\x28\xb5\x2f\xfd", "a Zstandard archive", "unpack it"),
    (b"7z\xbc\xaf", "a 7-Zip archive", "unpack it"),
    (b"\x89PNG", "an image", "give the table that names it"),
    (b"\xff\xd8\xff", "an image", "give the table that names it"),
    (b"%PDF", "a PDF", _SAVE_AS),
)
_HEAD = 20
"""Bytes in which an encoding without a mark is looked for: the header begins with plain letters."""


def read_text(path: Path, usage: str) -> str:
    """Text of a table, whatever Unicode encoding it has, with its line ends as they are.

    Raises `DataError`, with `usage`, for a folder, a missing file, a file of another kind, and bytes of an encoding
    that nothing tells (Windows-1252, Latin-1 and others).
    """
    if path.is_dir():
        raise DataError(f"{path}: is a folder; {usage}, or [data] source = 'folder' for class folders")
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise DataError(f"{path}: no such file{_beside(path)}; {usage}") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); {usage}") from None
    for start, what, fix in _BINARY:
        if data.startswith(start):
            raise DataError(f"{path}: is {what}, not a CSV table; {fix}; {usage}")
    encoding = next((name for mark, name in _MARKS if data.startswith(mark)), "") or _guess(data)
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: {_undecodable(data, encoding, error)}; {usage}") from None
    if "\0" in text:
        line = len(re.split("\r\n|\r|\n", text.partition("\0")[0]))
        raise DataError(f"{path}: line {line} has a NUL byte, the file is damaged; write it again; {usage}")
    if text.lstrip()[:1] in ("{", "["):
        raise DataError(f"{path}: is JSON, not a CSV table; {_PANDAS}; {usage}")
    if text.lstrip()[:1] == "<":
        raise DataError(f"{path}: is HTML or XML, not a CSV table; {_SAVE_AS}; {usage}")
    return text.removeprefix("\ufeff").removesuffix("\x1a")  # the end of a file, to DOS


def _guess(data: bytes) -> str:
    """The encoding of a table without a mark: where NUL bytes stand in its header tells UTF-16 and UTF-32."""
    head = data[: min(_HEAD, len(data) // 4 * 4)]
    if not head:
        return "utf-8"
    zeros = "".join("0" if 4 * head[start::4].count(0) > 3 * len(head[start::4]) else "x" for start in range(4))
    patterns = {"x000": "utf-32-le", "000x": "utf-32-be", "x0x0": "utf-16-le", "0x0x": "utf-16-be"}
    return patterns.get(zeros, "utf-8")


def _undecodable(data: bytes, encoding: str, error: UnicodeDecodeError) -> str:
    if not encoding.startswith("utf-8"):
        return f"is cut or damaged {encoding.upper()} (byte {error.start})"
    before = data[: error.start]
    line = before.replace(b"\r\n", b"\n").replace(b"\r", b"\n").count(b"\n") + 1
    byte = data[error.start]
    letter = bytes([byte]).decode("cp1252", errors="replace")
    return (
        f"line {line} is not UTF-8 (byte 0x{byte:02x}, {letter!r} in Windows-1252); which encoding it has is not "
        f"written in it: {_SAVE_AS}"
    )


def _beside(path: Path) -> str:
    """A file of nearly this name, as a question."""
    try:
        names = sorted(one.name for one in path.parent.iterdir() if one.is_file())
    except OSError:
        return ""
    wanted, stem = path.name.lower(), path.stem.lower()
    likely = [name for name in names if name.lower() == wanted or name.lower().rpartition(".")[0] == wanted]
    likely += [name for name in names if name.lower() in (f"{stem}.csv", f"{stem}.tsv", f"{stem}.txt")]
    return f" (did you mean {path.parent / likely[0]}?)" if likely else ""
