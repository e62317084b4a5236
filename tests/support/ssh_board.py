"""A device for the tests of a flash: an OpenSSH server on loopback with a folder as its root."""

from __future__ import annotations

import getpass
import os
import pwd
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import msgspec
import pytest

import eyas_device
from eyas_device.bundle import MANIFEST, sha256
from eyas_device.updates.records import Lock
from eyas_device.updates.slots import Slots
from eyas_host.fleet.connect.ssh import SshAccess
from eyas_host.fleet.deploy.flash import FlashResult, FlashSettings, flash
from tests.support.brokers import free_port
from tests.support.system_parts import require, unavailable

_SSHD = shutil.which("sshd", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin")
_FAKE_SYSTEMCTL = """#!/bin/sh
echo "$*" >> {log}
case "$1" in
  is-system-running) echo running ;;
  is-active) kill -0 "$(cat {log}.pid 2>/dev/null)" 2>/dev/null ;;
  is-enabled) exit 1 ;;
  show) case "$*" in
    *ActiveState*) kill -0 "$(cat {log}.pid 2>/dev/null)" 2>/dev/null || exit 0
      printf 'ActiveState=active\\nUnitFileState=enabled\\nActiveEnterTimestampMonotonic=1\\n' ;;
    *) echo 0 ;;
    esac ;;
  restart)
    case "$*" in *eyas-device-update) exit 0 ;; esac
    kill "$(cat {log}.pid 2>/dev/null)" 2>/dev/null
    while [ -e {state}/agent.json ]; do sleep 0.05; done
    [ "$(readlink {state}/slots/current)" != "$(cat {log}.broken 2>/dev/null)" ] || {{ echo "Job failed."; exit 1; }}
    {python} -m eyas_device run --config {config} >{log}.agent 2>&1 </dev/null & echo $! >{log}.pid
    while ! grep -q '"bundle":"/' {state}/agent.json 2>/dev/null; do
      kill -0 "$(cat {log}.pid)" 2>/dev/null || exit 1
      sleep 0.05
    done ;;
esac
"""
LIVE = "fake:?live=1&fps=10&frames=1000000&size=64x48"


class Board:
    """A device: a real SSH server with a folder as its root, and a folder of commands that override the system's."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.root = folder / "device root"  # with a space: everything has to be quoted
        self.state = self.root / "var/lib/eyas"
        self.tools = folder / "tools"
        self.port = free_port()
        self.name = f"{getpass.getuser()}@127.0.0.1:{self.port}"
        self.key = folder / "key"
        self._process: subprocess.Popen[bytes] | None = None
        for made in (self.root, self.tools):
            made.mkdir()
        for name in ("key", "host_key", "other_key"):
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / name], check=True)
        shutil.copy(folder / "key.pub", folder / "authorized_keys")
        public = (folder / "host_key.pub").read_text().split()[:2]
        (folder / "known_hosts").write_text(f"[127.0.0.1]:{self.port} {' '.join(public)}\n")
        package = Path(eyas_device.__file__).parents[1]  # the tree that is being tested
        path = f"{self.tools}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
        (folder / "sshd_config").write_text(
            f'ListenAddress 127.0.0.1\nPort {self.port}\nHostKey "{folder}/host_key"\nPidFile none\nUsePAM no\n'
            f'AuthorizedKeysFile "{folder}/authorized_keys"\nPasswordAuthentication no\nStrictModes no\n'
            f'SetEnv "PATH={path}" "PYTHONPATH={package}"\n'
        )

    @property
    def access(self) -> SshAccess:
        """Log in with the test's own key and known hosts; the user's are not read."""
        return SshAccess(
            identity=self.key, options=(f'UserKnownHostsFile="{self.folder}/known_hosts"', "IdentityAgent=none")
        )

    def start(self) -> Board:
        assert _SSHD is not None
        if os.getuid() == 0:
            Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)  # sshd insists on it when it is root
        command = [_SSHD, "-D", "-e", "-f", self.folder / "sshd_config", "-E", self.folder / "sshd.log"]
        self._process = subprocess.Popen(command)
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            try:
                socket.create_connection(("127.0.0.1", self.port), timeout=1).close()
                return self
            except OSError:
                assert self._process.poll() is None, (self.folder / "sshd.log").read_text()
                time.sleep(0.02)
        raise AssertionError("sshd did not listen within 20 s")

    def stop(self) -> None:
        if self._process is not None:
            self._process.terminate()
            self._process.wait(10)
            self._process = None

    def tool(self, name: str, script: str) -> None:
        """Override a command of the system."""
        path = self.tools / name
        path.write_text(script)
        path.chmod(0o755)

    def flash(
        self, bundle: Path, *targets: str, access: SshAccess | None = None, **options: object
    ) -> list[FlashResult]:
        """Flash with this test's own interpreter."""
        self.lines: list[str] = []
        settings = FlashSettings(**{"python": sys.executable, "root": str(self.root), **options})  # type: ignore[arg-type]
        return flash(targets or [self.name], bundle, settings, access=access or self.access, say=self.lines.append)

    def install(self, bundle: Path) -> None:
        """Install a bundle without SSH, faster than a flash."""
        Slots(self.state).install(bundle)

    def version(self) -> str | None:
        """Version of the current bundle."""
        current = Slots(self.state).current()
        return None if current is None else msgspec.json.decode((current / MANIFEST).read_bytes())["version"]

    def tree(self) -> dict[str, str]:
        """Every file and link below the root, with its content."""
        return {
            str(path.relative_to(self.root)): str(path.readlink()) if path.is_symlink() else sha256(path)
            for path in self.root.rglob("*")
            if path.is_symlink() or path.is_file()
        }


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Board]:
    require("ssh", "ssh-keygen", "rsync", "sshd")
    if pwd.getpwuid(os.getuid()).pw_shell.endswith(("nologin", "false")):
        unavailable("this user may not log in: no shell")
    board = Board(tmp_path_factory.mktemp("ssh")).start()
    yield board
    board.stop()


@pytest.fixture
def board(server: Board) -> Iterator[Board]:
    """The server, with nothing on it."""
    for folder in (server.root, server.tools):
        shutil.rmtree(folder)
        folder.mkdir()
    yield server


def device_toml(board: Board, more: str = "") -> str:
    """A configuration of the service."""
    return f'[device]\nname = "cam"\nstate = "{board.state}"\n[camera]\nsource = "{LIVE}"\n{more}'


@pytest.fixture
def service(board: Board, tmp_path: Path) -> Iterator[dict[str, object]]:
    """A fake systemd that starts real agents and logs its commands; `LOG.broken` names a slot that fails to start."""
    log = tmp_path / "systemctl.log"
    facts = {"log": log, "state": board.state, "python": sys.executable, "config": board.root / "etc/eyas/device.toml"}
    board.tool("systemctl", _FAKE_SYSTEMCTL.format(**{name: shlex.quote(str(fact)) for name, fact in facts.items()}))
    if os.getuid() != 0:  # the device lets this user become root, as far as these tests can see
        board.tool("sudo", '#!/bin/sh\nshift\nexec "$@"\n')
        board.tool("runuser", '#!/bin/sh\nwhile [ "$1" != -- ]; do shift; done\nshift\nexec "$@"\n')
    (tmp_path / "unit").write_text(f"[Service]\nUser={getpass.getuser()}\n")
    (tmp_path / "device.toml").write_text(device_toml(board))
    yield {"service": True, "unit": tmp_path / "unit", "config": tmp_path / "device.toml", "settle_s": 0.1}
    with suppress(FileNotFoundError, ProcessLookupError):
        os.kill(int((tmp_path / "systemctl.log.pid").read_text()), signal.SIGTERM)
    deadline = time.monotonic() + 20
    while Lock.is_held(board.state / ".agent.lock") and time.monotonic() < deadline:
        time.sleep(0.05)
