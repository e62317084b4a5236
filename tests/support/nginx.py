"""nginx on loopback, as a team would serve its repository."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from tests.support.brokers import free_port
from tests.support.fleet_parts import listens
from tests.support.system_parts import require

_CONFIG = """
{user}
daemon off;
worker_processes 1;
pid {folder}/nginx.pid;
error_log {folder}/error.log;
events {{}}
http {{
    log_format short '$status $body_bytes_sent $uri $http_range';
    access_log {folder}/access.log short;
    {temporary}
    server {{
        listen 127.0.0.1:{port};
        root {root};
    }}
}}
"""
_KINDS = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")


class Answer(NamedTuple):
    """A line of the log."""

    status: int
    sent_bytes: int
    path: str
    asked: str
    """The range that was asked for; `-` for the whole."""


class Nginx(NamedTuple):
    """A server that runs."""

    url: str
    folder: Path

    def answers(self) -> list[Answer]:
        """What it has answered."""
        lines = [line.split() for line in (self.folder / "access.log").read_text().splitlines()]
        return [Answer(int(status), int(size), path, asked) for status, size, path, asked in lines]


@contextmanager
def nginx(root: Path, folder: Path) -> Iterator[Nginx]:
    """Serve the files below `root`; its own files go to `folder`."""
    folder.mkdir()
    port = free_port()
    temporary = " ".join(f"{kind}_temp_path {folder}/{kind};" for kind in _KINDS)
    user = "user root;" if os.getuid() == 0 else ""  # its workers read what belongs to who runs the test
    config = folder / "nginx.conf"
    config.write_text(_CONFIG.format(user=user, folder=folder, root=root, port=port, temporary=temporary))
    process = subprocess.Popen([*require("nginx"), "-c", config, "-e", folder / "error.log"])
    try:
        deadline = time.monotonic() + 20
        while not listens(port):
            assert process.poll() is None and time.monotonic() < deadline, (folder / "error.log").read_text()
            time.sleep(0.05)
        yield Nginx(f"http://127.0.0.1:{port}", folder)
    finally:
        process.terminate()
        process.wait(20)
