"""The status of a running agent for programs on the same machine, through a Unix socket beside its record.

Whoever connects to agent.sock gets one `AgentStatus` as JSON, and the connection is closed; nothing that a client sends
is read. Only the agent's user and root can connect. The socket lies in the service's runtime folder, or in the state
folder of any other agent, and belongs to the agent that holds the state folder's lock.
"""

from __future__ import annotations

import errno
import os
import socket
import stat
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import msgspec

from eyas_device.errors import EyasError
from eyas_device.support.closing import Closing
from eyas_device.support.supervised import OnError, SupervisedThread
from eyas_device.telemetry.messages import Update
from eyas_device.updates.records import agent_folder, own_folder, read_agent

SOCKET = "agent.sock"
_BACKLOG = 16
_POLL_S = 0.5
_RETRY_S = 0.05
_CACHE_S = 0.25
_ASK_S = 5.0
_MAX_BYTES = 1 << 20


class ModelReport(msgspec.Struct, frozen=True, kw_only=True):
    """Which model runs, and which was refused."""

    name: str = ""
    """`name version`; empty if no model runs."""
    digest: str = ""
    """First 12 hex digits of the manifest's sha256."""
    slot: str = ""
    """`a` or `b`; empty for a bundle outside of the slots."""
    bundle: str = ""
    """Its folder."""
    artefact: str = ""
    runtime: str = ""
    selection: str = ""
    """Why this runtime and artefact run."""
    refused: str = ""
    """`name version` of the bundle that should run and was refused."""
    refused_reason: str = ""
    problem: str = ""
    """Why the last reload changed nothing."""


class CameraReport(msgspec.Struct, frozen=True, kw_only=True):
    """State of the camera."""

    source: str = ""
    """Its specification, without passwords."""
    state: str = ""
    """As in `Status.camera`; empty for a folder or a video."""
    reason: str = ""
    since_s: float | None = None
    """Age of the state, seconds."""
    last_frame_s: float | None = None
    """Age of the last good frame, seconds; None before the first."""
    losses: int = 0
    """Number of times that it was lost since the start."""


class Figures(msgspec.Struct, frozen=True, kw_only=True):
    """Counts and latencies of the last seconds."""

    seconds: float = 0.0
    """How far back they go."""
    frames: int = 0
    """Predictions."""
    fps: float = 0.0
    """Predictions a second."""
    uncertain: int = 0
    """Predictions below the confidence threshold."""
    unreadable: int = 0
    """Frames that could not be decoded or were black."""
    latency_ms: dict[str, float] = {}
    """p50, p90, p99 and max of decode + preprocess + infer, milliseconds."""
    counts: dict[str, int] = {}
    """Label -> predictions."""

    @property
    def unreadable_share(self) -> float:
        """Fraction of the frames that could not be decoded or were black, 0..1."""
        return self.unreadable / max(self.frames + self.unreadable, 1)


class LinkReport(msgspec.Struct, frozen=True, kw_only=True):
    """State of the link to the broker and of the messages that wait."""

    broker: str = ""
    state: str = ""
    """`connected`, or what is wrong."""
    since_s: float = 0.0
    """Age of the state, seconds."""
    on_disk: int = 0
    """Messages that wait on disk."""
    in_memory: int = 0
    """Messages that wait in memory only: the end of the process loses them."""
    given_up: dict[str, int] = {}
    """What the spool gave up since the start: kind -> messages, as in `Window.lost`."""
    spool: str = ""
    """Where messages wait, and why."""
    certificate_days: float | None = None
    """Days until the device's certificate expires; None without one."""


class LogReport(msgspec.Struct, frozen=True, kw_only=True):
    """A warning or an error of the log, with its repetitions."""

    time: float
    """Last occurrence, seconds since 1970."""
    level: str
    text: str
    count: int


class AgentStatus(msgspec.Struct, frozen=True, kw_only=True):
    """What a running agent does."""

    agent: str = ""
    """Version of the agent."""
    pid: int = 0
    site: str = ""
    device: str = ""
    machine: str = ""
    """12 hex digits that identify the board."""
    uptime_s: float = 0.0
    """Seconds since the start of the agent."""
    healthy: bool = False
    """Whether there is no problem."""
    problems: tuple[str, ...] = ()
    """What people should know, one sentence each."""
    model: ModelReport = ModelReport()
    camera: CameraReport = CameraReport()
    recent: Figures = Figures()
    """The last minute."""
    frames: int = 0
    """Predictions since the start."""
    ood: bool | None = None
    """Whether the camera is out of distribution; None if that is unknown (yet)."""
    ood_quantile: float | None = None
    ood_reason: str = ""
    link: LinkReport | None = None
    """None without telemetry."""
    paused: bool = False
    paused_until: float | None = None
    """When the pause ends, seconds since 1970; None without an end."""
    restarts: dict[str, int] = {}
    """Part of the agent -> errors after which it started again."""
    temperature_c: float | None = None
    throttled: tuple[str, ...] = ()
    update: Update | None = None
    """The last update; None where there was none and none is configured."""
    agent_update: Update | None = None
    """The last update of the agent itself by a signed release; None where there was none."""
    probation: str = ""
    """What was counted on the present probation; empty without one."""
    warnings: tuple[LogReport, ...] = ()
    """The latest different warnings and errors, newest first."""


class StatusServer(Closing):
    """Answers each connection with the agent's status, in a thread of its own: the frame loop never waits for it.

    Its thread does not feed the watchdog: a device that cannot be asked still answers frames.
    """

    def __init__(self, state: Path, describe: Callable[[], AgentStatus], *, on_error: OnError) -> None:
        """Listen for a state folder whose lock the caller holds. Raises `OSError` if that is not possible."""
        self._describe, folder = describe, own_folder(state)
        self._path, self._closing = folder / SOCKET, threading.Event()
        self._answer, self._answered = b"", float("-inf")
        self._listener = _listen(folder)
        self._thread = SupervisedThread("status", self._serve)
        self._thread.on_error = on_error
        self._thread.start()

    def close(self) -> None:
        """Stop answering and remove the socket."""
        if self._closing.is_set():
            return
        self._closing.set()
        self._thread.join(4 * _POLL_S)
        self._listener.close()
        with suppress(OSError):
            self._path.unlink(missing_ok=True)

    def _serve(self) -> None:
        while not self._closing.is_set():
            self._thread.progress()
            try:
                client, _ = self._listener.accept()
            except TimeoutError:
                continue
            with client, suppress(OSError):  # a client that left, or a buffer that is too small
                answer = self._encoded()
                client.setblocking(False)  # a new connection's buffer takes it all: nobody has to read for it
                client.sendall(answer)

    def _encoded(self) -> bytes:
        """The status, the same for clients within a quarter of a second: many of them cost no more than one."""
        now = time.monotonic()
        if now - self._answered >= _CACHE_S:
            self._answer = msgspec.json.encode(self._describe()) + b"\n"
            self._answered = time.monotonic()
        return self._answer


def ask(state: Path, *, timeout_s: float = _ASK_S) -> AgentStatus:
    """Ask the agent on a state folder for its status. Raises `EyasError` if none answers, and says why."""
    try:
        answer = _exchange(agent_folder(state), timeout_s)
    except TimeoutError:
        agent = read_agent(state)
        process = f"process {agent.pid}" if agent is not None and agent.pid else "the agent"
        raise EyasError(f"{state}: {process} does not answer within {timeout_s:g} s; see journalctl") from None
    except PermissionError:
        raise EyasError(f"{state}: permission denied; ask as the agent's user or as root: sudo eyas-device") from None
    except (FileNotFoundError, NotADirectoryError, ConnectionError) as error:
        raise EyasError(f"{state}: {_why_silent(state, error)}") from None
    except OSError as error:
        raise EyasError(f"{state}/{SOCKET}: {error.strerror or error}") from None
    if not answer:
        raise EyasError(f"{state}: the agent runs but failed to describe itself; see journalctl -u eyas-device")
    try:
        return msgspec.json.decode(answer, type=AgentStatus)
    except (msgspec.DecodeError, UnicodeDecodeError):
        raise EyasError(f"{state}/{SOCKET}: what answers there is not an agent of this version") from None


def _why_silent(state: Path, error: OSError) -> str:
    if not state.is_dir():
        return "no such folder; only an agent with a state folder can be asked (device.state, or --state DIR)"
    agent = read_agent(state)
    if agent is None:
        return "no agent runs with this state folder; start it: systemctl start eyas-device"
    return f"process {agent.pid} runs here but cannot be asked ({error.strerror}); see journalctl -u eyas-device"


def _exchange(folder: Path, timeout_s: float) -> bytes:
    """Everything that the agent sends. Raises `OSError`; `TimeoutError` if it has not sent all in time."""
    deadline = time.monotonic() + timeout_s
    received = bytearray()
    with _folder(folder) as (descriptor, address), socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        if not stat.S_ISSOCK(os.stat(SOCKET, dir_fd=descriptor, follow_symlinks=False).st_mode):
            raise OSError(errno.ENOTSOCK, os.strerror(errno.ENOTSOCK))
        connection.settimeout(timeout_s)
        while True:
            try:
                connection.connect(address)
                break
            except BlockingIOError:  # its queue of connections is full
                if time.monotonic() > deadline:
                    raise TimeoutError from None
                time.sleep(_RETRY_S)
        while len(received) < _MAX_BYTES:
            left = deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError
            connection.settimeout(left)
            data = connection.recv(1 << 16)
            if not data:
                break
            received += data
    return bytes(received)


def _listen(folder: Path) -> socket.socket:
    """A listening socket for the owner alone; a stale one, of an agent that was killed, is replaced."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        with _folder(folder) as (descriptor, address):
            with suppress(FileNotFoundError):
                os.unlink(SOCKET, dir_fd=descriptor)
            listener.bind(address)
            os.chmod(SOCKET, 0o600, dir_fd=descriptor)
        listener.listen(_BACKLOG)  # only now can anybody connect
        listener.settimeout(_POLL_S)
    except BaseException:
        listener.close()
        raise
    return listener


@contextmanager
def _folder(folder: Path) -> Iterator[tuple[int, str]]:
    """A descriptor of the folder, and an address of the socket that is short however long the folder's path is."""
    descriptor = os.open(folder, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield descriptor, f"/proc/self/fd/{descriptor}/{SOCKET}"
    finally:
        os.close(descriptor)
