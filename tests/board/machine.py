"""A whole emulated board: an aarch64 Cortex-A72 with Debian, systemd, ssh and a camera, on the loopback interface.

`python -m tests.board` starts one in the foreground; tests use the class `Board`. The disk of a board is a layer over
the image of `image.sh`, which stays as it was built.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from tests.support.brokers import free_port
from tests.support.system_parts import find, require

HERE = Path(__file__).parent
EMULATOR = "qemu-system-aarch64"
HOST_ADDRESS = "10.0.2.2"
"""This machine's loopback interface, as a board sees it."""
BOOT_S = 300
"""How long a start may take where other programs use the processor; alone it takes about 20 s."""
_BUILD_S = 1800
_PROGRAMS = (EMULATOR, "qemu-img", "mmdebstrap", "cpio", "depmod", "mke2fs", "setpriv", "ssh", "ssh-keygen")


class Image(NamedTuple):
    """What `image.sh` builds once."""

    folder: Path

    @property
    def disk(self) -> Path:
        return self.folder / "disk.img"

    @property
    def key(self) -> Path:
        """The private key that root's ssh accepts."""
        return self.folder / "id_ed25519"

    @property
    def known_hosts(self) -> Path:
        return self.folder / "known_hosts"

    @classmethod
    def build(cls) -> Image:
        """The image, built if it is not in the cache yet (minutes)."""
        require(*_PROGRAMS)
        built = subprocess.run([HERE / "image.sh"], stdout=subprocess.PIPE, text=True, timeout=_BUILD_S, check=False)
        if built.returncode:
            raise RuntimeError("the image of the board was not built; the reason stands above")
        return cls(Path(built.stdout.strip()))


class Board:
    """A board whose disk and logs lie in `folder`.

    Args:
        folder: Where its files go; it is made if it is not there. A disk that is there already is used again.
        image: What it starts from.
        port: Loopback port of its ssh; a free one by default.
        memory_mb: Its memory.

    """

    def __init__(self, folder: Path, image: Image, *, port: int | None = None, memory_mb: int = 2048) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.image, self.port, self.memory_mb = folder, image, port or free_port(), memory_mb
        self.disk, self.console = folder / "disk.qcow2", folder / "console.log"
        self._control = Path(tempfile.mkdtemp(prefix="eyas-board-"))  # a socket's path may have 107 bytes
        self._process: subprocess.Popen[bytes] | None = None
        if not self.disk.exists():
            overlay(self.disk, image.disk, "raw")

    @property
    def address(self) -> str:
        """How `eyas flash` names it."""
        return f"root@127.0.0.1:{self.port}"

    @property
    def ssh_options(self) -> tuple[str, ...]:
        """`KEY=VALUE` for ssh's `-o` and for `eyas flash --ssh-option`."""
        known = f"UserKnownHostsFile={self.image.known_hosts}"
        return (f"IdentityFile={self.image.key}", "IdentitiesOnly=yes", known, "StrictHostKeyChecking=yes")

    @property
    def running(self) -> bool:
        """Whether the emulator runs."""
        return self._process is not None and self._process.poll() is None

    def start(
        self, *, network: bool = True, clock: str | None = None, kernel: str = "", devices: Sequence[str] = ()
    ) -> Board:
        """Switch it on, and return at once.

        Args:
            network: Whether the board reaches this machine beside being reached by ssh.
            clock: Its clock at power on, e.g. `1970-01-01T00:00:00`; that of this machine by default.
            kernel: More words for the kernel's command line.
            devices: More words for the emulator, e.g. of a second disk.

        """
        assert not self.running, "the board runs already"
        forward = f"hostfwd=tcp:127.0.0.1:{self.port}-:22"
        command = [*require(EMULATOR), "-machine", "virt", "-cpu", "cortex-a72", "-accel", "tcg,thread=multi"]
        command += ["-smp", "2", "-m", str(self.memory_mb), "-display", "none", "-no-reboot"]
        command += ["-monitor", f"unix:{self._control}/monitor,server=on,wait=off"]
        command += ["-chardev", f"file,id=console,path={self.console},append=on", "-serial", "chardev:console"]
        command += ["-kernel", str(self.image.folder / "vmlinuz"), "-initrd", str(self.image.folder / "initrd")]
        command += ["-append", f"root=/dev/vda ro console=ttyAMA0 quiet {kernel}".strip()]
        command += [
            "-drive",
            f"file={self.disk},format=qcow2,if=none,id=disk",
            "-device",
            "virtio-blk-device,drive=disk",
        ]
        command += ["-netdev", f"user,id=net,restrict={'off' if network else 'on'},{forward}"]
        command += ["-device", "virtio-net-device,netdev=net", "-device", "virtio-rng-device"]
        command += ["-rtc", f"base={clock}"] if clock else []
        with (self.folder / "emulator.log").open("ab") as log:
            # a session of its own: Ctrl-C reaches this program, which ends the board in order
            # --pdeathsig: no board goes on without the thread that started it, however that ends
            self._process = subprocess.Popen(
                [*require("setpriv"), "--pdeathsig", "KILL", *command, *devices],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        return self

    def wait_ssh(self, timeout: float = BOOT_S) -> Board:
        """Wait until root can log in."""
        deadline = time.monotonic() + timeout
        while not self._answers() or self.run("true", check=False, timeout=60).returncode:
            assert self.running, f"the emulator ended: {(self.folder / 'emulator.log').read_text()[-2000:]}"
            assert time.monotonic() < deadline, f"no ssh within {timeout:g} s: {self.tail()}"
            time.sleep(0.5)
        return self

    def wait_running(self, timeout: float = BOOT_S) -> str:
        """Wait until systemd has started everything, and return what it says: `running`, or `degraded`."""
        return self.run("systemctl is-system-running --wait", check=False, timeout=timeout).stdout.strip()

    def run(
        self, command: str, *, check: bool = True, timeout: float = 120, stdin: str | bytes | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run a shell command as root; with `check`, one that fails is an error that shows its output."""
        data = stdin.encode() if isinstance(stdin, str) else stdin
        words = [*self._ssh("ControlMaster=auto", "ControlPersist=60"), "root@127.0.0.1", command]
        where = {"stdin": subprocess.DEVNULL} if data is None else {"input": data}
        raw = subprocess.run(words, capture_output=True, timeout=timeout, check=False, **where)  # type: ignore[call-overload]
        out, err = (stream.decode(errors="replace") for stream in (raw.stdout, raw.stderr))
        assert not check or raw.returncode == 0, f"{command}: exit {raw.returncode}\n{out}{err}"
        return subprocess.CompletedProcess(command, raw.returncode, out, err)

    def put(self, source: Path, destination: str) -> None:
        """Copy a file or a folder's content there."""
        if source.is_dir():
            packed = subprocess.run(["tar", "-C", source, "-c", "."], capture_output=True, check=True).stdout
            self.run(f"mkdir -p '{destination}' && tar -C '{destination}' --no-same-owner -x", stdin=packed)
        else:
            self.run(f"mkdir -p \"$(dirname '{destination}')\" && cat >'{destination}'", stdin=source.read_bytes())

    def network(self, on: bool) -> None:
        """Plug its network cable in, or pull it out: ssh is cut with it."""
        self.monitor(f"set_link net {'on' if on else 'off'}")

    def monitor(self, line: str) -> str:
        """Give the emulator's monitor a command."""
        with socket.socket(socket.AF_UNIX) as channel:
            channel.settimeout(10)
            channel.connect(f"{self._control}/monitor")
            answer = b""
            for text in (b"", line.encode() + b"\n"):
                channel.sendall(text)
                answer = b""
                while not answer.endswith(b"(qemu) "):
                    answer += channel.recv(65536)
        return answer.decode(errors="replace")

    def power_cut(self) -> None:
        """Kill the emulator: what the board's kernel had not written to the disk is lost."""
        assert self._process is not None
        self._process.send_signal(signal.SIGKILL)
        self._process.wait(30)
        self._forget_connection()

    def stop(self, timeout: float = 120) -> None:
        """Switch it off in order, and by force after `timeout` seconds."""
        if not self.running:
            return
        assert self._process is not None
        try:
            self.run("systemctl poweroff", check=False, timeout=30)
            self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            self.power_cut()
        self._forget_connection()

    def close(self) -> None:
        """End it, however; its disk and logs stay."""
        if self.running:
            self.power_cut()
        shutil.rmtree(self._control, ignore_errors=True)

    def copy(self, folder: Path) -> Board:
        """Another board that begins with this one's disk, which must be off and stay as it is from now on."""
        assert not self.running, "stop the board before it is copied"
        folder.mkdir(parents=True, exist_ok=True)
        overlay(folder / "disk.qcow2", self.disk, "qcow2")
        return Board(folder, self.image, memory_mb=self.memory_mb)

    def tail(self, lines: int = 20) -> str:
        """The last lines of its serial console."""
        text = self.console.read_text(errors="replace") if self.console.exists() else ""
        return "\n".join(text.splitlines()[-lines:])

    def _answers(self) -> bool:
        """Whether its ssh server sends its greeting: the emulator itself accepts connections before that."""
        try:
            with socket.create_connection(("127.0.0.1", self.port), timeout=5) as probe:
                probe.settimeout(5)
                return probe.recv(4) == b"SSH-"
        except OSError:
            return False

    def _ssh(self, *options: str) -> list[str]:
        control = f"ControlPath={self._control}/ssh"
        words = [word for option in (*self.ssh_options, *options, control) for word in ("-o", option)]
        words += ["-o", "ConnectTimeout=20", "-o", "LogLevel=ERROR", "-o", "BatchMode=yes"]
        return ["ssh", "-F", "none", "-p", str(self.port), *words]

    def _forget_connection(self) -> None:
        subprocess.run([*self._ssh(), "-O", "exit", "root@127.0.0.1"], capture_output=True, timeout=30, check=False)
        (self._control / "ssh").unlink(missing_ok=True)


def unavailable_programs() -> list[str]:
    """What is not installed of what a board needs."""
    return [program for program in _PROGRAMS if find(program) is None]


def overlay(disk: Path, base: Path, kind: str) -> None:
    """Make a disk that holds what differs from `base`."""
    words = ["create", "-q", "-f", "qcow2", "-b", str(base.resolve()), "-F", kind, str(disk)]
    subprocess.run([*require("qemu-img"), *words], check=True, timeout=60)


def base_of(disk: Path) -> Path:
    """The image below a disk."""
    info = subprocess.run(
        [*require("qemu-img"), "info", "--force-share", "--output=json", disk], capture_output=True, check=True
    )
    return Path(json.loads(info.stdout)["full-backing-filename"])


def cache() -> Path:
    """Where images and the disk of `make board` are kept."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "eyas/board"
