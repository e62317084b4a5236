"""Signed repositories for tests, and servers that misuse them."""

from __future__ import annotations

import http.server
import json
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from eyas_device.config import UpdateSection
from eyas_device.updates.clock import CLOCK, TrustedClock
from eyas_device.updates.fetcher import Limits
from eyas_device.updates.trust import UPDATES, TrustedRepository
from eyas_host.fleet.updates.ceremony import create
from eyas_host.fleet.updates.repository import Repository
from tests.support.bundles import edit
from tests.support.http_threads import in_thread

PASSPHRASE = "correct horse battery"
DAY_S = 86400.0
QUICK = Limits(answer_s=1.0, window_s=1.0, window_bytes=30_000)
"""Limits for servers that are slow on purpose."""


def ask(_name: str, _new: bool) -> str:
    return PASSPHRASE


def make_repository(kit: Path, now: Callable[[], float] = time.time) -> Repository:
    return create(kit, ask, now=now)


def open_repository(kit: Path, now: Callable[[], float] = time.time) -> Repository:
    return Repository(kit, ask=ask, now=now)


def versioned(bundle: Path, folder: Path, version: str, **fields: object) -> Path:
    """A copy of a bundle with another version."""
    return edit(Path(shutil.copytree(bundle, folder)), version=version, **fields)


class Camera:
    """A device's side of a repository: its pinned root, its state and its clock."""

    def __init__(self, folder: Path, root: bytes, url: str, site: str = "default") -> None:
        folder.mkdir(exist_ok=True)
        self.root, self.state, self.url, self.site = folder / "root.json", folder / "state", url, site
        self.root.write_bytes(root)
        self.time: float | None = None
        """What its clock says; None: this machine's."""

    def open(self, limits: Limits | None = None) -> TrustedRepository:
        clock = TrustedClock(self.state / UPDATES / CLOCK, now=lambda: time.time() if self.time is None else self.time)
        return TrustedRepository(
            UpdateSection(url=self.url, root=str(self.root)),
            self.site,
            self.state,
            limits=limits or Limits(),
            clock=clock,
        )

    def look(self) -> Any:
        """Refresh, and return what was found out about the repository."""
        with self.open() as repository:
            return repository.refresh()

    def wanted(self, model: str = "tiny-shapes") -> str:
        """Version that the device's channel wants; empty for none."""
        with self.open() as repository:
            repository.refresh()
            channel = repository.channel(model)
            return repository.release(channel.target)[0].version if channel and channel.target else ""


class _Handler(http.server.SimpleHTTPRequestHandler):
    """A static server; `answers` may take over single paths."""

    answers: dict[str, Callable[[http.server.BaseHTTPRequestHandler], None]]

    def do_GET(self) -> None:
        self.server.requested.append(self.path)  # type: ignore[attr-defined]
        if (answer := self.server.answers.get(self.path)) is not None:  # type: ignore[attr-defined]
            answer(self)
            return
        super().do_GET()

    def log_message(self, *_args: object) -> None:
        pass


@contextmanager
def served(folder: Path) -> Iterator[tuple[str, http.server.ThreadingHTTPServer]]:
    """A real static server of a folder on loopback; its `answers` (path -> function of the handler) can be hostile."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(_Handler, directory=str(folder)))
    server.answers, server.requested = {}, []  # type: ignore[attr-defined]
    server.daemon_threads = True
    with in_thread(server):
        yield f"http://127.0.0.1:{server.server_address[1]}", server


def change(path: Path, edit_content: Callable[[dict[str, Any]], object]) -> None:
    """Change a JSON file, as somebody without its keys would."""
    content = json.loads(path.read_bytes())
    edit_content(content)
    path.write_bytes(json.dumps(content).encode())


def newest(folder: Path, role: str) -> Path:
    """The newest metadata of a role."""
    files = (folder / "metadata").glob(f"*.{role}.json")
    return max(files, key=lambda path: int(path.name.split(".")[0]))
