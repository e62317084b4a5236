"""An MJPEG server for tests, run as `python streams.py PORT [CERTIFICATE]`. The path chooses how it behaves."""

from __future__ import annotations

import base64
import hashlib
import itertools
import os
import re
import socket
import ssl
import sys
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import cv2
import numpy as np

LOGIN = "guard:pass/word@1"
FPS = 50.0
_WORDS = b"--frame"


def jpeg_image(number: int) -> bytes:
    """The JPEG with this number, 64x48 pixels; no two in a row are equal."""
    pixels = np.full((48, 64, 3), 60, dtype=np.uint8)
    cv2.circle(pixels, (8 + number % 48, 24), 8, (40, 220, 90), -1)
    return bytes(cv2.imencode(".jpg", pixels)[1].tobytes())


def part(body: bytes, *, length: bool = True) -> bytes:
    """A part of the stream with its delimiter."""
    announced = f"Content-Length: {len(body)}\r\n".encode() if length else b""
    return _WORDS + b"\r\nContent-Type: image/jpeg\r\n" + announced + b"\r\n" + body + b"\r\n"


def chunk(data: bytes, extension: bytes = b"", end: bytes = b"\r\n") -> bytes:
    return b"%x" % len(data) + extension + end + data + end


_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: multipart/x-mixed-replace; boundary=frame\r\n"
_CHUNKED = _HEAD + b"Transfer-Encoding: chunked\r\n\r\n"


def big(number: int) -> bytes:
    """A JPEG of 90 kB."""
    return jpeg_image(number) + bytes(90_000)


def _lf(data: bytes) -> bytes:
    """The part with bare line feeds in its header."""
    return data.replace(b"\r\n", b"\n", 4)


DIALECTS: dict[str, tuple[bytes, Callable[[int], bytes]]] = {
    "chunked-large": (_CHUNKED, lambda n: chunk(part(big(n)))),
    "chunked-nolength": (
        _CHUNKED,
        lambda n: chunk(part(big(n), length=False) + _WORDS + b"\r\nX: y\r\n\r\nz\r\n"),
    ),
    "chunked-extension": (_CHUNKED, lambda n: chunk(part(big(n)), b' ;name="a,b" ; x')),
    "chunked-lf": (_CHUNKED.replace(b"\r", b""), lambda n: chunk(_lf(part(big(n))), end=b"\n")),
    "quoted": (
        _HEAD.replace(b"boundary=frame", b'charset=utf-8; boundary="fr a me"') + b"\r\n",
        lambda n: part(big(n)).replace(_WORDS, b"--fr a me"),
    ),
    "lf": (_HEAD.replace(b"\r", b"") + b"\n", lambda n: _lf(part(big(n)))),
    "preamble": (_HEAD + b"\r\nThis is a stream; skip\r\n--fram\r\n me.\r\n", lambda n: part(big(n))),
    "http10": (_HEAD.replace(b"1.1", b"1.0") + b"\r\n", lambda n: part(big(n))),
}
"""Mode -> head of the answer and encoded part. The next part comes later: who waits for it has its frames too late."""

REALM = 'cam, the "first"'
_QUOTED = r'realm="cam, the \"first\"", nonce="n0nce"'
_DIGEST = f'Digest {_QUOTED}, qop="auth,auth-int", opaque="0p"'
CHALLENGES = {
    "md5": [_DIGEST],
    "sha256": [f'{_DIGEST}, algorithm=MD5, Basic realm="x"', _DIGEST + ", algorithm=SHA-256"],
    "sess": [_DIGEST + ", algorithm=MD5-sess"],
    "old": [f'Basic realm="b", Digest {_QUOTED}'],
    "stale": [_DIGEST + ", stale=TRUE"],
    "other": ['Negotiate, Digest realm="x", nonce="y", qop="auth-int"'],
}
"""Digest mode -> challenges."""
STALE: list[str] = []
"""Logins that were answered with a new nonce."""


class Handler(BaseHTTPRequestHandler):
    """One stream."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        mode = self.path.strip("/").partition("?")[0]
        kind = "multipart/x-mixed-replace; boundary=frame"
        if mode in DIALECTS:
            self._dialect(*DIALECTS[mode])
        elif mode.startswith("digest") and not self._digest_is_right(mode):
            self._challenge(mode)
        elif (
            mode == "login"
            and self.headers.get("Authorization") != "Basic " + base64.b64encode(LOGIN.encode()).decode()
        ):
            self._head(401, WWW_Authenticate='Basic realm="camera"')
        elif mode in ("moved", "lost", "away"):
            self._head(302, Location={"moved": "/normal", "lost": "/lost", "away": "ftp://127.0.0.1/x"}[mode])
        elif mode == "gone":
            self._head(404)
        elif mode == "page":
            self._head(200, Content_Type="text/html", Content_Length="0")
        elif mode == "single":
            self._head(200, Content_Type="image/jpeg", Content_Length=str(len(jpeg_image(0))))
            self.wfile.write(jpeg_image(0))
        elif mode == "dashes":
            self._stream("multipart/x-mixed-replace;boundary=--frame", self._parts(length=True))
        elif mode == "unbound":
            self._stream("multipart/x-mixed-replace", self._parts(length=True))
        elif mode == "chunked":
            self._stream(kind, self._chunks(), Transfer_Encoding="chunked")
        elif hasattr(self, f"_{mode}"):
            self._stream(kind, getattr(self, f"_{mode}")())
        else:
            self._stream(kind, self._parts(length=mode != "nolength"))

    def _dialect(self, head: bytes, encode: Callable[[int], bytes]) -> None:
        """A whole answer, byte by byte as given; each part at once, and the next one much later."""
        self.close_connection = True
        try:
            self.wfile.write(head)
            for number in itertools.count():
                self.wfile.write(encode(number))
                time.sleep(0.2)
        except OSError:
            pass  # the camera's reader left

    def _challenge(self, mode: str) -> None:
        self.send_response(401)
        for header in CHALLENGES[mode.partition("-")[2]]:
            self.send_header("WWW-Authenticate", header)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _digest_is_right(self, mode: str) -> bool:
        """Check the login as RFC 7616, 3.4.1 writes it, for the first challenge of the mode."""
        scheme, _, rest = self.headers.get("Authorization", "").partition(" ")
        if mode == "digest-stale" and not STALE:
            STALE.append(rest)
            return False
        sent = dict(re.findall(r'(\w+)="?([^",]*)"?', rest))
        user, _, password = LOGIN.partition(":")
        function = hashlib.sha256 if "sha" in mode else hashlib.md5

        def h(text: str) -> str:
            return function(text.encode()).hexdigest()

        a1, a2 = h(f"{user}:{REALM}:{password}"), h(f"GET:{self.path}")
        if mode == "digest-old":
            wanted = h(f"{a1}:n0nce:{a2}")
        else:
            if mode == "digest-sess":
                a1 = h(f"{a1}:n0nce:{sent.get('cnonce')}")
            wanted = h(f"{a1}:n0nce:{sent.get('nc')}:{sent.get('cnonce')}:auth:{a2}")
        return scheme == "Digest" and sent.get("response") == wanted and sent.get("uri") == self.path

    def _head(self, status: int, **fields: str) -> None:
        self.send_response(status)
        for name, value in fields.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Connection", "close")
        self.end_headers()
        self.close_connection = True

    def _stream(self, kind: str, pieces: Iterator[bytes], **fields: str) -> None:
        self._head(200, Content_Type=kind, **fields)
        try:
            for piece in pieces:
                self.wfile.write(piece)
        except OSError:
            pass  # the camera's reader left

    def _parts(self, *, length: bool) -> Iterator[bytes]:
        number = 0
        while True:
            yield part(jpeg_image(number), length=length)
            number += 1
            time.sleep(1 / FPS)

    def _chunks(self) -> Iterator[bytes]:
        for piece in self._parts(length=True):
            for half in (piece[:30], piece[30:]):
                yield f"{len(half):x}\r\n".encode() + half + b"\r\n"

    def _large(self) -> Iterator[bytes]:
        """Frames of 100 kB: what a reader leaves in the socket is more than one read."""
        number = 0
        while True:
            yield part(jpeg_image(number) + bytes(100_000))
            number += 1
            time.sleep(1 / FPS)

    def _flood(self) -> Iterator[bytes]:
        """As fast as the socket takes them."""
        pieces = [part(jpeg_image(number)) for number in range(48)]
        while True:
            yield b"".join(pieces)

    def _drip(self) -> Iterator[bytes]:
        """One whole frame, then one byte at a time: never silent, never done."""
        yield part(jpeg_image(0))
        for byte in part(jpeg_image(1)):
            yield bytes([byte])
            time.sleep(0.1)

    def _stall(self) -> Iterator[bytes]:
        """Five frames and half of one, then silence with the connection open."""
        for number in range(5):
            yield part(jpeg_image(number))
        yield part(jpeg_image(5))[:200]
        time.sleep(600)

    def _silent(self) -> Iterator[bytes]:
        time.sleep(600)
        yield b""

    def _garbage(self) -> Iterator[bytes]:
        while True:
            yield os.urandom(1 << 20)

    def _huge(self) -> Iterator[bytes]:
        """A part with an announced length of 4 GiB."""
        yield _WORDS + b"\r\nContent-Length: 4294967296\r\n\r\n"
        yield from self._garbage()

    def _endless(self) -> Iterator[bytes]:
        """A part without a length and without an end."""
        yield _WORDS + b"\r\n\r\n"
        yield from self._garbage()

    def _junk(self) -> Iterator[bytes]:
        """Every other part is no image."""
        number = 0
        while True:
            yield part(jpeg_image(number) if number % 2 else b"not an image")
            number += 1
            time.sleep(0.1)

    def _ends(self) -> Iterator[bytes]:
        """Two frames and the end, in order."""
        yield part(jpeg_image(0)) + part(jpeg_image(1)) + _WORDS + b"--\r\n"

    def _closes(self) -> Iterator[bytes]:
        """One frame, then the connection is closed."""
        yield part(jpeg_image(0))
        self.wfile.flush()
        self.connection.shutdown(socket.SHUT_RDWR)

    def log_message(self, format: str, *values: object) -> None:
        """Say nothing."""


class Server(ThreadingHTTPServer):
    """Serves on the same port again at once."""

    allow_reuse_address = True
    daemon_threads = True


if __name__ == "__main__":
    with Server(("127.0.0.1", int(sys.argv[1])), Handler) as server:
        if len(sys.argv) > 2:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(sys.argv[2])
            server.socket = context.wrap_socket(server.socket, server_side=True)
        print(server.server_port, flush=True)
        server.serve_forever()
