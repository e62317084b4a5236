"""One connection to a device by the system's own `ssh` and `rsync`: the user's configuration and agent count.

Nothing ever asks for a password (BatchMode), and nothing waits for ever.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import msgspec

from eyas_device.errors import EyasError
from eyas_device.support.closing import Closing

_NAME = r"[A-Za-z0-9_.][A-Za-z0-9_.-]*"
_TARGET = rf"(?:(?P<user>{_NAME})@)?(?P<host>{_NAME}|\[[0-9A-Fa-f:.]+\])(?::(?P<port>\d{{1,5}}))?"
_REFUSED = 255
"""The exit code of ssh itself when it cannot connect or lost the connection."""
_FIXES = {
    "host key verification failed": "log in once by hand to learn its key, or compare it if it changed",
    "permission denied": "see that a key of yours is allowed there (ssh-copy-id), or give --identity",
    "connection refused": "see that its ssh server runs and that the port is right",
    "could not resolve": "see that the name is right",
    "timed out": "see that it is on and that the network lets you reach it",
    "no route": "see that it is on and that the network lets you reach it",
}


class FleetError(EyasError, RuntimeError):
    """A device cannot be reached, is not fit, or refused what was sent."""


class Target(msgspec.Struct, frozen=True):
    """Whom to connect to."""

    host: str
    """A name, an address, or an alias of the user's ssh configuration."""
    user: str = ""
    port: int = 0
    """0: what ssh takes by itself."""

    def __str__(self) -> str:
        return f"{self.login}:{self.port}" if self.port else self.login

    @property
    def login(self) -> str:
        """`user@host` as ssh and rsync take it."""
        return f"{self.user}@{self.host}" if self.user else self.host

    @classmethod
    def parse(cls, text: str) -> Target:
        """Read `[user@]host[:port]`, an IPv6 address in brackets. Raises `FleetError` for anything else."""
        match = re.fullmatch(_TARGET, text, re.ASCII)
        port = int((match and match["port"]) or 0)
        if match is None or port > 65535 or (match["port"] and port == 0):
            raise FleetError(f"{text!r}: no device; user@host or user@host:port is needed")
        return cls(match["host"], match["user"] or "", port)


class Access(msgspec.Struct, frozen=True, kw_only=True):
    """How to connect, beside what the user's ssh configuration says."""

    identity: Path | None = None
    """Private key; no other is tried then."""
    port: int | None = None
    """For targets that name none."""
    options: tuple[str, ...] = ()
    """Each is given to ssh with `-o`, and wins over what is given here."""
    connect_s: int = 10
    """Longest time to connect."""


class Answer(msgspec.Struct, frozen=True):
    """What a remote command left."""

    code: int
    out: str
    err: str

    @property
    def last(self) -> str:
        """The last line it said, for a message."""
        lines = [line.strip() for line in (self.err or self.out).splitlines() if line.strip()]
        return lines[-1] if lines else "it said nothing"


class Remote(Closing):
    """An open connection that commands and copies share. Not for use by several threads at once.

    Raises `FleetError` if it cannot be opened: refused, timed out, wrong key, unknown host.
    """

    def __init__(self, target: Target, access: Access) -> None:
        for tool in ("ssh", "rsync"):
            if shutil.which(tool) is None:
                raise FleetError(f"{tool} is not installed here; apt-get install openssh-client rsync")
        self.target = target
        self._folder = Path(tempfile.mkdtemp(prefix="eyas-ssh-"))  # short: a socket's path has 107 bytes at most
        self._ssh = ["ssh", *_flags(target, access), "-o", f"ControlPath={self._folder}/c"]
        try:
            self._connect(access.connect_s)
        except BaseException:
            self.close()
            raise

    def run(self, *words: str, timeout_s: float = 60.0, become: Sequence[str] = (), stdin: str = "") -> Answer:
        """Run one command there, each word quoted; its exit code is the caller's to judge.

        `become` are words in front that change the user, e.g. `sudo -n`. Raises `FleetError` if the connection is lost
        or the command takes longer than `timeout_s`.
        """
        command = [*self._ssh, "-o", "ControlMaster=no", self._bare, shlex.join([*become, *words])]
        done = self._local(command, timeout_s, stdin)
        if done.returncode == _REFUSED:
            raise self._refusal(done.stderr)
        return Answer(done.returncode, done.stdout, done.stderr)

    def sh(self, script: str, *, timeout_s: float = 60.0, become: Sequence[str] = ()) -> str:
        """Run a shell script there and return what it printed. Raises `FleetError` if it fails."""
        answer = self.run("sh", "-euc", script, timeout_s=timeout_s, become=become)
        if answer.code:
            raise FleetError(f"{self.target}: {answer.last} (exit code {answer.code})")
        return answer.out

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
        """Make the remote folder `destination` like the local folder `source`; the number of bytes that travelled.

        Files that the remote folder `copy_dest` holds too are copied or patched there instead of sent. Links are left
        out. `private`: only the owner may read what arrives. Raises `FleetError` if it fails.
        """
        command = ["rsync", "--recursive", "--times", "--perms", "--checksum", "--delete", "--protect-args"]
        command += ["--stats", "--timeout=60", "--chmod=D700,F600" if private else "--chmod=D755,F644"]
        command += [f"--rsh={shlex.join([*self._ssh, '-o', 'ControlMaster=no'])}"]
        command += [f"--rsync-path={shlex.join([*become, 'rsync'])}"]
        command += [f"--copy-dest={copy_dest}"] if copy_dest else []
        done = self._local([*command, f"{source}/", f"{self.target.login}:{destination}/"], timeout_s, "")
        if done.returncode == _REFUSED:
            raise self._refusal(done.stderr)
        if done.returncode:
            answer = Answer(done.returncode, "", done.stderr)
            reason = next((line for line in done.stderr.splitlines() if line.startswith("rsync: ")), answer.last)
            raise FleetError(f"{self.target}: {destination}: the copy failed ({reason.strip()})")
        sent = re.search(r"Total bytes sent: ([\d,.]+)", done.stdout)
        return int(re.sub(r"\D", "", sent[1])) if sent else 0

    def close(self) -> None:
        """End the connection."""
        with suppress(FleetError):
            self._local([*self._ssh, "-O", "exit", self._bare], 10, "")
        shutil.rmtree(self._folder, ignore_errors=True)

    @property
    def _bare(self) -> str:
        return self.target.login.replace("[", "").replace("]", "")  # only rsync wants an address in brackets

    def _connect(self, connect_s: int) -> None:
        """Start the connection that the others use; it ends by itself some minutes after the last of them."""
        said = self._folder / "said"  # a file: the connection in the background would keep a pipe open
        command = [*self._ssh, "-o", "ControlMaster=yes", "-o", "ControlPersist=600", "-N", "-f", self._bare]
        with said.open("wb") as stream:
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
                raise self._refusal("the login timed out") from None
        if done.returncode:
            raise self._refusal(said.read_text(encoding="utf-8", errors="replace"))

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
            raise FleetError(f"{self.target}: no end within {timeout_s:g} s; see that it is not overloaded") from None

    def _refusal(self, said: str) -> FleetError:
        lines = [line.strip() for line in said.splitlines() if line.strip()]
        known = [(line, fix) for line in lines for words, fix in _FIXES.items() if words in line.lower()]
        line, fix = known[-1] if known else (lines[-1] if lines else "ssh said nothing", "try ssh by hand")
        return FleetError(f"{self.target}: cannot be reached ({line}): {fix}")


def _flags(target: Target, access: Access) -> list[str]:
    """The flags of every ssh: ssh keeps the first value of an option, so those of the user stand first."""
    flags = [word for option in access.options for word in ("-o", option)]
    if access.identity is not None:
        flags += ["-i", str(access.identity), "-o", "IdentitiesOnly=yes"]
    port = target.port or access.port
    flags += ["-p", str(port)] if port else []
    ours = ("BatchMode=yes", f"ConnectTimeout={access.connect_s}", "ServerAliveInterval=10", "ServerAliveCountMax=3")
    return flags + [word for option in ours for word in ("-o", option)] + ["-T"]
