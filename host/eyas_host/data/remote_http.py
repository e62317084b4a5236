"""Reads files from web servers: their size and version, and their bytes from any place on.

The standard library does it, because a download that breaks off must go on where it was, and only on the same version.
"""

from __future__ import annotations

import http.client
import netrc
import re
import ssl
import urllib.error
import urllib.request
from collections.abc import Iterator
from email.message import Message
from typing import IO, Any
from urllib.parse import quote, urlsplit

from eyas_device import __version__
from eyas_host.data.remote_file import RemoteFile, UnreachableError
from eyas_host.support.errors import DataError

_TIMEOUT_S = 30.0
_CHUNK_BYTES = 1 << 20
_LATER = (408, 425, 429, 500, 502, 503, 504)
"""Statuses of a server that may answer later."""
_NO_HEAD = (400, 403, 405, 501)
"""Statuses of servers that do not know HEAD."""
_RANGE = re.compile(r"bytes (\d{1,18})-\d{1,18}/(\d{1,18}|\*)")
_LOOPBACK = ("127.0.0.1", "::1", "localhost")


def stat_file(url: str) -> RemoteFile:
    """Size and version of a file. Raises `DataError` if there is none, and `UnreachableError` without an answer."""
    try:
        with _request(url, "HEAD") as answer:
            return RemoteFile(url, _length(answer.headers), _version(answer.headers))
    except _StatusError as error:
        if error.status not in _NO_HEAD:
            raise error.explained(url) from None
    try:
        with _request(url, "GET", 0, 1) as answer:
            found = _RANGE.fullmatch(answer.headers.get("Content-Range", ""))
            total = int(found[2]) if found and found[2] != "*" else -1
            return RemoteFile(url, total if found else _length(answer.headers), _version(answer.headers))
    except _StatusError as error:
        raise error.explained(url) from None


def read_file(file: RemoteFile, start: int) -> tuple[int, Iterator[bytes]]:
    """The place from which the bytes come, `start` or 0 of a server without ranges, and the bytes.

    Raises `DataError` if the file is gone or is another version, and `UnreachableError` if the answer ends early.
    """
    try:
        answer = _request(file.url, "GET", start)
    except _StatusError as error:
        raise error.explained(file.url) from None
    if _version(answer.headers) != file.version:
        answer.close()
        raise DataError(f"{file.url}: changed while it was downloaded; run again")
    if answer.status == http.client.PARTIAL_CONTENT:
        found = _RANGE.fullmatch(answer.headers.get("Content-Range", ""))
        if found is None or int(found[1]) != start:
            answer.close()
            raise DataError(f"{file.url}: the server sent another part than the one that was asked for")
    else:
        start = 0
    return start, _chunks(file.url, answer)


def _chunks(url: str, answer: Any) -> Iterator[bytes]:
    with answer:
        while True:
            try:
                chunk: bytes = answer.read(_CHUNK_BYTES)
            except http.client.IncompleteRead as error:
                yield error.partial
                raise UnreachableError(f"{url}: the connection was cut") from None
            except (OSError, http.client.HTTPException) as error:
                raise UnreachableError(f"{url}: the connection was cut ({_reason(error)})") from None
            if not chunk:
                return
            yield chunk


class _StatusError(Exception):
    """A server's answer that is no file."""

    def __init__(self, status: int) -> None:
        super().__init__(status)
        self.status = status

    def explained(self, url: str) -> DataError | UnreachableError:
        """The error that a caller sees."""
        if self.status in _LATER:
            return UnreachableError(f"{url}: the server is busy or failed (status {self.status})")
        if self.status in (401, 403):
            return DataError(f"{url}: access denied (status {self.status}); put the login into ~/.netrc")
        if self.status in (404, 410):
            return DataError(f"{url}: no such file (status {self.status})")
        return DataError(f"{url}: the server refuses it (status {self.status})")


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects, but never from an encrypted address to a plain one."""

    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: Message, newurl: str
    ) -> urllib.request.Request | None:
        if req.full_url.startswith("https:") and not newurl.startswith("https:"):
            raise DataError(f"{req.full_url}: the server leads to an address without encryption; it is not followed")
        return super().redirect_request(req, fp, code, msg, headers, newurl)  # type: ignore[arg-type]


def _request(url: str, method: str, start: int = 0, count: int = 0) -> Any:
    """The server's answer, whose body is not read yet. Raises `_StatusError`, `DataError` or `UnreachableError`."""
    parts = urlsplit(url)
    request = urllib.request.Request(
        parts._replace(path=quote(parts.path, safe="/%!$&'()*+,;=:@~")).geturl(),
        method=method,
        headers={"User-Agent": f"eyas/{__version__}", "Accept-Encoding": "identity"},
    )
    if start or count:
        request.add_header("Range", f"bytes={start}-{start + count - 1 if count else ''}")
    if login := _login(parts.hostname or "", encrypted=parts.scheme == "https"):
        request.add_unredirected_header("Authorization", login)
    try:
        return urllib.request.build_opener(_Redirects).open(request, timeout=_TIMEOUT_S)
    except urllib.error.HTTPError as error:
        error.close()
        raise _StatusError(error.code) from None
    except urllib.error.URLError as error:
        if isinstance(error.reason, ssl.SSLCertVerificationError):
            raise DataError(f"{url}: the certificate is not trusted ({error.reason.verify_message})") from None
        raise UnreachableError(f"{url}: cannot be reached ({_reason(error.reason)})") from None
    except (OSError, http.client.HTTPException) as error:
        raise UnreachableError(f"{url}: cannot be reached ({_reason(error)})") from None


def _login(host: str, *, encrypted: bool) -> str:
    """The `Authorization` header for a host in ~/.netrc; empty without one, and where the network could read it."""
    if not encrypted and host not in _LOOPBACK:
        return ""
    try:
        found = netrc.netrc().authenticators(host)
    except FileNotFoundError:
        return ""
    except (netrc.NetrcParseError, OSError) as error:
        raise DataError(f"~/.netrc: cannot be used ({getattr(error, 'msg', None) or _reason(error)})") from None
    if found is None:
        return ""
    import base64

    return "Basic " + base64.b64encode(f"{found[0]}:{found[2]}".encode()).decode()


def _length(headers: Message) -> int:
    text = headers.get("Content-Length", "")
    return int(text) if text.isdecimal() else -1


def _version(headers: Message) -> str:
    return headers.get("ETag") or headers.get("Last-Modified") or ""


def _reason(error: object) -> str:
    return str(getattr(error, "strerror", None) or error or type(error).__name__)
