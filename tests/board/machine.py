"""A whole emulated board: an aarch64 Cortex-A72 with Debian, systemd, ssh and a camera, on the loopback interface.

`python -m tests.board` starts one in the foreground; tests use the class `Board`. The disk of a board is a layer over
the image of `image.sh`, which stays as it was built.
"""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cached_property
from pathlib import Path
from typing import NamedTuple, Protocol

from tests.support.brokers import free_port
from tests.support.system_parts import find, require

HERE = Path(__file__).parent
EMULATOR = "qemu-system-aarch64"
HOST_ADDRESS = "10.0.2.2"
"""This machine's loopback interface, as a board sees it."""
BOOT_S = 300
"""How long a start may take where other programs use the processor; alone it takes about 20 s."""
_GREETING_S = 5.0
"""How long the first try to log in waits for the ssh server; each further one waits a fifth longer."""
_BUILD_S = 1800
_KERNEL = "root=/dev/vda ro console=ttyAMA0 quiet nokaslr mitigations=off init_on_alloc=0 audit=0"
"""What the kernel does at each system call and page against attacks from inside costs an emulated processor most."""
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

    @classmethod
    def of_the_recipe(cls) -> Image:
        """Where the image of the recipe as it is now lies, built or not: named as `image.sh` names it."""
        files = sorted(str(file.relative_to(HERE)) for file in (HERE / "rootfs").rglob("*") if file.is_file())
        files += ["image.sh", "initrd.sh"]
        lines = (f"{hashlib.sha256((HERE / name).read_bytes()).hexdigest()}  {name}\n" for name in files)
        return cls(cache() / hashlib.sha256("".join(lines).encode()).hexdigest()[:16])


class Computer(Protocol):
    """What tests ask of a board, emulated or native."""

    host: str
    """This machine, as the board sees it."""
    camera: str
    small_camera: str
    """With small images, and few."""
    port: int
    """Loopback port of its ssh."""

    @property
    def ssh_options(self) -> tuple[str, ...]: ...

    def run(
        self, command: str, *, check: bool = True, timeout: float = 120, stdin: str | bytes | None = None
    ) -> subprocess.CompletedProcess[str]: ...

    def put(self, source: Path, destination: str) -> None: ...

    def connect(self, path: str) -> socket.socket: ...


class Board:
    """A board whose disk and logs lie in `folder`.

    Args:
        folder: Where its files go; it is made if it is not there. A disk that is there already is used again.
        image: What it starts from.
        port: Loopback port of its ssh; a free one by default.
        memory_mb: Its memory.
        processor: A Raspberry Pi 4's by default; that of a 5, `cortex-a76`, is faster to emulate.
        cores: Of its processor.

    """

    host, camera = HOST_ADDRESS, "v4l2:0"
    small_camera = "v4l2:0?size=320x180&fps=12.5"
    """At its own size and rate, the camera's driver and the agent would keep an emulated processor busy, and a board of
    another test waits."""

    def __init__(
        self,
        folder: Path,
        image: Image,
        *,
        port: int | None = None,
        memory_mb: int = 2048,
        processor: str = "cortex-a72",
        cores: int = 2,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.processor, self.cores = processor, cores
        self.folder, self.image, self.port, self.memory_mb = folder, image, port or free_port(), memory_mb
        self.disk, self.console = folder / "disk.qcow2", folder / "console.log"
        self._memory = folder / "memory"  # where the next start goes on from, if it is there
        self._slept = False  # whether its clock is late
        self._process: subprocess.Popen[bytes] | None = None
        if not self.disk.exists():
            overlay(self.disk, image.disk, "raw")

    @cached_property
    def _control(self) -> Path:
        """Folder of its sockets, whose paths may have 107 bytes."""
        return Path(tempfile.mkdtemp(prefix="eyas-board-"))

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

    def waited_s(self) -> float:
        """Seconds that its disk's thread and its busiest core have waited for a processor since the emulator began."""
        assert self._process is not None
        times = {
            int(task.name): [int(word) for word in (task / "schedstat").read_text().split()[:2]]
            for task in Path(f"/proc/{self._process.pid}/task").iterdir()
        }
        disk = times.pop(self._process.pid)
        core = max(times.values())  # that ran longest
        return (disk[1] + core[1]) / 1e9

    def start(
        self, *, network: bool = True, clock: str | None = None, kernel: str = "", devices: Sequence[str] = ()
    ) -> Board:
        """Switch it on, or wake it where it was suspended, and return at once.

        Args:
            network: Whether the board reaches this machine beside being reached by ssh.
            clock: Its clock at power on, e.g. `1970-01-01T00:00:00`; that of this machine by default.
            kernel: More words for the kernel's command line.
            devices: More words for the emulator, e.g. of a second disk.

        """
        assert not self.running, "the board runs already"
        forward = f"hostfwd=tcp:127.0.0.1:{self.port}-:22"
        command = [*require(EMULATOR), "-machine", "virt", "-cpu", self.processor, "-accel", "tcg,thread=multi"]
        command += ["-smp", str(self.cores), "-m", str(self.memory_mb), "-display", "none", "-no-reboot"]
        command += ["-monitor", f"unix:{self._control}/monitor,server=on,wait=off"]
        command += ["-chardev", f"file,id=console,path={self.console},append=on", "-serial", "chardev:console"]
        command += ["-kernel", str(self.image.folder / "vmlinuz"), "-initrd", str(self.image.folder / "initrd")]
        command += ["-append", f"{_KERNEL} {kernel}".strip()]
        # cache=unsafe: a flush ends in this machine's memory, which a kill of the emulator does not lose
        drive = f"file={self.disk},format=qcow2,if=none,id=disk,cache=unsafe"
        command += ["-drive", drive, "-device", "virtio-blk-device,drive=disk"]
        command += ["-netdev", f"user,id=net,restrict={'off' if network else 'on'},{forward}"]
        command += ["-device", "virtio-net-device,netdev=net", "-device", "virtio-rng-device"]
        command += ["-rtc", f"base={clock}"] if clock else []
        if self._memory.exists():
            command += ["-incoming", f"exec:cat {shlex.quote(str(self._awake()))}"]
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
        """Wait until root can log in; where it was suspended, its clock is set to this machine's then."""
        deadline = time.monotonic() + timeout
        if self._slept:
            self._go_on(deadline)
        patience = _GREETING_S
        while (
            not self._answers(patience := min(1.2 * patience, 60))
            or self.run(self._greeting(), check=False, timeout=60).returncode
        ):
            assert self.running, f"the emulator ended: {(self.folder / 'emulator.log').read_text()[-2000:]}"
            assert time.monotonic() < deadline, f"no ssh within {timeout:g} s: {self.tail()}"
            time.sleep(0.2)
        self._slept = False
        return self

    def wait_running(self, timeout: float = BOOT_S) -> str:
        """Wait until systemd has started everything, and return what it says: `running`, or `degraded`."""
        return self.run("systemctl is-system-running --wait", check=False, timeout=timeout).stdout.strip()

    def run(
        self, command: str, *, check: bool = True, timeout: float = 120, stdin: str | bytes | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run a shell command as root; with `check`, one that fails is an error that shows its output.

        Its shell outlives it: one that a signal ended has the exit code 128 + n, and 255 is a connection that was lost.
        """
        data = stdin.encode() if isinstance(stdin, str) else stdin
        script = f"{command}\nexit $?"
        words = [*self._ssh("ControlMaster=auto", "ControlPersist=60"), "root@127.0.0.1", script]
        where = {"stdin": subprocess.DEVNULL} if data is None else {"input": data}
        raw = subprocess.run(words, capture_output=True, timeout=timeout, check=False, **where)  # type: ignore[call-overload]
        out, err = (stream.decode(errors="replace") for stream in (raw.stdout, raw.stderr))
        assert not check or raw.returncode == 0, f"{command}: exit {raw.returncode}\n{out}{err}"
        return subprocess.CompletedProcess(command, raw.returncode, out, err)

    def run_apart(self, command: str, timeout: float) -> str:
        """Run a long command that goes on where a connection is lost, and return what it printed; one that fails is an
        error that shows its output.
        """
        place = self.run("mktemp -d /run/apart-XXXXXX").stdout.strip()
        script = f"({command}\n) >{place}/out 2>{place}/err\necho $? >{place}/part; mv {place}/part {place}/code"
        self.run(f"setsid sh -c {shlex.quote(script)} </dev/null >/dev/null 2>&1 &")
        deadline, lost = time.monotonic() + timeout, 0
        while self.run(f"until [ -e {place}/code ]; do sleep 1; done", check=False, timeout=timeout).returncode:
            lost += 1
            assert self.running, f"the emulator ended: {self.tail()}"
            assert time.monotonic() < deadline, f"{command}: not ended after {timeout:g} s"
            time.sleep(1)
        out, err = (self.run(f"cat {place}/{name}").stdout for name in ("out", "err"))
        code = self.run(f"cat {place}/code; rm -r {place}").stdout.strip()
        assert code == "0", f"{command}: exit {code}, {lost} connections were lost\n{out}{err}"
        return out

    def connect(self, path: str) -> socket.socket:
        """A connection to a Unix socket there; `OSError` if that is not possible. Cheaper than a program over there."""
        local = self._control / f"to-{hashlib.sha256(path.encode()).hexdigest()[:8]}"
        connection = socket.socket(socket.AF_UNIX)
        connection.settimeout(20)
        try:
            with suppress(OSError):  # not forwarded yet, or the connection that did it has ended
                connection.connect(str(local))
                return connection
            local.unlink(missing_ok=True)
            self.run("true", check=False)
            forward = [*self._ssh(), "-O", "forward", "-L", f"{local}:{path}", "root@127.0.0.1"]
            subprocess.run(forward, capture_output=True, timeout=60, check=False)
            connection.connect(str(local))
        except BaseException:
            connection.close()
            raise
        return connection

    def put(self, source: Path, destination: str) -> None:
        """Copy a file or a folder's content there."""
        if source.is_dir():
            packed = subprocess.run(["tar", "-C", source, "-c", "."], capture_output=True, check=True).stdout
            self.run(f"mkdir -p '{destination}' && tar -C '{destination}' --no-same-owner -x", stdin=packed)
        else:
            self.run(f"mkdir -p \"$(dirname '{destination}')\" && cat >'{destination}'", stdin=source.read_bytes())

    def move_image(self) -> None:
        """Let the image of its camera move until its next start: the agent calls one that stands still frozen."""
        self.run("until [ -e /dev/video0 ]; do sleep 0.2; done; v4l2-ctl --set-ctrl horizontal_movement=6")

    def network(self, on: bool) -> None:
        """Plug its network cable in, or pull it out: ssh is cut with it."""
        self.monitor(f"set_link net {'on' if on else 'off'}")

    def monitor(self, line: str, timeout: float = 10) -> str:
        """Give the emulator's monitor a command, and wait until it is done."""
        with socket.socket(socket.AF_UNIX) as channel:
            channel.settimeout(timeout)
            channel.connect(f"{self._control}/monitor")
            answer = b""
            for text in (b"", line.encode() + b"\n"):
                channel.sendall(text)
                answer = b""
                while not answer.endswith(b"(qemu) "):
                    answer += channel.recv(65536)
        return answer.decode(errors="replace")

    def suspend(self) -> None:
        """Keep its memory in a file and end the emulator: the next start goes on from there, also that of each copy.

        Its programs do not notice, but their connections are broken, and their clock is late.
        """
        assert self._process is not None
        self._forget_connection()
        self.monitor("stop")  # what a running board writes meanwhile, the emulator may miss: its kernel would not live
        self.monitor("migrate_set_parameter max-bandwidth 16G")
        self.monitor(f'migrate "exec:cat >{shlex.quote(str(self._memory))}"', timeout=120)
        state = self.monitor("info migrate")
        assert "Migration status: completed" in state, state
        self._process.send_signal(signal.SIGTERM)  # it closes the disk in order
        self._process.wait(30)

    def power_cut(self) -> None:
        """Kill the emulator: what the board's kernel had not written to the disk is lost."""
        assert self._process is not None
        self._process.send_signal(signal.SIGKILL)
        self._process.wait(30)
        self._forget_connection()

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """Stop the emulator for a moment: its disk's file is as a kill would leave it; the board's clock goes on."""
        assert self._process is not None
        tasks = Path(f"/proc/{self._process.pid}/task")
        self._process.send_signal(signal.SIGSTOP)
        try:
            while any(_state(task) not in "Tt" for task in tasks.iterdir()):
                time.sleep(0.001)  # a thread that writes stops when it has written
            yield
        finally:
            self._process.send_signal(signal.SIGCONT)

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

    def __enter__(self) -> Board:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def copy(self, folder: Path) -> Board:
        """Another board that begins with this one's disk, which must be off and stay as it is from now on.

        If this one was suspended, the copy wakes where it was.
        """
        assert not self.running, "stop the board before it is copied"
        folder.mkdir(parents=True, exist_ok=True)
        overlay(folder / "disk.qcow2", self.disk, "qcow2")
        if self._memory.exists():
            (folder / "memory").symlink_to(self._memory.resolve())
        return Board(folder, self.image, memory_mb=self.memory_mb, processor=self.processor, cores=self.cores)

    def tail(self, lines: int = 20) -> str:
        """The last lines of its serial console."""
        text = self.console.read_text(errors="replace") if self.console.exists() else ""
        return "\n".join(text.splitlines()[-lines:])

    def _awake(self) -> Path:
        """The file with its memory, from which it goes on once: the disk changes from then on."""
        self._slept = True
        if self._memory.is_symlink():
            kept = self._memory.resolve()
            self._memory.unlink()
            return kept
        return self._memory.rename(self.folder / "memory.used")

    def _go_on(self, deadline: float) -> None:
        """Let a board that was suspended run, once its memory is there."""
        state = ""
        while "running" not in state:
            assert self.running, f"the emulator ended: {(self.folder / 'emulator.log').read_text()[-2000:]}"
            assert time.monotonic() < deadline, f"it does not wake: {state}"
            with suppress(OSError):  # the emulator has no monitor yet, or is busy with the memory
                state = self.monitor("info status")
                if "inmigrate" not in state:
                    self.monitor("cont")
            time.sleep(0.1)

    def _greeting(self) -> str:
        """The command with which a login is tried."""
        return f"date --set=@{time.time():.3f}" if self._slept else "true"

    def _answers(self, patience_s: float) -> bool:
        """Whether its ssh server sends its greeting: the emulator itself accepts connections before that."""
        try:
            with socket.create_connection(("127.0.0.1", self.port), timeout=5) as probe:
                probe.settimeout(patience_s)
                return probe.recv(4) == b"SSH-"
        except OSError:
            return False

    def _ssh(self, *options: str) -> list[str]:
        control = f"ControlPath={self._control}/ssh"
        words = [word for option in (*self.ssh_options, *options, control) for word in ("-o", option)]
        words += ["-o", "KexAlgorithms=curve25519-sha256"]  # the newer default costs an emulated processor a second
        words += ["-o", "ConnectTimeout=20", "-o", "LogLevel=ERROR", "-o", "BatchMode=yes"]
        return ["ssh", "-F", "none", "-p", str(self.port), *words]

    def _forget_connection(self) -> None:
        subprocess.run([*self._ssh(), "-O", "exit", "root@127.0.0.1"], capture_output=True, timeout=30, check=False)
        for name in ("ssh", *(path.name for path in self._control.glob("to-*"))):
            (self._control / name).unlink(missing_ok=True)


def _state(task: Path) -> str:
    """State of a thread, as /proc has it."""
    return (task / "stat").read_text().rpartition(") ")[2][0]


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
