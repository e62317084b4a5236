"""What is remembered beside the bundles: attempts to run a slot, why it was refused, and what the agent runs now.

    STATE/slots/a.attempts      attempts to run the bundle that did not end well, counted before the model is loaded
    STATE/slots/a.refused       why the slot, or the last bundle that should have gone there, was refused
    STATE/slots/a.release       the signed release that the slot was installed from; none for an unsigned one
    STATE/slots/a.probation     how a signed release did on real frames; see `eyas_device.updates.probation`
    STATE/slots/.a.lock         held shared by each process that runs the slot, exclusively while it is written
    agent.json                  what the agent runs, and what it refused; valid while STATE/.agent.lock is held. A
                                service keeps it in memory, below its RuntimeDirectory; any other agent in STATE

Counting before loading makes an exception, a crash, a kill for lack of memory and a hang that systemd ends look alike.
Damaged files count as missing, and a disk that takes nothing never keeps a model from running.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Literal, TypeVar

import msgspec

from eyas_device.errors import EyasError
from eyas_device.support.closing import Closing
from eyas_device.support.files import atomic_write

MAX_ATTEMPTS = 3
"""After this many attempts without a healthy time, the other slot is taken."""
_MAX_BYTES = 64 << 10
_MAX_REASON = 500
_AGENT = "agent.json"
RUN = Path("/run")
"""Holds the runtime folders of the units, `eyas` and `eyas-devices/NAME`: in memory, whatever the disk takes."""


class Refusal(msgspec.Struct, frozen=True, kw_only=True):
    """Why a bundle does not run from a slot."""

    name: str = ""
    """Name of the bundle."""
    version: str = ""
    manifest_sha256: str = ""
    reason: str = ""
    time: float = 0.0
    """When it was refused, seconds since 1970."""


class Attempts(msgspec.Struct, frozen=True, kw_only=True):
    """Attempts to run a slot that have not ended well (yet)."""

    key: str = ""
    """Model settings and library versions; with others, counting starts again."""
    count: int = 0
    runtime: str = ""
    """Runtime that is being loaded, or runs and is not healthy yet: what a sudden end is put down to."""
    ended: dict[str, int] = {}
    """Runtime -> sudden ends of the process with it."""
    settled: str = ""
    """Boot in which the last attempt ran for a while; if the next one comes after another boot, the board ended it."""
    boot: str = ""
    """Boot of the last attempt."""
    proven: bool = False
    """Whether it has predicted and been healthy under this key: since then the end of a board is no fault of it."""


class AgentRecord(msgspec.Struct, frozen=True, kw_only=True):
    """What the agent runs."""

    pid: int = 0
    slot: str = ""
    """`a` or `b`; empty for a bundle outside of the slots, or without a model."""
    bundle: str = ""
    """Folder of the bundle; empty without a model."""
    model: str = ""
    """`name version`; empty without a model."""
    manifest_sha256: str = ""
    artefact: str = ""
    runtime: str = ""
    selection: str = ""
    """Why this runtime and artefact run."""
    refused_model: str = ""
    """`name version` of the bundle that should run and was refused; empty if it runs."""
    refused_reason: str = ""
    problem: str = ""
    """Why the last reload changed nothing; empty if it succeeded."""
    loaded: float = 0.0
    """Start of the last load, seconds on the monotonic clock."""


class Tally(msgspec.Struct, kw_only=True):
    """What was counted of a new model on probation."""

    seconds: float = 0.0
    """Time in the frame loop, restarts of the agent left out."""
    frames: int = 0
    """Predictions, those that failed included."""
    errors: int = 0
    """Predictions that failed or were not finite."""
    shadowed: int = 0
    """Frames that the previous model answered, too."""
    slower: int = 0
    """Shadowed frames on which the new model took longer than the allowed multiple of the previous one's time."""
    different: int = 0
    """Shadowed frames on which the two models gave different labels."""
    ood: int = 0
    """Shadowed frames that are out of distribution for the new model and not for the previous one."""
    latency_bins: dict[int, int] = {}
    """Bin of `LogHistogram` -> shadowed frames; preprocessing and inference of the new model."""
    previous_latency_bins: dict[int, int] = {}
    """The same of the previous model, on the same frames."""


class Verdict(msgspec.Struct, frozen=True, kw_only=True):
    """How the model in a slot does, or did, on probation."""

    state: Literal["running", "passed", "failed"] = "running"
    manifest_sha256: str = ""
    """sha256 of the manifest in the slot that it is about; for another bundle it is void."""
    model: str = ""
    """`name version`."""
    identity: str = ""
    """`Release.identity`."""
    reason: str = ""
    """Why it failed, or what it passed on, for people."""
    previous: str = ""
    """`name version` of the model that it was compared with; empty without one."""
    tally: Tally = msgspec.field(default_factory=Tally)
    started: float = 0.0
    """When the probation began, seconds since 1970 by the device's clock."""
    ended: float = 0.0
    """When it ended; 0 while it is running."""


_Record = TypeVar("_Record", Refusal, Attempts, AgentRecord, Verdict)


class Lock(Closing):
    """An advisory lock (flock) on a file, released by `close` or with the process."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor: int | None = descriptor

    @classmethod
    def acquire(cls, path: Path, *, shared: bool = False) -> Lock | None:
        """Lock `path` without waiting; None if others hold it. Raises `OSError` if the file cannot be opened."""
        descriptor = os.open(path, os.O_RDONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
        try:
            fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            return None
        except BaseException:
            os.close(descriptor)
            raise
        return cls(descriptor)

    @staticmethod
    def is_held(path: Path) -> bool:
        """Whether a process holds the lock."""
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        except OSError:
            return False
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        finally:
            os.close(descriptor)
        return False

    def close(self) -> None:
        """Release the lock."""
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            os.close(descriptor)


class AgentFile(Closing):
    """The agent's record, held by one agent for each state folder; without the folder, or a second one, it is mute."""

    def __init__(self, state: Path) -> None:
        self._path = own_folder(state) / _AGENT
        self._lock: Lock | None = None
        if state.is_dir():
            with suppress(OSError):
                self._lock = Lock.acquire(state / ".agent.lock")

    @property
    def held(self) -> bool:
        """Whether this agent is the one of the state folder."""
        return self._lock is not None

    def write(self, record: AgentRecord) -> None:
        """Replace the record."""
        if self._lock is not None:
            write_record(self._path, msgspec.structs.replace(record, pid=os.getpid()))

    def close(self) -> None:
        """Remove the record and release the lock."""
        if self._lock is not None:
            with suppress(OSError):
                self._path.unlink(missing_ok=True)
            self._lock.close()
            self._lock = None


def own_folder(state: Path, environ: Mapping[str, str] = os.environ) -> Path:
    """Where this process keeps the record and the socket of the agent that it is: no full disk silences a service."""
    folder = environ.get("RUNTIME_DIRECTORY", "").partition(":")[0]
    if folder:
        with suppress(OSError):
            (own := Path(folder) / _key(state)).mkdir(mode=0o700, exist_ok=True)
            return own
    return state


def agent_folder(state: Path) -> Path:
    """Where the agent of a state folder keeps its record and its socket, if one runs."""
    key = _key(state)
    folders = (folder for pattern in (f"eyas/{key}", f"eyas-devices/*/{key}") for folder in RUN.glob(pattern))
    return next(folders, state)


def _key(state: Path) -> str:
    return hashlib.sha256(os.fsencode(os.path.realpath(state))).hexdigest()[:16]


def read_agent(state: Path) -> AgentRecord | None:
    """What the agent on this state folder runs; None if none is running."""
    return read_record(agent_folder(state) / _AGENT, AgentRecord) if Lock.is_held(state / ".agent.lock") else None


def read_record(path: Path, kind: type[_Record]) -> _Record | None:
    """Read a record; None if it is missing or damaged."""
    try:
        if not path.is_file():  # a pipe would block
            return None
        with path.open("rb") as stream:
            return msgspec.json.decode(stream.read(_MAX_BYTES), type=kind)
    except (OSError, msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None


def write_record(path: Path, record: Refusal | Attempts | AgentRecord | Verdict) -> bool:
    """Write a record durably; False if the disk does not take it."""
    try:
        atomic_write(path, msgspec.json.encode(record) + b"\n")
    except OSError:
        return False
    return True


def short_reason(error: BaseException) -> str:
    """An error as one line, with its type if it was not raised on purpose."""
    text = " ".join(str(error).split()) or type(error).__name__
    known = isinstance(error, EyasError) or text == type(error).__name__
    return (text if known else f"{type(error).__name__}: {text}")[:_MAX_REASON]
