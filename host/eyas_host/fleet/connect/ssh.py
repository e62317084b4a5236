"""A connection to a device by the system's own `ssh` and `rsync`, with the user's SSH configuration and agent.

It never asks for a password (BatchMode), and every command has a timeout.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import msgspec

from eyas_device.errors import EyasError
from eyas_device.support.closing import Closing
from eyas_device.support.processes import signal_name

_NAME = r"[A-Za-z0-9_.][A-Za-z0-9_.-]*"
_TARGET = rf"(?:(?P<user>{_NAME})@)?(?P<host>{_NAME}|\[[0-9A-Fa-f:.]+\])(?::(?P<port>\d{{1,5}}))?"
_SSH_FAILED = 255
"""Exit code of ssh itself when it cannot connect or lost the connection, and of a command that a signal ended."""
_STAYS = '"$@"; exit $?'
"""A shell's script that outlives its command: one that a signal ended has an exit code of its own, 128 + the signal."""
_SIGNALS = range(129, 129 + 64)
_MAX_FOLDER_BYTES = 60
_FIXES = {  # ssh's own error -> what to do
    "host key verification failed": "log in once by hand to accept its host key; if the key changed, verify it first",
    "permission denied": "authorize your key on the device (ssh-copy-id), or give --identity",
    "connection refused": "check that its SSH server runs, and the port",
    "could not resolve": "check the host name",
    "timed out": "check that it is powered on and reachable",
    "no route": "check that it is powered on and reachable",
}


class FleetError(EyasError, RuntimeError):
    """A device cannot be reached, does not meet the requirements, or refused what was sent."""

    def __init__(self, reason: str, target: object = None) -> None:
        super().__init__(reason if target is None else f"{target}: {reason}")
        self.reason = reason
        """The message without the device's name."""


class Target(msgspec.Struct, frozen=True):
    """A device to connect to."""

    host: str
    """Host name, address, or alias of the user's SSH configuration."""
    user: str = ""
    port: int = 0
    """0: the SSH configuration's."""

    def __str__(self) -> str:
        return f"{self.login}:{self.port}" if self.port else self.login

    @property
    def login(self) -> str:
        """`user@host`, as ssh and rsync expect it."""
        return f"{self.user}@{self.host}" if self.user else self.host

    @classmethod
    def parse(cls, text: str) -> Target:
        """Parse `[user@]host[:port]`, an IPv6 address in brackets. Raises `FleetError` for anything else."""
        match = re.fullmatch(_TARGET, text, re.ASCII)
        port = int((match and match["port"]) or 0)
        if match is None or port > 65535 or (match["port"] and port == 0):
            raise FleetError(f"{text!r}: not a device; user@host or user@host:port is needed")
        return cls(match["host"], match["user"] or "", port)


class SshAccess(msgspec.Struct, frozen=True, kw_only=True):
    """How to log in, in addition to the user's SSH configuration."""

    identity: Path | None = None
    """Private key; no other is tried."""
    port: int | None = None
    """Port of targets given without one."""
    options: tuple[str, ...] = ()
    """Passed to ssh as `-o`; they win over the fields above."""
    connect_s: int = 10
    """Connect timeout, seconds."""


class CommandResult(msgspec.Struct, frozen=True):
    """Exit code and output of a remote command."""

    code: int
    out: str
    err: str

    @property
    def last_line(self) -> str:
        """The last line of its output, or the signal that ended it, for an error message."""
        if self.code in _SIGNALS:
            hint = " (out of memory?)" if self.code == 128 + signal.SIGKILL else ""
            return f"killed by {signal_name(self.code - 128)}{hint}"
        lines = [line.strip() for line in (self.err or self.out).splitlines() if line.strip()]
        return lines[-1] if lines else "no output"


class Remote(Closing):
    """An open connection that commands and copies share. Not thread-safe.

    Raises `FleetError` if it cannot be opened: refused, timed out, wrong key, unknown host.
    """

    def __init__(self, target: Target, access: SshAccess) -> None:
        for tool in ("ssh", "rsync"):
            if shutil.which(tool) is None:
                raise FleetError(f"{tool} is not installed here; apt-get install openssh-client rsync")
        self.target = target
        self._folder = _socket_folder()
        self._ssh = ["ssh", *_flags(target, access), "-o", f"ControlPath={self._folder}/c"]
        try:
            self._connect(access.connect_s)
        except BaseException:
            self.close()
            raise

    def run(
        self, *arguments: str, timeout_s: float = 60.0, become: Sequence[str] = (), stdin: str = ""
    ) -> CommandResult:
        """Run a command on the device, each argument quoted; a non-zero exit code does not raise, 128 + n is signal n.

        Args:
            arguments: The command and its arguments.
            timeout_s: Time limit, seconds.
            become: Prefix that changes the user, e.g. `sudo -n`.
            stdin: Its standard input.

        Raises:
            FleetError: the connection is lost or the time limit is exceeded.

        """
        words = shlex.join(["sh", "-c", _STAYS, "sh", *become, *arguments])
        command = [*self._ssh, "-o", "ControlMaster=no", self._login_for_ssh, words]
        done = self._local(command, timeout_s, stdin)
        if done.returncode == _SSH_FAILED:
            raise self._connection_error(done.stderr)
        return CommandResult(done.returncode, done.stdout, done.stderr)

    def sh(self, script: str, *, timeout_s: float = 60.0, become: Sequence[str] = ()) -> str:
        """Run a shell script on the device and return its output. Raises `FleetError` if it fails."""
        result = self.run("sh", "-euc", script, timeout_s=timeout_s, become=become)
        if result.code:
            raise FleetError(f"{result.last_line} (exit code {result.code})", self.target)
        return result.out

    def send(
        self,
        source: Path,
        destination: str,
        *,
        copy_dest: str | None = None,
        become: Sequence[str] = (),
        private: bool = False,
        timeout_s: float = 1800.0,
    ) -> int:
        """Mirror the local folder `source` to the remote folder `destination` and return the number of bytes sent.

        Args:
            source: Local folder; symbolic links in it are skipped.
            destination: Remote folder.
            copy_dest: Remote folder whose equal or similar files are copied or patched instead of sent.
            become: Prefix that changes the user, e.g. `sudo -n`.
            private: Whether only the owner may read the copies.
            timeout_s: Time limit, seconds.

        Raises:
            FleetError: the copy failed.

        """
        command = ["rsync", "--recursive", "--times", "--perms", "--checksum", "--delete", "--protect-args"]
        command += ["--stats", "--timeout=60", "--chmod=D700,F600" if private else "--chmod=D755,F644"]
        command += [f"--rsh={shlex.join([*self._ssh, '-o', 'ControlMaster=no'])}"]
        command += [f"--rsync-path={shlex.join([*become, 'rsync'])}"]
        command += [f"--copy-dest={copy_dest}"] if copy_dest else []
        done = self._local([*command, f"{source}/", f"{self.target.login}:{destination}/"], timeout_s, "")
        if done.returncode == _SSH_FAILED:
            raise self._connection_error(done.stderr)
        if done.returncode:
            result = CommandResult(done.returncode, "", done.stderr)
            reason = next((line for line in done.stderr.splitlines() if line.startswith("rsync: ")), result.last_line)
            raise FleetError(f"{destination}: the copy failed ({reason.strip()})", self.target)
        sent = re.search(r"Total bytes sent: ([\d,.]+)", done.stdout)
        return int(re.sub(r"\D", "", sent[1])) if sent else 0

    def close(self) -> None:
        """Close the connection."""
        with suppress(FleetError):
            self._local([*self._ssh, "-O", "exit", self._login_for_ssh], 10, "")
        shutil.rmtree(self._folder, ignore_errors=True)

    @property
    def _login_for_ssh(self) -> str:
        return self.target.login.replace("[", "").replace("]", "")  # only rsync needs an address in brackets

    def _connect(self, connect_s: int) -> None:
        """Start the shared master connection; it ends ten minutes after its last use."""
        log = self._folder / "log"  # not a pipe: the connection in the background would keep it open
        command = [*self._ssh, "-o", "ControlMaster=yes", "-o", "ControlPersist=600", "-N", "-f", self._login_for_ssh]
        with log.open("wb") as stream:
            try:
                done = subprocess.run(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=stream,
                    stderr=stream,
                    timeout=3 * connect_s + 30,
                    check=False,
                    env={**os.environ, "LC_ALL": "C"},
                )
            except subprocess.TimeoutExpired:
                raise self._connection_error("the login timed out") from None
        if done.returncode:
            raise self._connection_error(log.read_text(encoding="utf-8", errors="replace"))

    def _local(self, command: list[str], timeout_s: float, stdin: str) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "LC_ALL": "C"}
        try:
            return subprocess.run(
                command,
                input=stdin,
                capture_output=True,
                timeout=timeout_s,
                check=False,
                env=environment,
                encoding="utf-8",
                errors="replace",
            )
        except subprocess.TimeoutExpired:
            raise FleetError(f"no result within {timeout_s:g} s; check whether it is overloaded", self.target) from None

    def _connection_error(self, output: str) -> FleetError:
        lines = [line.strip() for line in output.splitlines() if line.strip()]
        known = [(line, fix) for line in lines for error, fix in _FIXES.items() if error in line.lower()]
        line, fix = known[-1] if known else (lines[-1] if lines else "no output of ssh", "try ssh by hand")
        return FleetError(f"cannot be reached ({line}): {fix}", self.target)


def _socket_folder() -> Path:
    """A private folder for ssh's control socket.

    A socket's path has 107 bytes at most, of which ssh needs some itself, and an option of ssh ends at a blank.
    """
    usual = tempfile.gettempdir()
    fits = len(os.fsencode(usual)) <= _MAX_FOLDER_BYTES and re.fullmatch(r"[\w./+-]+", usual)
    return Path(tempfile.mkdtemp(prefix="eyas-ssh-", dir=usual if fits else "/tmp"))


def _flags(target: Target, access: SshAccess) -> list[str]:
    """Flags of every ssh command. ssh keeps the first value of an option, so the user's come first."""
    flags = [word for option in access.options for word in ("-o", option)]
    if access.identity is not None:
        flags += ["-i", str(access.identity), "-o", "IdentitiesOnly=yes"]
    port = target.port or access.port
    flags += ["-p", str(port)] if port else []
    defaults = (
        "BatchMode=yes",
        f"ConnectTimeout={access.connect_s}",
        "ServerAliveInterval=10",
        "ServerAliveCountMax=3",
    )
    return flags + [word for option in defaults for word in ("-o", option)] + ["-T"]
