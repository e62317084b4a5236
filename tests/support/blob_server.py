"""A file server on loopback that behaves as it is told: with ranges or without, and in each hostile way."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from tests.support.http_threads import in_thread

MODES = ("ranges", "no ranges", "short", "endless", "slow", "tampered", "wrong range")
_CHUNK = 4096


class BlobServer(ThreadingHTTPServer):
    """Serves the files below `root`; `mode` may change between requests."""

    daemon_threads = True

    def __init__(self, root: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.root, self.mode = root, "ranges"
        self.cut = -1
        """After so many bytes of a body the connection ends, once; -1: never."""
        self.requests: list[tuple[str, int]] = []
        """Path and first byte of each request."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is no news."""


class _Handler(BaseHTTPRequestHandler):
    server: BlobServer
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        server, path = self.server, self.server.root / self.path.lstrip("/")
        asked = self.headers.get("Range", "")
        start = int(asked.removeprefix("bytes=").rstrip("-")) if asked else 0
        server.requests.append((self.path, start))
        if not path.is_file():
            self.send_error(404)
            return
        data = path.read_bytes()
        if server.mode == "tampered":
            data = bytes([data[0] ^ 1]) + data[1:]
        if server.mode == "short":
            data = data[: len(data) // 2]
        if server.mode == "wrong range" and asked:
            start += 1
        ranged = bool(asked) and server.mode != "no ranges"
        body = data[start:] if ranged else data
        self.send_response(206 if ranged else 200)
        if ranged:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        if server.mode != "endless":
            self.send_header("Content-Length", str(len(body)))
        self.send_header("Connection", "close")
        self.end_headers()
        self.close_connection = True
        self._send(body)

    def _send(self, body: bytes) -> None:
        server = self.server
        if 0 <= server.cut < len(body):
            body, server.cut = body[: server.cut], -1
        for at in range(0, len(body), _CHUNK):
            self.wfile.write(body[at : at + _CHUNK])
            if server.mode == "slow":
                time.sleep(3600)
        while server.mode == "endless":
            self.wfile.write(bytes(_CHUNK))

    def log_message(self, format: str, *args: Any) -> None:
        """Be quiet."""


@contextmanager
def serving(root: Path) -> Iterator[BlobServer]:
    """A server in a thread of this process."""
    with in_thread(BlobServer(root)) as server:
        yield server
