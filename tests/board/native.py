"""A systemd of this machine as the first process of namespaces of its own: a board for what needs no kernel of its own.

Its services, users and files are as on a board, at this machine's full speed: `eyas flash` reaches it by ssh. Kernel,
processor and network are this machine's, its file system is a layer above this machine's, in memory. A power cut, a
camera and a disk of its own has only an emulated board (`machine.py`).
"""

from __future__ import annotations

import os
import platform
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import pytest

from eyas_host.fleet.connect.preflight import DeviceFacts
from tests.support.brokers import free_port
from tests.support.system_parts import SYSTEM_PYTHON, find, require

_NAMESPACES = (
    *("unshare", "--mount", "--pid", "--fork", "--kill-child", "--uts", "--ipc", "--cgroup"),
    str(Path(__file__).with_suffix(".sh")),
)
_START_S = 60
_SSH = """[Service]
ExecStart={sshd} -D -e -f /etc/board-sshd_config
RuntimeDirectory=sshd
"""
_SSH_CONFIG = """ListenAddress 127.0.0.1
Port {port}
HostKey /etc/board-host_key
PermitRootLogin prohibit-password
PasswordAuthentication no
PidFile none
SetEnv PATH=/usr/sbin:/usr/bin:/sbin:/bin
StrictModes no
UsePAM no
Subsystem sftp internal-sftp
"""


@cache
def needs_namespaces() -> None:
    """Skip the test where this user may not make namespaces, or cannot start a systemd in them."""
    require("unshare", "nsenter", "setpriv", "sshd", "ssh-keygen", "rsync")
    if os.getuid():
        pytest.skip("namespaces with a systemd in them need root")
    if not Path("/lib/systemd/systemd").exists() or not Path(SYSTEM_PYTHON).exists():
        pytest.skip("systemd and the distribution's Python are not installed")
    with tempfile.TemporaryDirectory(prefix="eyas-probe-") as folder:
        done = subprocess.run([*_NAMESPACES, folder, "true"], capture_output=True, text=True, timeout=60, check=False)
    if done.returncode:
        pytest.skip(f"no namespaces can be made here: {done.stderr.strip()}")


def this_machine() -> DeviceFacts:
    """What wheels for it depend on."""
    version = subprocess.run(
        [SYSTEM_PYTHON, "-c", "import platform; print(platform.python_version())"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    return DeviceFacts(machine=platform.machine(), glibc=" ".join(platform.libc_ver()), python_version=version)


class NativeBoard:
    """A board in namespaces; what it writes is gone when it is closed.

    Args:
        folder: Where its keys, its log and the places of its mounts go.

    """

    host, camera = "localhost", "fake:?live=1&fps=3&frames=1000000&size=64x48"
    small_camera = "fake:?live=1&fps=12.5&frames=1000000&size=64x48"

    def __init__(self, folder: Path) -> None:
        self.folder, self.port = folder, free_port()
        folder.chmod(0o755)
        self.log = folder / "systemd.log"
        self._process: subprocess.Popen[bytes] | None = None
        self._first = 0  # its first process, as this machine numbers it
        for name in ("key", "host_key"):
            subprocess.run([*require("ssh-keygen"), "-q", "-t", "ed25519", "-N", "", "-f", folder / name], check=True)
        public = (folder / "host_key.pub").read_text().split()[:2]
        (folder / "known_hosts").write_text(f"[127.0.0.1]:{self.port} {' '.join(public)}\n")

    @property
    def ssh_options(self) -> tuple[str, ...]:
        """`KEY=VALUE` for `eyas flash --ssh-option`."""
        return (
            f"IdentityFile={self.folder}/key",
            "IdentitiesOnly=yes",
            f"UserKnownHostsFile={self.folder}/known_hosts",
            "StrictHostKeyChecking=yes",
        )

    def start(self) -> NativeBoard:
        """Start it, and its ssh server, and wait until root can log in."""
        # --pdeathsig: it does not outlive the thread that started it; --kill-child: nor its first process this one
        command = ["setpriv", "--pdeathsig", "KILL", *_NAMESPACES, str(self.folder)]
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
        self._first = self._child()
        self._wait("systemd", "test -S /run/systemd/private")
        self.run("systemctl is-system-running --wait", check=False, timeout=_START_S)
        self.run("umask 077; cat >/etc/board-host_key", stdin=(self.folder / "host_key").read_bytes())
        authorized = "umask 077; rm -rf /root/.ssh; mkdir /root/.ssh; cat >/root/.ssh/authorized_keys"
        self.run(authorized, stdin=(self.folder / "key.pub").read_bytes())
        self.run("cat >/etc/board-sshd_config", stdin=_SSH_CONFIG.format(port=self.port))
        self.run("cat >/etc/systemd/system/board-ssh.service", stdin=_SSH.format(sshd=find("sshd")))
        self.run("systemctl daemon-reload && systemctl start board-ssh")
        self._wait("ssh", f"exec 3<>/dev/tcp/127.0.0.1/{self.port}")
        return self

    def run(
        self, command: str, *, check: bool = True, timeout: float = 120, stdin: str | bytes | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run a shell command as root; with `check`, one that fails is an error that shows its output."""
        data = stdin.encode() if isinstance(stdin, str) else stdin or b""
        enter = ["nsenter", "--target", str(self._first), "--mount", "--uts", "--ipc", "--pid", "--cgroup", "--root"]
        shell = ["env", "-i", "HOME=/root", "PATH=/usr/sbin:/usr/bin:/sbin:/bin", "bash", "-c", 'cd && eval "$0"']
        words = [*enter, "--wd", *shell, command]
        raw = subprocess.run(words, input=data, capture_output=True, timeout=timeout, check=False)
        out, err = (stream.decode(errors="replace") for stream in (raw.stdout, raw.stderr))
        assert not check or raw.returncode == 0, f"{command}: exit {raw.returncode}\n{out}{err}"
        return subprocess.CompletedProcess(command, raw.returncode, out, err)

    def put(self, source: Path, destination: str) -> None:
        """Copy a file or a folder there."""
        there = Path(f"/proc/{self._first}/root{destination}")
        there.parent.mkdir(parents=True, exist_ok=True)
        (shutil.copytree if source.is_dir() else shutil.copy)(source, there)

    def connect(self, path: str) -> socket.socket:
        """A connection to a Unix socket there; `OSError` if that is not possible."""
        connection = socket.socket(socket.AF_UNIX)
        connection.settimeout(20)
        try:
            connection.connect(f"/proc/{self._first}/root{path}")
        except BaseException:
            connection.close()
            raise
        return connection

    @contextmanager
    def disk(self, content: Path, file: Path) -> Iterator[str]:
        """Plug a disk with the content of a folder in, without udev; its name below /dev."""
        with file.open("wb") as stream:
            stream.truncate(64 << 20)
        subprocess.run([*require("mkfs.ext4"), "-q", "-L", "EYAS", "-d", content, file], check=True)
        loop = subprocess.run(["losetup", "--find", "--show", file], check=True, capture_output=True, text=True)
        node = Path(loop.stdout.strip())
        try:
            self.run(f"mknod {node} b {os.major(node.stat().st_rdev)} {os.minor(node.stat().st_rdev)}")
            yield node.name
        finally:
            self.run(f"rm -f {node}")
            subprocess.run(["losetup", "--detach", node], check=True)

    def close(self) -> None:
        """End all of its processes."""
        if self._process is not None:
            self._process.kill()
            self._process.wait(30)
            self._process = None
        for name in ("root", "layer"):
            shutil.rmtree(self.folder / name, ignore_errors=True)  # empty: nothing is mounted on this side

    def __enter__(self) -> NativeBoard:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _child(self) -> int:
        """The process that `unshare` forks, once it is systemd."""
        assert self._process is not None
        pid, deadline = self._process.pid, time.monotonic() + _START_S
        while time.monotonic() < deadline:
            assert self._process.poll() is None, f"it ended: {self.log.read_text(errors='replace')}"
            children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
            if children and Path(f"/proc/{children[0]}/comm").read_text() == "systemd\n":
                return int(children[0])
            time.sleep(0.05)
        raise AssertionError(f"no systemd within {_START_S} s: {self.log.read_text(errors='replace')}")

    def _wait(self, what: str, command: str) -> None:
        deadline = time.monotonic() + _START_S
        while self.run(command, check=False).returncode:
            assert time.monotonic() < deadline, f"no {what} within {_START_S} s: {self.log.read_text(errors='replace')}"
            time.sleep(0.1)
