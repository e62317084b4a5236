"""A private PostgreSQL server for the tests, and a database of its own for each test."""

from __future__ import annotations

import itertools
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest

from tests.support.brokers import free_port
from tests.support.system_parts import require

_FAST = "-c fsync=off -c full_page_writes=off -c max_connections=60 -c shared_buffers=32MB"
"""A crash of the server process loses nothing without these; only a power cut would."""


class PostgresServer:
    """A server on a loopback port that can be killed and started again. Root cannot run one; `postgres` does then."""

    def __init__(self) -> None:
        self._initdb, self._pg_ctl = require("initdb", "pg_ctl")
        self._as: list[str] = []
        self._owner = (os.geteuid(), os.getegid())
        self.folder = Path(tempfile.mkdtemp(prefix="eyas-postgres-"))
        if os.geteuid() == 0:
            user = pwd.getpwnam("postgres")
            self._owner = (user.pw_uid, user.pw_gid)
            os.chown(self.folder, *self._owner)
            self._as = ["setpriv", f"--reuid={user.pw_uid}", f"--regid={user.pw_gid}", "--clear-groups"]
        self.port = free_port()
        self._numbers = itertools.count()
        self._data = self.folder / "data"
        options = "--username=eyas --auth=trust --encoding=UTF8 --locale=C.UTF-8 --no-sync --no-instructions"
        self._run(self._initdb, "--pgdata", str(self._data), *options.split())

    def start(self, *options: str) -> None:
        flags = f"-p {self.port} -c listen_addresses=127.0.0.1 -k {self.folder} {_FAST} {' '.join(options)}"
        self._run(self._pg_ctl, "start", "-w", "-s", "-D", str(self._data), "-l", str(self.folder / "log"), "-o", flags)

    def start_after_kill(self) -> None:
        """Start it as soon as the last session of the killed server has ended, which it checks by its shared memory."""
        deadline = time.monotonic() + 20
        while True:
            try:
                return self.start()
            except AssertionError:
                if time.monotonic() > deadline:
                    raise

    def stop(self) -> None:
        """Stop it as an administrator does: sessions are ended, then it checkpoints."""
        self._run(self._pg_ctl, "stop", "-w", "-s", "-m", "fast", "-D", str(self._data))

    @property
    def pid(self) -> int:
        return int((self._data / "postmaster.pid").read_text().splitlines()[0])

    def kill(self) -> None:
        """SIGKILL to the server; its sessions notice and end."""
        os.kill(self.pid, signal.SIGKILL)

    def execute(self, statement: str, *, database: str = "postgres") -> None:
        with psycopg.connect(self._address(database), autocommit=True) as connection:
            connection.execute(statement)  # type: ignore[arg-type]  # it is no user's input

    def adopt(self, folder: Path) -> None:
        """Create a folder that the server owns."""
        folder.mkdir()
        os.chown(folder, *self._owner)

    def create_database(self, options: str = "") -> str:
        """URL of a new database."""
        name = f"test_{next(self._numbers)}"
        self.execute(f"CREATE DATABASE {name} {options}")
        return f"postgresql://eyas@127.0.0.1:{self.port}/{name}"

    def close(self) -> None:
        if (self._data / "postmaster.pid").exists():
            subprocess.run(
                [*self._as, self._pg_ctl, "stop", "-w", "-s", "-m", "immediate", "-D", str(self._data)], check=False
            )
        shutil.rmtree(self.folder)

    def _address(self, database: str) -> str:
        return f"host=127.0.0.1 port={self.port} user=eyas dbname={database}"

    def _run(self, *command: str) -> None:
        done = subprocess.run(
            [*self._as, *command], cwd="/", stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, timeout=60
        )
        assert done.returncode == 0, done.stderr


@pytest.fixture(scope="session")
def postgres() -> Iterator[PostgresServer]:
    """The session's server; a test that stops it uses `own_postgres`."""
    yield from _running_server()


@pytest.fixture
def own_postgres() -> Iterator[PostgresServer]:
    """A running server for one test, which may stop and kill it."""
    yield from _running_server()


def _running_server() -> Iterator[PostgresServer]:
    server = PostgresServer()
    try:
        server.start()
        yield server
    finally:
        server.close()


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """URL of an empty database; a test with it runs on each database that Eyas supports."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'fleet.db'}"
    server: PostgresServer = request.getfixturevalue("postgres")
    return server.create_database()
