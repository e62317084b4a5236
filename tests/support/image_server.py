"""A web server on loopback for the files of a folder, with ranges and versions, that fails as it is told."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from tests.support.http_threads import in_thread


class ImageServer(ThreadingHTTPServer):
    """Serves the files below `root`."""

    daemon_threads = True

    def __init__(self, root: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.root = root
        self.cuts: list[int] = []
        """After so many bytes of a body the connection ends, one for each of the next requests."""
        self.statuses: list[int] = []
        """Answers of the next requests, instead of the file."""
        self.ranges, self.versions, self.head, self.lengths = True, True, True, True
        self.login = ""
        """The `Authorization` that is asked for."""
        self.redirect = ""
        """Every file is at this server instead."""
        self.requests: list[tuple[str, str, int]] = []
        """Method, path and first byte of each request."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is no news."""


class _Handler(BaseHTTPRequestHandler):
    server: ImageServer
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        if self.server.head:
            self._answer(body=False)
        else:
            self._fail(405)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, *, body: bool) -> None:
        server, path = self.server, self.server.root / unquote(self.path).lstrip("/")
        first, _, last = self.headers.get("Range", "").removeprefix("bytes=").partition("-")
        start = int(first or 0)
        server.requests.append((self.command, self.path, start))
        if server.statuses:
            return self._fail(server.statuses.pop(0))
        if server.redirect:
            self.send_response(302)
            self.send_header("Location", server.redirect + self.path)
            self.send_header("Content-Length", "0")
            return self.end_headers()
        if server.login and self.headers.get("Authorization") != server.login:
            return self._fail(401)
        if not path.is_file():
            return self._fail(404)
        data = path.read_bytes()
        ranged = bool(first) and server.ranges
        end = int(last) + 1 if last else len(data)
        sent = data[start:end] if ranged else data
        self.send_response(206 if ranged else 200)
        if ranged:
            self.send_header("Content-Range", f"bytes {start}-{start + len(sent) - 1}/{len(data)}")
        if server.versions:
            self.send_header("ETag", f'"{hash(data)}"')
        if server.lengths:
            self.send_header("Content-Length", str(len(sent)))
        self.send_header("Connection", "close")
        self.end_headers()
        self.close_connection = True
        if body:
            self.wfile.write(sent[: server.cuts.pop(0)] if server.cuts else sent)
        return None

    def _fail(self, status: int) -> None:
        self.send_response(status)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        """Be quiet."""


@contextmanager
def serving_images(root: Path) -> Iterator[ImageServer]:
    """A server in a thread of this process."""
    with in_thread(ImageServer(root)) as server:
        yield server
