"""Motion JPEG over HTTP, as most network cameras and many small boards serve it.

Runs in this process: every wait has a deadline, and `close` from another thread interrupts it.
"""

from __future__ import annotations

import base64
import contextlib
import io
import select
import socket
import ssl
import threading
import time
from email.message import Message
from http.client import HTTPException, HTTPResponse
from typing import Any, cast
from urllib.parse import SplitResult, quote, unquote, urljoin

from eyas_device.camera import TIMEOUT_S, Frame
from eyas_device.camera.multipart import MultipartParser
from eyas_device.camera.spec import parse_address
from eyas_device.errors import CameraError, CameraSpecError, ImageError
from eyas_device.support.closing import Closing
from eyas_device.support.redact import redact

_READ_BYTES = 1 << 16
_MAX_DRAIN_BYTES = 32 << 20
"""Maximum that one capture reads to reach the newest frame of a stream that is faster than the reader."""
_SCHEMES = ("http", "https")
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
        parts = parse_address(url, _SCHEMES, kind="mjpeg")
        deadline = time.monotonic() + timeout_s
        try:
            self._wire, self._response = _follow(parts, deadline, self._shown)
        except (OSError, HTTPException, ValueError) as error:
            if isinstance(error, CameraError):
                raise
            raise CameraError(f"camera {self._shown}: {_reason(error, timeout_s)}") from None
        try:
            self._parser = MultipartParser(_boundary(self._response.msg, self._shown))
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
                data = self._response.read1(_READ_BYTES)
                if not data and newest is None:
                    if self._closed.is_set():
                        return None
                    raise ConnectionResetError("the server closed the connection")
            except (OSError, HTTPException, ValueError):
                if newest is None:
                    raise
                return newest  # the next capture raises the same error
            if not data:
                return newest
            received += len(data)
            self._parser.feed(data)


class _DeadlineSocket(io.RawIOBase):
    """A connected socket as a file for `HTTPResponse`; reads end at `deadline` (monotonic seconds)."""

    def __init__(self, connected: socket.socket, deadline: float) -> None:
        self._socket = connected
        self.deadline = deadline

    def send(self, data: bytes) -> None:
        self._socket.settimeout(_remaining(self.deadline))
        self._socket.sendall(data)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        self._socket.settimeout(_remaining(self.deadline))
        return self._socket.recv_into(buffer)

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
    """Request the stream, following one redirection."""
    wire, response = _request(parts, deadline)
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
            wire, response = _request(new, deadline)
        if response.status in (401, 403):
            challenge = response.getheader("WWW-Authenticate", "").lower()
            method = "; it requires digest authentication, which is not supported" if "digest" in challenge else ""
            raise CameraError(
                f"camera {shown}: refused ({response.status}){method}; "
                "check http://USER:PASSWORD@HOST/..., with special characters written as %XX"
            )
        if response.status in _REDIRECTS:
            raise CameraError(f"camera {shown}: redirects more than once; use the final address")
        if response.status != 200:
            raise CameraError(f"camera {shown}: answers {response.status} {response.reason[:80]!r}; is the path right?")
    except BaseException:
        wire.end()
        raise
    return wire, response


def _request(parts: SplitResult, deadline: float) -> tuple[_DeadlineSocket, HTTPResponse]:
    host, port = cast(str, parts.hostname), parts.port or (443 if parts.scheme == "https" else 80)
    connected = _connect(host, port, deadline)
    try:
        if parts.scheme == "https":
            connected.settimeout(_remaining(deadline))  # bounds the handshake as a whole
            connected = ssl.create_default_context().wrap_socket(connected, server_hostname=host)
        wire = _DeadlineSocket(connected, deadline)
        target = quote(parts.path or "/", safe="/%:=&?~+!$,;'@()*[]") + (
            "?" + quote(parts.query, safe="/%:=&?~+!$,;'@()*[]") if parts.query else ""
        )
        lines = [
            f"GET {target} HTTP/1.1",
            f"Host: {parts.netloc.rpartition('@')[2].encode('idna').decode()}",
            "User-Agent: eyas-device",
            "Accept: multipart/x-mixed-replace",
            "Connection: close",
        ]
        if parts.username is not None:
            login = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
            lines.append(f"Authorization: Basic {base64.b64encode(login.encode()).decode()}")
        wire.send("\r\n".join([*lines, "", ""]).encode("ascii"))
        response = HTTPResponse(cast(socket.socket, wire), method="GET")
        response.begin()
    except BaseException:
        connected.close()
        raise
    return wire, response


def _connect(host: str, port: int, deadline: float) -> socket.socket:
    last_error: OSError = OSError("no address")
    for family, kind, protocol, _, address in _resolve(host, port, deadline):
        connected = socket.socket(family, kind, protocol)
        try:
            connected.settimeout(_remaining(deadline))
            connected.connect(address)
            return connected
        except OSError as error:
            connected.close()
            last_error = error
    raise last_error


def _resolve(host: str, port: int, deadline: float) -> list[Any]:
    """Resolve `host` in a thread that can be abandoned, because `getaddrinfo` has no timeout."""
    addresses: list[Any] = []
    errors: list[OSError] = []

    def resolve() -> None:
        try:
            addresses.extend(socket.getaddrinfo(host, port, type=socket.SOCK_STREAM))
        except OSError as error:
            errors.append(error)

    thread = threading.Thread(target=resolve, name="eyas-resolve", daemon=True)
    thread.start()
    thread.join(_remaining(deadline))
    if errors:
        raise errors[0]
    if thread.is_alive():
        raise TimeoutError("the host name was not resolved")
    return addresses


def _remaining(deadline: float) -> float:
    """Seconds until `deadline`. Raises `TimeoutError` if it has passed."""
    seconds = deadline - time.monotonic()
    if seconds <= 0:
        raise TimeoutError("timed out")
    return seconds


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
    if isinstance(error, TimeoutError):
        return f"no whole frame within {timeout_s:g} s"
    if isinstance(error, ConnectionRefusedError):
        return "nothing listens there (connection refused); is the camera on, and the port right?"
    if isinstance(error, socket.gaierror):
        return f"unknown host name ({error.strerror}); check the name and the network"
    if isinstance(error, ssl.SSLCertVerificationError):
        return (
            f"its certificate is not trusted ({error.verify_message}); "
            "name a file with its issuer's certificate in the environment variable SSL_CERT_FILE"
        )
    if isinstance(error, HTTPException):
        return f"invalid HTTP response ({type(error).__name__})"
    return str(getattr(error, "strerror", None) or error)
