"""What image decoders print: libpng, libjpeg and libtiff write their warnings to the C library's standard error.

A camera with a small fault would write a line per frame. While an image is decoded, the C library's `stderr` is a file
in memory; descriptor 2 stays what it is, so that nothing that Python writes meanwhile, in any thread, is lost.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import re
import threading
from collections.abc import Iterator

_MAX_BYTES = 16_384
_MIN_DESCRIPTOR = 10
_UNBUFFERED = 2  # _IONBF
_NUMBER = re.compile(r"0x[0-9a-f]+|\d+")


class _Stderr:
    """The C library's `stderr`, which is a file in memory while anybody decodes.

    Source: the GNU C Library manual, 12.2: `stderr` is a normal variable that can be set. Raises `OSError`,
    `AttributeError` or `ValueError` where that is not so.
    """

    def __init__(self) -> None:
        self._library = ctypes.CDLL(None)
        self._library.fdopen.restype = ctypes.c_void_p
        self._library.setvbuf.argtypes = (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int, ctypes.c_size_t)
        self._variable = ctypes.c_void_p.in_dll(self._library, "stderr")
        self._real: int | None = None
        self.count = 0
        self._open()
        os.register_at_fork(after_in_child=self._after_fork)

    def _open(self) -> None:
        """Make the file in memory; nobody is decoding."""
        self._lock = threading.Lock()
        self._depth = self._read = 0
        first = os.memfd_create("eyas-decoders")
        try:
            self._descriptor = fcntl.fcntl(first, fcntl.F_DUPFD_CLOEXEC, _MIN_DESCRIPTOR)
        finally:
            os.close(first)
        fcntl.fcntl(self._descriptor, fcntl.F_SETFL, os.O_APPEND)
        self._file = self._library.fdopen(self._descriptor, b"a")
        if not self._file:
            raise OSError("no file in memory")
        self._library.setvbuf(self._file, None, _UNBUFFERED, 0)

    def redirect(self) -> None:
        with self._lock:
            self._depth += 1
            if self._depth == 1:
                self._real = self._variable.value
                self._variable.value = self._file

    def restore(self) -> list[str]:
        """Undo a `redirect`; return the lines that were written up to now, by any thread."""
        with self._lock:
            self._depth -= 1
            if self._depth == 0:
                self._variable.value = self._real
            size = os.fstat(self._descriptor).st_size
            if size <= self._read:
                return []
            text = os.pread(self._descriptor, min(size - self._read, _MAX_BYTES), self._read).decode(errors="replace")
            self._read = size
            if self._depth == 0:  # else another thread may write meanwhile
                os.ftruncate(self._descriptor, 0)
                self._read = 0
            lines = [line.strip() for line in text.splitlines() if line.strip()]
            self.count += len(lines)
        return lines

    def _after_fork(self) -> None:
        """A child process has one thread, which is not decoding, and gets a file of its own."""
        if self._depth:
            self._variable.value = self._real
        with contextlib.suppress(OSError):  # then the parent's, whose messages may mix with the child's
            self._open()


class DecoderMessages:
    """Keeps what decoders print from standard error; all threads share one."""

    def __init__(self) -> None:
        self._stderr: _Stderr | None = None
        with contextlib.suppress(OSError, AttributeError, ValueError):
            self._stderr = _Stderr()

    @property
    def count(self) -> int:
        """Messages up to now: an image during whose decoding it did not grow is not meant by any."""
        return 0 if self._stderr is None else self._stderr.count

    @contextlib.contextmanager
    def kept(self) -> Iterator[list[str]]:
        """Context in which decoders print nothing; afterwards the list holds their messages, and other threads'."""
        messages: list[str] = []
        if self._stderr is None:
            yield messages
            return
        self._stderr.redirect()
        try:
            yield messages
        finally:
            messages += self._stderr.restore()


DECODERS = DecoderMessages()


def message_kind(message: str) -> str:
    """A decoder's message without its numbers.

    >>> message_kind("Corrupt JPEG data: 3 extraneous bytes before marker 0xd9")
    'Corrupt JPEG data: N extraneous bytes before marker N'
    """
    return _NUMBER.sub("N", message)
