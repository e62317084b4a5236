"""Motion JPEG over HTTP, as most network cameras and many small boards serve it.

It runs in this process and can be interrupted: every wait has a deadline, and `close` from another thread ends it.
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
from eyas_device.camera.multipart import Multipart
from eyas_device.camera.spec import address, hidden
from eyas_device.errors import CameraError, CameraSpecError, ImageError
from eyas_device.support.closing import Closing

_READ = 1 << 16
_DRAIN = 32 << 20
"""Bytes that one capture reads at most to reach the newest frame of a stream that outruns it."""
_SCHEMES = ("http", "https")
_REDIRECTS = (301, 302, 303, 307, 308)


class MjpegCamera(Closing):
    """The newest frame of a stream each time, as undecoded JPEG bytes."""

    live = True

    def __init__(self, url: str, *, timeout_s: float = TIMEOUT_S) -> None:
        """Connect to `url`; `timeout_s` bounds that, redirection included, and then each frame as a whole."""
        self._shown = f"mjpeg:{hidden(url)}"
        self._timeout_s = timeout_s
        self._number = 0
        self._closed = threading.Event()
        self._busy = threading.Lock()
        parts = address(url, _SCHEMES, kind="mjpeg")
        deadline = time.monotonic() + timeout_s
        try:
            self._wire, self._response = _follow(parts, deadline, self._shown)
        except (OSError, HTTPException, ValueError) as error:
            if isinstance(error, CameraError):
                raise
            raise CameraError(f"camera {self._shown}: {_reason(error, timeout_s)}") from None
        try:
            self._parser = Multipart(_boundary(self._response.msg, self._shown))
        except ValueError as error:
            self._wire.end()
            raise CameraError(f"camera {self._shown}: {error}") from None
        except CameraError:
            self._wire.end()
            raise

    @classmethod
    def open(cls, rest: str, *, timeout_s: float = TIMEOUT_S) -> MjpegCamera:
        """`mjpeg:http://[USER:PASSWORD@]HOST[:PORT]/PATH`, or https.

        Raises `CameraSpecError` for a mistaken address, a refused password or an address of single images, and
        `CameraError` if nothing there serves a stream now.
        """
        return cls(rest, timeout_s=timeout_s)

    def capture(self) -> Frame | None:
        """The newest frame; None when the server ended the stream in order, or after `close`.

        Raises `ImageError` for a part that is no JPEG, and `CameraError` if no whole frame came in time, the
        connection broke or the bytes are no such stream.
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
        """End the connection; a capture that waits in another thread returns at once."""
        self._closed.set()
        self._wire.interrupt()
        with self._busy:
            self._wire.end()

    def _newest(self) -> bytes | None:
        """Read to the end of what has arrived, and on until there is a whole frame."""
        self._wire.deadline = time.monotonic() + self._timeout_s
        newest, received = None, 0
        while True:
            try:
                part = self._parser.part()
                if part is not None:
                    newest = part or newest
                    continue
                if newest is not None and (received > _DRAIN or self._parser.ended or not self._wire.readable_now()):
                    return newest
                if self._parser.ended:
                    return None
                data = self._response.read1(_READ)
                if not data and newest is None:
                    if self._closed.is_set():
                        return None
                    raise ConnectionResetError("the server closed the connection")
            except (OSError, HTTPException, ValueError):
                if newest is None:
                    raise
                return newest  # the next capture meets the same fault
            if not data:
                return newest
            received += len(data)
            self._parser.feed(data)


class _Wire(io.RawIOBase):
    """A connected socket for `HTTPResponse` to read; no read goes on after `deadline` (monotonic seconds)."""

    def __init__(self, connected: socket.socket, deadline: float) -> None:
        self._socket = connected
        self.deadline = deadline

    def send(self, data: bytes) -> None:
        self._socket.settimeout(_left(self.deadline))
        self._socket.sendall(data)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        self._socket.settimeout(_left(self.deadline))
        return self._socket.recv_into(buffer)

    def makefile(self, mode: str) -> io.BufferedReader:
        """What `HTTPResponse` asks its socket for."""
        return io.BufferedReader(self, _READ)

    def readable_now(self) -> bool:
        """Whether a read would give something without waiting."""
        if isinstance(self._socket, ssl.SSLSocket) and self._socket.pending():
            return True
        poll = select.poll()
        poll.register(self._socket, select.POLLIN)
        return bool(poll.poll(0))

    def interrupt(self) -> None:
        """End a read that waits in another thread."""
        with contextlib.suppress(OSError):  # not connected any more
            # Of the plain socket: TLS's own would take the state away from under the thread that reads.
            socket.socket.shutdown(self._socket, socket.SHUT_RDWR)

    def end(self) -> None:
        self._socket.close()


def _follow(parts: SplitResult, deadline: float, shown: str) -> tuple[_Wire, HTTPResponse]:
    """Ask for the stream, following one redirection."""
    wire, response = _ask(parts, deadline)
    try:
        if response.status in _REDIRECTS:
            target = urljoin(parts.geturl(), response.getheader("Location", ""))
            wire.end()
            try:
                there = address(target, _SCHEMES, kind="mjpeg")
            except CameraSpecError:
                raise CameraError(f"camera {shown}: redirects to {hidden(target)!r}, which is no web address") from None
            if (there.scheme, there.hostname, there.port) == (parts.scheme, parts.hostname, parts.port):
                there = there._replace(netloc=parts.netloc)  # the password goes to nobody else
            wire, response = _ask(there, deadline)
        if response.status in (401, 403):
            asks = response.getheader("WWW-Authenticate", "")
            method = "; it asks for digest authentication, which is not supported" if "digest" in asks.lower() else ""
            raise CameraSpecError(
                f"camera {shown}: refused ({response.status}){method}; "
                "check http://USER:PASSWORD@HOST/..., with special characters written as %XX"
            )
        if response.status in _REDIRECTS:
            raise CameraError(f"camera {shown}: redirects more than once; give the last address itself")
        if response.status != 200:
            raise CameraError(f"camera {shown}: answers {response.status} {response.reason[:80]!r}; is the path right?")
    except BaseException:
        wire.end()
        raise
    return wire, response


def _ask(parts: SplitResult, deadline: float) -> tuple[_Wire, HTTPResponse]:
    host, port = cast(str, parts.hostname), parts.port or (443 if parts.scheme == "https" else 80)
    connected = _connect(host, port, deadline)
    try:
        if parts.scheme == "https":
            connected.settimeout(_left(deadline))  # bounds the handshake as a whole
            connected = ssl.create_default_context().wrap_socket(connected, server_hostname=host)
        wire = _Wire(connected, deadline)
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
    fault: OSError = OSError("no address")
    for family, kind, protocol, _, place in _resolve(host, port, deadline):
        connected = socket.socket(family, kind, protocol)
        try:
            connected.settimeout(_left(deadline))
            connected.connect(place)
            return connected
        except OSError as error:
            connected.close()
            fault = error
    raise fault


def _resolve(host: str, port: int, deadline: float) -> list[Any]:
    """Addresses of `host`. The system's resolver takes no timeout, so it works in a thread that can be left alone."""
    found: list[Any] = []
    faults: list[OSError] = []

    def look() -> None:
        try:
            found.extend(socket.getaddrinfo(host, port, type=socket.SOCK_STREAM))
        except OSError as error:
            faults.append(error)

    thread = threading.Thread(target=look, name="eyas-resolve", daemon=True)
    thread.start()
    thread.join(_left(deadline))
    if faults:
        raise faults[0]
    if thread.is_alive():
        raise TimeoutError("the host's name is not resolved")
    return found


def _left(deadline: float) -> float:
    """Seconds until `deadline`. Raises `TimeoutError` if there are none."""
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError("timed out")
    return left


def _boundary(header: Message, shown: str) -> str:
    kind = header.get_content_type()
    if not kind.startswith("multipart/"):
        if kind.startswith("image/"):
            raise CameraSpecError(
                f"camera {shown}: answers with a single image ({kind}), not with a stream; "
                "give the address of the camera's MJPEG stream (multipart/x-mixed-replace)"
            )
        raise CameraError(f"camera {shown}: answers with {kind[:80]!r}; multipart/x-mixed-replace is needed")
    boundary = header.get_boundary()
    if not boundary:
        raise CameraError(f"camera {shown}: its Content-Type names no boundary")
    return boundary


def _reason(error: Exception, timeout_s: float) -> str:
    """What went wrong on the wire, in words."""
    if isinstance(error, TimeoutError):
        return f"no answer and no whole frame within {timeout_s:g} s"
    if isinstance(error, ConnectionRefusedError):
        return "nothing listens there (connection refused); is the camera on, and the port right?"
    if isinstance(error, socket.gaierror):
        return f"the host's name is not known ({error.strerror}); check the name and the network"
    if isinstance(error, ssl.SSLCertVerificationError):
        return (
            f"its certificate is not trusted ({error.verify_message}); "
            "name a file with its issuer's certificate in the environment variable SSL_CERT_FILE"
        )
    if isinstance(error, HTTPException):
        return f"does not speak HTTP as it should ({type(error).__name__})"
    return str(getattr(error, "strerror", None) or error)
