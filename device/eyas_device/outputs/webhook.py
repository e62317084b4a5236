"""Webhook: POST of an answer as JSON to an HTTP server, without redirects and with one time limit for everything."""

from __future__ import annotations

import http.client
import socket
import ssl
import threading
from contextlib import suppress
from urllib.parse import urlsplit

import msgspec

from eyas_device import __version__
from eyas_device.config import OutputSection
from eyas_device.outputs.answer import Answer
from eyas_device.outputs.delivery import OutputError
from eyas_device.telemetry.tls import Security

_MAX_ATTEMPTS = 8


class Webhook:
    """Posts answers to one address. Certificates are verified; a redirect is an error that names its target's host."""

    max_attempts: int | None = _MAX_ATTEMPTS

    def __init__(self, output: OutputSection) -> None:
        self._url, self._ca, self._timeout_s = urlsplit(output.url), output.ca, output.timeout_s
        self._header_file = output.header_file
        self._where = f"{self._url.scheme}://{self._url.hostname}" + (f":{self._url.port}" if self._url.port else "")

    def deliver(self, answer: Answer) -> None:
        """Post an answer. Raises `OutputError` for anything but a success (2xx) within the time limit."""
        headers = {
            "Content-Type": "application/json",
            "User-Agent": f"eyas-device/{__version__}",
            "Connection": "close",
        }
        headers |= self._secret_header()
        path = (self._url.path or "/") + (f"?{self._url.query}" if self._url.query else "")
        connection = self._connection()
        expired = threading.Event()
        timer = threading.Timer(self._timeout_s, _shut, (connection, expired))
        timer.daemon = True
        timer.start()
        try:
            connection.request("POST", path, body=msgspec.json.encode(answer), headers=headers)
            response = connection.getresponse()
            status, location = response.status, response.getheader("Location") or ""
        except (OSError, http.client.HTTPException, ValueError) as error:
            late = expired.is_set() or isinstance(error, TimeoutError)
            why = f"no answer within {self._timeout_s:g} s" if late else str(error) or type(error).__name__
            raise OutputError(f"{self._where}: {why}") from None
        finally:
            timer.cancel()
            connection.close()
        if 300 <= status < 400:
            host = urlsplit(location).hostname or "the same host"
            raise OutputError(f"{self._where}: HTTP {status}, a redirect to {host}: set `url` to the final address")
        if not 200 <= status < 300:
            raise OutputError(f"{self._where}: HTTP {status}")

    def close(self) -> None:
        """Nothing stays open between two answers."""

    def _connection(self) -> http.client.HTTPConnection:
        host, port = self._url.hostname or "", self._url.port
        if self._url.scheme == "http":
            return http.client.HTTPConnection(host, port, timeout=self._timeout_s)
        try:
            context = ssl.create_default_context(cafile=self._ca or None)
        except OSError as error:  # ssl's errors are OSErrors
            raise OutputError(f"{self._ca}: {error.strerror or error}; a PEM file of certificates is needed") from None
        return http.client.HTTPSConnection(host, port, timeout=self._timeout_s, context=context)

    def _secret_header(self) -> dict[str, str]:
        """The header in `header_file`, read at each attempt, so that it can be replaced while the agent runs."""
        if not self._header_file:
            return {}
        line = Security(password_file=self._header_file).password() or ""
        name, colon, value = line.partition(":")
        if not (colon and name.isascii() and name.replace("-", "").isalnum() and value.strip().isprintable()):
            raise OutputError(f"{self._header_file}: the first line must be a header: `NAME: VALUE`")
        return {name: value.strip()}


def _shut(connection: http.client.HTTPConnection, expired: threading.Event) -> None:
    """End whatever the connection waits for, also a server that sends one byte at a time."""
    expired.set()
    sock = connection.sock
    if sock is not None:
        with suppress(OSError):
            sock.shutdown(socket.SHUT_RDWR)
