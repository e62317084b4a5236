"""How a repository's files are read: parts of them, over connections that stay, and only where it was asked to."""

from __future__ import annotations

import http.server
import re
import ssl
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from eyas_device.updates.fetcher import Fetcher, Limits
from eyas_device.updates.refusals import EndlessDataError, MissingError, UnreachableError

DATA = bytes(range(256)) * 1000


class _Keeping(http.server.BaseHTTPRequestHandler):
    """A server of HTTP 1.1 that knows ranges; what it does is chosen by the path."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.server.seen.append((self.path, self.client_address[1], self.headers.get("Range")))  # type: ignore[attr-defined]
        self.path = self.path.removeprefix("http://updates.test.invalid")
        if self.path.startswith("/moved"):
            return self._answer(302, b"", Location=self.path.replace("/moved", "/ranges", 1))
        if self.path.startswith("/elsewhere"):
            return self._answer(302, b"", Location="ftp://127.0.0.1/file")
        if self.path.endswith("/absent"):
            return self._answer(403, b"no")
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or "")
        if asked is None or self.path.startswith("/whole"):
            return self._answer(200, DATA)
        begin = int(asked[1])
        if self.path.startswith("/wrong"):
            return self._answer(206, DATA[begin - 5 :], **{"Content-Range": f"bytes {begin - 5}-9/{len(DATA)}"})
        if begin >= len(DATA):
            return self._answer(416, b"")
        return self._answer(206, DATA[begin:], **{"Content-Range": f"bytes {begin}-{len(DATA) - 1}/{len(DATA)}"})

    def _answer(self, status: int, body: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        if self.path.endswith("/chunked"):
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            for start in range(0, len(body), 10_000):
                part = body[start : start + 10_000]
                self.wfile.write(b"%x\r\n%s\r\n" % (len(part), part))
            self.wfile.write(b"0\r\n\r\n")
            return
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_args: object) -> None:
        pass


@contextmanager
def keeping(context: ssl.SSLContext | None = None) -> Iterator[tuple[str, list[tuple[str, int, str | None]]]]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Keeping)
    server.daemon_threads = True
    server.seen = []  # type: ignore[attr-defined]
    if context is not None:
        server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield f"http{'s' if context else ''}://127.0.0.1:{server.server_address[1]}", server.seen  # type: ignore[attr-defined]
    finally:
        server.shutdown()
        server.server_close()
        thread.join(10)


def read(fetcher: Fetcher, path: str, offset: int = 0, max_bytes: int = len(DATA)) -> bytes:
    return b"".join(fetcher.open(path, offset=offset, max_bytes=max_bytes))


@pytest.mark.parametrize("path", ["ranges/a", "whole/a", "moved/a", "ranges/chunked", "whole/chunked"])
@pytest.mark.parametrize("offset", [0, 1, 100_000])
def test_a_file_from_any_byte_on(path: str, offset: int) -> None:
    """Whether the server knows ranges or not."""
    with keeping() as (url, _), Fetcher(url) as fetcher:
        assert read(fetcher, path, offset) == DATA[offset:]
        assert read(fetcher, path, offset) == DATA[offset:]


def test_one_connection_serves_many_files() -> None:
    with keeping() as (url, seen), Fetcher(url) as fetcher:
        for _ in range(3):
            read(fetcher, "ranges/a")
        with pytest.raises(MissingError, match="HTTP 403"):
            read(fetcher, "ranges/absent")
        read(fetcher, "ranges/a")
    assert len({port for _, port, _ in seen}) == 2


def test_a_reader_that_stops_early_leaves_no_rest_behind() -> None:
    with keeping() as (url, _), Fetcher(url) as fetcher:
        chunks = fetcher.open("ranges/a", max_bytes=len(DATA))
        next(chunks)
        chunks.close()  # type: ignore[attr-defined]
        assert read(fetcher, "ranges/b", 5) == DATA[5:]


def test_an_idle_connection_that_the_server_ended_is_opened_again() -> None:
    with keeping() as (url, seen), Fetcher(url) as fetcher:
        read(fetcher, "ranges/a")
        fetcher._socket.shutdown(2)  # type: ignore[union-attr]
        assert read(fetcher, "ranges/a") == DATA
        assert len(seen) == 2


@pytest.mark.parametrize(
    ("path", "offset", "max_bytes", "error", "words"),
    [
        ("wrong/a", 10, len(DATA), UnreachableError, "another range"),
        ("ranges/a", len(DATA), 10, UnreachableError, "HTTP 416"),
        ("ranges/a", 0, 1000, EndlessDataError, "256000 bytes; 1000 are allowed"),
        ("ranges/chunked", 0, 1000, EndlessDataError, "longer than the 1000 bytes"),
        ("ranges/a", 100, 1000, EndlessDataError, "255900 bytes; 1000 are allowed"),
        ("elsewhere/a", 0, 1000, UnreachableError, "https://HOST/PATH"),
        ("../etc/passwd", 0, 1000, MissingError, "not a path"),
        ("%2e%2e/etc/passwd", 0, 1000, MissingError, "not a path"),
        ("/etc/passwd", 0, 1000, MissingError, "not a path"),
        ("a\nb", 0, 1000, MissingError, "not a path"),
    ],
)
def test_what_is_not_as_asked_is_refused(
    path: str, offset: int, max_bytes: int, error: type[Exception], words: str
) -> None:
    with keeping() as (url, _), Fetcher(url) as fetcher:
        with pytest.raises(error, match=re.escape(words)):
            read(fetcher, path, offset, max_bytes)
        assert read(fetcher, "ranges/a") == DATA


@pytest.mark.parametrize("prefix", ["", "file://"])
def test_a_folder_is_read_from_any_byte_on(tmp_path: Path, prefix: str) -> None:
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs/a b").write_bytes(DATA)
    with Fetcher(f"{prefix}{tmp_path}") as fetcher:
        assert read(fetcher, "blobs/a%20b", 7) == DATA[7:]
        with pytest.raises(EndlessDataError):
            read(fetcher, "blobs/a%20b", 0, 1000)
        with pytest.raises(MissingError):
            read(fetcher, "blobs/absent")
        with pytest.raises(MissingError, match="not a path"):
            read(fetcher, "blobs/%2e%2e/secret")


def test_the_time_of_the_reader_does_not_count() -> None:
    """A rate limit on the device's side must not look like a slow server."""
    with keeping() as (url, _), Fetcher(url, limits=Limits(answer_s=20, window_s=0.5, window_bytes=10**9)) as fetcher:
        count = 0
        for chunk in fetcher.open("ranges/a", max_bytes=len(DATA)):
            count += len(chunk)
            time.sleep(0.3)
        assert count == len(DATA)


@pytest.mark.parametrize(
    "url",
    ["", "relative/path", "ftp://host/", "http://", "http://user:secret@host/", "http://host:0/", "http://ho st/"],
)
def test_an_address_that_is_none_is_refused(url: str) -> None:
    with pytest.raises(UnreachableError, match="https://HOST/PATH") as caught:
        Fetcher(url)
    assert "secret" not in str(caught.value)


def test_a_server_with_a_certificate_of_its_own_is_not_believed(tmp_path: Path) -> None:
    key, certificate = tmp_path / "key.pem", tmp_path / "cert.pem"
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"),
            *("-keyout", key, "-out", certificate, "-subj", "/CN=localhost", "-days", "2"),
        ],
        check=True,
        capture_output=True,
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    with (
        keeping(context) as (url, _),
        Fetcher(url) as fetcher,
        pytest.raises(UnreachableError, match=r"its certificate is not accepted .* is the clock right"),
    ):
        read(fetcher, "ranges/a")


def test_a_proxy_of_the_environment_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("no_proxy", "NO_PROXY", "HTTP_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with keeping() as (url, seen):
        monkeypatch.setenv("http_proxy", url)
        with Fetcher("http://updates.test.invalid") as fetcher:
            assert read(fetcher, "ranges/a", 5) == DATA[5:]
    assert seen[0][0] == "http://updates.test.invalid/ranges/a"


def test_nothing_listens_there() -> None:
    with Fetcher("http://127.0.0.1:9") as fetcher, pytest.raises(UnreachableError, match="nothing listens there"):
        read(fetcher, "a")
