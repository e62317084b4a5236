"""Serve HTTP in a thread of this process."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import HTTPServer
from typing import TypeVar

_Server = TypeVar("_Server", bound=HTTPServer)


@contextmanager
def in_thread(server: _Server) -> Iterator[_Server]:
    """Serve until the block ends, then close the server."""
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join(10)
