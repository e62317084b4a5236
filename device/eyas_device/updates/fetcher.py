"""Reads files of a repository over http(s), or from a folder (a USB stick, a network share), within strict limits.

The server is not trusted: what it sends is signed. It must not be able to hold a device back, either: every wait has an
end, bytes have to arrive at a minimum rate, and no file may be longer than the caller allows.
"""

from __future__ import annotations

import http.client
import os
import re
import socket
import ssl
import stat
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from urllib.parse import quote, unquote, urljoin, urlsplit

import msgspec

from eyas_device import __version__
from eyas_device.support.closing import Closing
from eyas_device.support.redact import redact
from eyas_device.updates.refusals import EndlessDataError, MissingError, SlowDataError, UnreachableError

_CHUNK_BYTES = 64 << 10
_MAX_REDIRECTS = 3
_REDIRECTS = (301, 302, 303, 307, 308)
_ABSENT = (403, 404, 410)
"""Statuses of a file that is not there; object stores answer 403."""
_UNQUOTED = "/%!$&'()*+,;=:@~"
"""Characters that stay as they are in the path of a URL; `%`, because names of roles are quoted already."""
_RANGE = re.compile(r"bytes (\d{1,18})-\d{1,18}/(?:\d{1,18}|\*)")


class Limits(msgspec.Struct, frozen=True):
    """How long a repository may take."""

    answer_s: float = 20.0
    """Maximum time until the server has answered, from the connection on."""
    window_s: float = 30.0
    """`window_bytes`, or the rest of the file, must arrive within this time."""
    window_bytes: int = 30_000


class Fetcher(Closing):
    """Reads files below one address.

    Args:
        url: `https://HOST/PATH`, `http://HOST/PATH`, `file:///PATH`, or an absolute path.
        limits: How long the repository may take.

    Raises:
        UnreachableError: The address is none of these.

    """

    def __init__(self, url: str, *, limits: Limits = Limits()) -> None:  # noqa: B008 - frozen
        self._limits = limits
        self._connection: http.client.HTTPConnection | None = None
        self._socket: socket.socket | None = None
        """The connection's, which itself forgets it when the server wants to end it."""
        self._server = ("", "")
        self.folder = _folder(url)
        """The repository's folder; None for a server."""
        self._url = "" if self.folder else _check_url(url)

    def __str__(self) -> str:
        return str(self.folder or self._url)

    def open(self, path: str, *, offset: int = 0, max_bytes: int) -> Iterator[bytes]:
        """Read a file of the repository.

        Args:
            path: Relative to the repository, forward slashes, as part of a URL.
            offset: Begin at this byte.
            max_bytes: Maximum number of bytes from there to the end of the file.

        Yields:
            At most 64 kB at a time.

        Raises:
            MissingError: There is no such file.
            UnreachableError: The repository does not answer, or breaks off.
            SlowDataError: It takes too long.
            EndlessDataError: The file is longer.

        """
        if path.startswith("/") or ".." in unquote(path).split("/") or not unquote(path).isprintable():
            raise MissingError(f"{path!r}: not a path in a repository")
        chunks = self._read_file(path, offset) if self.folder else self._download(path, offset, max_bytes)
        received = 0
        for chunk in chunks:
            received += len(chunk)
            if received > max_bytes:
                self.close()
                raise EndlessDataError(f"{self}/{path}: longer than the {offset + max_bytes} bytes that it may have")
            yield chunk

    def close(self) -> None:
        """End the connection that is kept for the next file."""
        connection, self._connection, self._socket = self._connection, None, None
        if connection is not None:
            connection.close()

    def _read_file(self, path: str, offset: int) -> Iterator[bytes]:
        assert self.folder is not None
        where = self.folder / unquote(path)
        try:
            if not where.resolve().is_relative_to(self.folder.resolve()):
                raise MissingError(f"{where}: a link to somewhere else")
            descriptor = os.open(where, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
            with os.fdopen(descriptor, "rb") as stream:
                if not stat.S_ISREG(os.fstat(descriptor).st_mode):  # a pipe would block
                    raise MissingError(f"{where}: not a file")
                stream.seek(offset)
                while chunk := stream.read(_CHUNK_BYTES):
                    yield chunk
        except (FileNotFoundError, NotADirectoryError):
            if not self.folder.is_dir():
                raise UnreachableError(f"{self.folder}: there is no such folder; is it mounted?") from None
            raise MissingError(f"{where}: there is no such file") from None
        except (MissingError, EndlessDataError):
            raise
        except (OSError, RuntimeError) as error:  # RuntimeError: a circle of links
            raise UnreachableError(f"{where}: {getattr(error, 'strerror', None) or error}") from None

    def _download(self, path: str, offset: int, max_bytes: int) -> Iterator[bytes]:
        """Yield what the server sends, from `offset` on."""
        url = f"{self._url}/{quote(path, safe=_UNQUOTED)}"
        response = self._respond(url, offset)
        skip = offset
        if response.status == 206:
            matched = _RANGE.fullmatch(response.getheader("Content-Range") or "")
            if not matched or int(matched[1]) != offset:
                raise UnreachableError(f"{url}: the server sent another range than was asked for")
            skip = 0
        if response.length is not None and response.length - skip > max_bytes:
            self.close()
            raise EndlessDataError(f"{url}: {response.length - skip} bytes; {max_bytes} are allowed")
        for chunk in self._body(url, response):
            wanted = chunk[min(skip, len(chunk)) :]
            skip -= len(chunk) - len(wanted)
            if wanted:
                yield wanted

    def _body(self, url: str, response: http.client.HTTPResponse) -> Iterator[bytes]:
        """Yield a response's body; the time that the caller takes for a chunk does not count."""
        left_s, arrived, missing = self._limits.window_s, 0, response.length
        what = f"fewer than {self._limits.window_bytes} bytes in {self._limits.window_s:g} s"
        complete = False
        try:
            while missing is None or missing > 0:
                began = time.monotonic()
                with self._time_limit(left_s, url, what):
                    chunk = response.read1(_CHUNK_BYTES if missing is None else min(_CHUNK_BYTES, missing))
                if not chunk and missing:
                    raise UnreachableError(f"{url}: the server broke off {missing} bytes before the end")
                if not chunk:
                    break
                missing = None if missing is None else missing - len(chunk)
                left_s, arrived = left_s - (time.monotonic() - began), arrived + len(chunk)
                if arrived >= self._limits.window_bytes:
                    left_s, arrived = self._limits.window_s, 0
                yield chunk
            complete = not response.will_close
        finally:
            response.close()
            if not complete:
                self.close()

    def _respond(self, url: str, offset: int) -> http.client.HTTPResponse:
        """Ask for `url`, following redirects. Raises an error of this module for anything but a file."""
        secure = url.startswith("https:")
        for _ in range(_MAX_REDIRECTS + 1):
            response = self._ask(url, offset)
            if response.status in (200, 206):
                return response
            self.close()
            if response.status in _ABSENT:
                raise MissingError(f"{url}: there is no such file (HTTP {response.status})")
            location = response.getheader("Location") or ""
            if response.status not in _REDIRECTS or not location:
                raise UnreachableError(f"{url}: HTTP {response.status}")
            url = _check_url(urljoin(url, location))
            if secure and not url.startswith("https:"):
                raise UnreachableError(f"{url}: a redirect from https to http; put the final address into [update] url")
        raise UnreachableError(f"{url}: more than {_MAX_REDIRECTS} redirects")

    def _ask(self, url: str, offset: int) -> http.client.HTTPResponse:
        """Send a request, over the connection of the last one if it is still there, and wait for the answer."""
        parts = urlsplit(url)
        server = (parts.scheme, parts.netloc)
        kept = self._connection is not None and self._server == server
        if not kept:
            self.close()
        proxy = _proxy(parts.scheme, parts.hostname or "")
        target = url if proxy and parts.scheme == "http" else parts.path + (f"?{parts.query}" if parts.query else "")
        headers = {"User-Agent": f"eyas-device/{__version__}", "Accept-Encoding": "identity"}
        headers |= {"Host": parts.netloc} | ({"Range": f"bytes={offset}-"} if offset else {})
        limit_s = self._limits.answer_s
        try:
            with self._time_limit(limit_s, url, f"no answer within {limit_s:g} s"):
                if self._connection is None:
                    self._connection, self._server = self._connect(url, proxy), server
                    self._connection.connect()
                    self._socket = self._connection.sock
                self._connection.request("GET", target, headers=headers)
                return self._connection.getresponse()
        except (UnreachableError, SlowDataError):
            self.close()
            if kept:  # a server may end a connection that was idle
                return self._ask(url, offset)
            raise

    def _connect(self, url: str, proxy: tuple[str, int] | None) -> http.client.HTTPConnection:
        parts, timeout = urlsplit(url), self._limits.answer_s
        host, port = proxy or (parts.hostname or "", parts.port)
        if parts.scheme == "http":
            return http.client.HTTPConnection(host, port, timeout=timeout)
        connection = http.client.HTTPSConnection(host, port, timeout=timeout, context=ssl.create_default_context())
        if proxy:
            connection.set_tunnel(parts.hostname or "", parts.port or 443)
        return connection

    @contextmanager
    def _time_limit(self, seconds: float, url: str, why: str) -> Iterator[None]:
        """End whatever the connection waits for after `seconds`, also a server that sends one byte at a time.

        Raises `SlowDataError` with the reason `why` then, and `UnreachableError` for other failures of the connection.
        """
        expired = threading.Event()
        timer = threading.Timer(max(0.001, seconds), self._shut, (expired,))
        timer.daemon = True
        timer.start()
        try:
            yield
        except (OSError, http.client.HTTPException, ValueError, AttributeError) as error:
            if expired.is_set() or isinstance(error, TimeoutError):
                raise SlowDataError(f"{url}: {why}") from None
            raise UnreachableError(f"{url}: {_why(error)}") from None
        finally:
            timer.cancel()
        if expired.is_set():  # what was read then is the end that the timer made
            raise SlowDataError(f"{url}: {why}")

    def _shut(self, expired: threading.Event) -> None:
        expired.set()
        if self._socket is not None:
            with suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)


def _why(error: Exception) -> str:
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"its certificate is not accepted ({error.verify_message}); is the clock right?"
    if isinstance(error, socket.gaierror):
        return f"unknown host name ({error.strerror}); check [update] url and the network"
    if isinstance(error, ConnectionRefusedError):
        return "nothing listens there (connection refused)"
    return str(getattr(error, "strerror", None) or error) or type(error).__name__


def _folder(url: str) -> Path | None:
    """The folder that an address names; None for a server."""
    parts = urlsplit(url)
    if parts.scheme == "file" and parts.netloc in ("", "localhost"):
        return Path(unquote(parts.path))
    return Path(url) if url.startswith("/") else None


def _check_url(url: str) -> str:
    """The address without a slash at its end. Raises `UnreachableError` unless it is one of a server."""
    try:
        parts = urlsplit(url)
        usable = parts.scheme in ("http", "https") and parts.hostname and "@" not in parts.netloc and parts.port != 0
    except ValueError:
        usable = False
    if not usable or not url.isascii() or not url.isprintable() or " " in url:
        raise UnreachableError(
            f"[update] url = {redact(url)!r}: https://HOST/PATH, http://HOST/PATH, without a password, or an absolute "
            "path of a folder is needed"
        )
    return url.rstrip("/")


def _proxy(scheme: str, host: str) -> tuple[str, int] | None:
    """Host and port of the proxy that the environment names for a server, as `https_proxy` and `no_proxy`."""
    address = urllib.request.getproxies().get(scheme, "")
    if not address or urllib.request.proxy_bypass(host):
        return None
    parts = urlsplit(address if "//" in address else f"//{address}")
    return (parts.hostname, parts.port or 80) if parts.hostname else None
