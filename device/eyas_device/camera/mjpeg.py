"""Motion JPEG over HTTP, as most network cameras and many small boards serve it.

Runs in this process, on sockets of its own because HTTP libraries wait for more than what has arrived: every wait has a
deadline, and `close` from another thread interrupts it.
"""

from __future__ import annotations

import contextlib
import io
import select
import socket
import ssl
import threading
import time
from collections.abc import Sequence
from email.message import Message
from http.client import HTTPException, HTTPResponse
from typing import Any, cast
from urllib.parse import SplitResult, quote, unquote, urljoin

from eyas_device.camera import TIMEOUT_S, Frame
from eyas_device.camera.http_auth import Challenge, authorization, is_stale, parse_challenges
from eyas_device.camera.multipart import ChunkDecoder, MultipartParser
from eyas_device.camera.net import ConnectTimeout, connect, connect_problem, remaining
from eyas_device.camera.spec import parse_address
from eyas_device.errors import CameraError, CameraRefused, CameraSpecError, ImageError
from eyas_device.support.closing import Closing
from eyas_device.support.redact import redact

_READ_BYTES = 1 << 16
_MAX_DRAIN_BYTES = 32 << 20
"""Maximum that one capture reads to reach the newest frame of a stream that is faster than the reader."""
_SCHEMES = ("http", "https")
_SAFE = "/%:=&?~+!$,;'@()*[]"
_REDIRECTS = (301, 302, 303, 307, 308)


class MjpegCamera(Closing):
    """Returns the newest frame of a stream as undecoded JPEG bytes."""

    live = True

    def __init__(self, url: str, *, timeout_s: float = TIMEOUT_S) -> None:
        """Connect to `url`; `timeout_s` bounds the connection with a redirection, and then each whole frame."""
        self._shown = f"mjpeg:{redact(url)}"
        self._timeout_s = timeout_s
        self._number = 0
        self._closed = threading.Event()
        self._busy = threading.Lock()
        parts = self.parse(url)
        deadline = time.monotonic() + timeout_s
        try:
            self._wire, response = _follow(parts, deadline, self._shown)
        except (OSError, HTTPException, ValueError) as error:
            if isinstance(error, CameraError):
                raise
            raise CameraError(f"camera {self._shown}: {_reason(error, timeout_s)}") from None
        self._chunks = ChunkDecoder() if response.chunked else None
        try:
            self._parser = MultipartParser(_boundary(response.msg, self._shown))
            self._received = self._wire.take_buffered(response.fp)
        except ValueError as error:
            self._wire.end()
            raise CameraError(f"camera {self._shown}: {error}") from None
        except CameraError:
            self._wire.end()
            raise

    @classmethod
    def open(cls, rest: str, *, timeout_s: float = TIMEOUT_S) -> MjpegCamera:
        """Open `mjpeg:http://[USER:PASSWORD@]HOST[:PORT]/PATH`, or https.

        Raises `CameraSpecError` for a wrong address, and `CameraError` if no stream is served there now, also for a
        refused password: cameras lock users out for a while.
        """
        return cls(rest, timeout_s=timeout_s)

    @staticmethod
    def parse(rest: str) -> SplitResult:
        """Address of a specification. Raises `CameraSpecError` for a wrong one."""
        return parse_address(rest, _SCHEMES, kind="mjpeg")

    def capture(self) -> Frame | None:
        """Return the newest frame; None when the server ended the stream properly, or after `close`.

        Raises `ImageError` for a part that is not a JPEG, and `CameraError` if no whole frame arrived in time, the
        connection broke or the stream is malformed.
        """
        with self._busy:
            if self._closed.is_set():
                return None
            try:
                image = self._newest()
            except (OSError, HTTPException, ValueError) as error:
                if self._closed.is_set():
                    return None
                raise CameraError(f"camera {self._shown}: {_reason(error, self._timeout_s)}") from None
        if image is None:
            return None
        source = f"{self._shown}#{self._number}"
        self._number += 1
        if not image.startswith(b"\xff\xd8"):
            raise ImageError(f"{source}: not a JPEG (begins with {image[:8].hex(' ')})")
        return Frame(image=image, time=time.time(), source=source)

    def close(self) -> None:
        """Close the connection; a capture that waits in another thread returns at once."""
        self._closed.set()
        self._wire.interrupt()
        with self._busy:
            self._wire.end()

    def _newest(self) -> bytes | None:
        """Read everything that has arrived, and further until there is a whole frame."""
        self._wire.deadline = time.monotonic() + self._timeout_s
        newest, received = None, 0
        while True:
            try:
                part = self._parser.next_part()
                if part is not None:
                    newest = part or newest
                    continue
                if newest is not None and (
                    received > _MAX_DRAIN_BYTES or self._parser.ended or not self._wire.readable_now()
                ):
                    return newest
                if self._parser.ended:
                    return None
                data = self._read()
                if data is None and newest is None:
                    if self._closed.is_set():
                        return None
                    raise ConnectionResetError("the server closed the connection")
            except (OSError, HTTPException, ValueError):
                if newest is None:
                    raise
                return newest  # the next capture raises the same error
            if data is None:
                return newest
            received += len(data)
            self._parser.feed(data)

    def _read(self) -> bytes | None:
        """Bytes of the body that have arrived, waiting for some; possibly empty between chunks, None at the end.

        `HTTPResponse.read1` would wait for the next chunk after each one, so for the next frame.
        """
        data, self._received = self._received or self._wire.receive(), b""
        if self._chunks is None:
            return data or None
        body = self._chunks.decode(data)
        return None if not data or (not body and self._chunks.ended) else body


class _DeadlineSocket(io.RawIOBase):
    """A connected socket as a file for `HTTPResponse`; reads end at `deadline` (monotonic seconds)."""

    def __init__(self, connected: socket.socket, deadline: float) -> None:
        self._socket = connected
        self._drained = False
        self.deadline = deadline

    def send(self, data: bytes) -> None:
        self._socket.settimeout(remaining(self.deadline))
        self._socket.sendall(data)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if self._drained:
            return 0
        self._socket.settimeout(remaining(self.deadline))
        return self._socket.recv_into(buffer)

    def receive(self) -> bytes:
        """Receive bytes past the buffer of `makefile`; empty at the end."""
        self._socket.settimeout(remaining(self.deadline))
        return self._socket.recv(_READ_BYTES)

    def take_buffered(self, reader: Any) -> bytes:
        """What the header's reader has read beyond the header; it is useless afterwards."""
        self._drained = True
        return bytes(reader.read())

    def makefile(self, mode: str) -> io.BufferedReader:
        """Called by `HTTPResponse`."""
        return io.BufferedReader(self, _READ_BYTES)

    def readable_now(self) -> bool:
        """Whether a read would return without waiting."""
        if isinstance(self._socket, ssl.SSLSocket) and self._socket.pending():
            return True
        poll = select.poll()
        poll.register(self._socket, select.POLLIN)
        return bool(poll.poll(0))

    def interrupt(self) -> None:
        """Interrupt a read that waits in another thread."""
        with contextlib.suppress(OSError):  # no longer connected
            # The plain socket's method: TLS's own would drop the state that the reading thread uses.
            socket.socket.shutdown(self._socket, socket.SHUT_RDWR)

    def end(self) -> None:
        self._socket.close()


def _follow(parts: SplitResult, deadline: float, shown: str) -> tuple[_DeadlineSocket, HTTPResponse]:
    """Request the stream, following one redirection and answering challenges."""
    wire, response = _request_with_login(parts, deadline)
    try:
        if response.status in _REDIRECTS:
            target = urljoin(parts.geturl(), response.getheader("Location", ""))
            wire.end()
            try:
                new = parse_address(target, _SCHEMES, kind="mjpeg")
            except CameraSpecError:
                raise CameraError(
                    f"camera {shown}: redirects to {redact(target)!r}, which is not a web address"
                ) from None
            if (new.scheme, new.hostname, new.port) == (parts.scheme, parts.hostname, parts.port):
                new = new._replace(netloc=parts.netloc)  # credentials only go to the same host
            wire, response = _request_with_login(new, deadline)
        if response.status in (401, 403):
            raise CameraRefused(f"camera {shown}: refused ({response.status}){_login_problem(parts, response)}")
        if response.status in _REDIRECTS:
            raise CameraError(f"camera {shown}: redirects more than once; use the final address")
        if response.status != 200:
            raise CameraError(f"camera {shown}: answers {response.status} {response.reason[:80]!r}; is the path right?")
    except BaseException:
        wire.end()
        raise
    return wire, response


def _request_with_login(parts: SplitResult, deadline: float) -> tuple[_DeadlineSocket, HTTPResponse]:
    """Request the stream; the login is only sent as the server asks for it."""
    wire, response = _request(parts, deadline)
    for attempt in range(2):
        challenges = _challenges(response)
        if response.status != 401 or parts.username is None or (attempt and not is_stale(challenges)):
            break
        user, password = unquote(parts.username), unquote(parts.password or "")
        login = authorization(challenges, user, password, method="GET", target=_target(parts))
        if login is None:
            break
        wire.end()
        wire, response = _request(parts, deadline, f"Authorization: {login}")
    return wire, response


def _challenges(response: HTTPResponse) -> Sequence[Challenge]:
    return parse_challenges(response.msg.get_all("WWW-Authenticate", []))


def _login_problem(parts: SplitResult, response: HTTPResponse) -> str:
    """What is wrong with the login, and that it is seldom tried again."""
    if parts.username is None:
        return "; it needs a login: USER:PASSWORD@ before the host, with special characters written as %XX"
    offered = _challenges(response)
    if response.status == 401 and offered and authorization(offered, "", "", method="GET", target="/") is None:
        return f"; it requires the authentication {offered[0][0]!r}, which is not supported (digest and basic are)"
    return (
        "; check user and password (USER:PASSWORD@ before the host, with special characters written as %XX) "
        "(it is seldom tried again, because cameras lock users out)"
    )


def _target(parts: SplitResult) -> str:
    """Path and query as they are sent."""
    query = "?" + quote(parts.query, safe=_SAFE) if parts.query else ""
    return quote(parts.path or "/", safe=_SAFE) + query


def _request(parts: SplitResult, deadline: float, *further: str) -> tuple[_DeadlineSocket, HTTPResponse]:
    host, port = cast(str, parts.hostname), parts.port or (443 if parts.scheme == "https" else 80)
    connected = connect(host, port, deadline)
    try:
        if parts.scheme == "https":
            connected.settimeout(remaining(deadline))  # bounds the handshake as a whole
            connected = ssl.create_default_context().wrap_socket(connected, server_hostname=host)
        wire = _DeadlineSocket(connected, deadline)
        lines = [
            f"GET {_target(parts)} HTTP/1.1",
            f"Host: {parts.netloc.rpartition('@')[2].encode('idna').decode()}",
            "User-Agent: eyas-device",
            "Accept: multipart/x-mixed-replace",
            "Accept-Encoding: identity",
            "Connection: close",
            *further,
        ]
        wire.send("\r\n".join([*lines, "", ""]).encode())
        response = HTTPResponse(cast(socket.socket, wire), method="GET")
        response.begin()
    except BaseException:
        connected.close()
        raise
    return wire, response


def _boundary(header: Message, shown: str) -> str:
    kind = header.get_content_type()
    if not kind.startswith("multipart/"):
        if kind.startswith("image/"):
            raise CameraError(
                f"camera {shown}: serves a single image ({kind}), not a stream; "
                "use the address of the camera's MJPEG stream (multipart/x-mixed-replace)"
            )
        raise CameraError(f"camera {shown}: serves {kind[:80]!r}; multipart/x-mixed-replace is needed")
    boundary = header.get_boundary()
    if not boundary:
        raise CameraError(f"camera {shown}: its Content-Type has no boundary")
    return boundary


def _reason(error: Exception, timeout_s: float) -> str:
    """Describe a network error."""
    if isinstance(error, TimeoutError) and not isinstance(error, ConnectTimeout):
        return f"no whole frame within {timeout_s:g} s"
    if isinstance(error, TimeoutError | ConnectionRefusedError | socket.gaierror):
        return connect_problem(error)
    if isinstance(error, ssl.SSLCertVerificationError):
        return (
            f"its certificate is not trusted ({error.verify_message}); "
            "name a file with its issuer's certificate in the environment variable SSL_CERT_FILE"
        )
    if isinstance(error, HTTPException):
        return f"invalid HTTP response ({type(error).__name__})"
    return str(getattr(error, "strerror", None) or error)
