"""Cameras whose library may hang or crash, read in a child process that can be killed.

Requests and replies are messages on a socket pair; images are passed in shared memory. The parent requests one frame at
a time and copies it before the next request, so that one buffer is enough and returned frames stay valid. Between
requests the child keeps reading and dropping frames, so that a reply is always recent.

The child ends with its parent, however that ends: the kernel kills it when the pipe on its standard input loses its
writer. (`PR_SET_PDEATHSIG` would kill it when the *thread* ends that opened the camera.)

Replies are validated like network input, because a malicious stream may have taken over the decoder: sizes, types and
the time of the capture. What the process may do is in `confine.py`.
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib
import logging
import mmap
import os
import select
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol, TypeVar, cast

import msgspec
import numpy as np
import numpy.typing as npt

from eyas_device.camera import Frame
from eyas_device.camera.confine import confine, filter_environment, raise_oom_score
from eyas_device.errors import CameraError, CameraRefused, CameraSpecError, EyasError, ImageError
from eyas_device.preprocess import as_bgr
from eyas_device.support.closing import Closing
from eyas_device.support.image_header import oversize
from eyas_device.support.opencv import QUIET
from eyas_device.support.processes import module_command
from eyas_device.support.redact import redact

logger = logging.getLogger(__name__)

BUFFER_BYTES = 64 << 20
"""Size of the shared buffer; only written pages take memory."""
START_S = 90.0
"""Time limit for the child to start and import its library: a busy board takes long, and a hang there is unlikely."""
_OPEN_MARGIN_S = 2.0
"""Time for the child, after its own timeout, to report why a source did not open."""
_GRACE_S = 0.5
_MAX_MESSAGE_BYTES = 1 << 16
_MAX_REASON_CHARS = 500
_MAX_NOTE_CHARS = 200
_MAX_PROBLEMS = 20
_ENVIRONMENT = {
    **QUIET,
    "LIBCAMERA_LOG_LEVELS": "*:ERROR",
    "OPENBLAS_NUM_THREADS": "1",  # each of its threads takes memory
}


class Reader(Protocol):
    """Interface of a camera library in the child. Constructed from its settings; raises `CameraError` if that fails."""

    def grab(self) -> bool:
        """Wait for the next frame and keep it undecoded if possible; False at the end of the stream."""

    def retrieve(self, buffer: npt.NDArray[np.uint8]) -> npt.NDArray[Any] | bytes:
        """Return the grabbed frame: BGR pixels, possibly at the start of `buffer` (uint8 [bytes]), or an encoded image.

        Raises `ImageError` if this frame is unusable.
        """

    def close(self) -> None:
        """Release the device."""


class _OpenRequest(msgspec.Struct, frozen=True):
    """First message to the child."""

    reader: str
    settings: dict[str, Any]


class _Ready(msgspec.Struct, frozen=True, tag=True):
    """The child is running; from now on the source's own timeout applies."""

    as_root: str = ""
    """Why it keeps the rights of root; empty if it has none."""


class _Opened(msgspec.Struct, frozen=True, tag=True):
    """The source is open; `note` says how it differs from the request, `problems` which controls were refused."""

    note: str = ""
    problems: list[str] = []


class _Failed(msgspec.Struct, frozen=True, tag=True):
    """The source cannot be opened or stopped delivering; the child ends."""

    reason: str
    permanent: bool = False
    refused: bool = False
    """Whether the camera refused the login."""


class _Unusable(msgspec.Struct, frozen=True, tag=True):
    """The frame cannot be decoded; the next request returns the next one."""

    reason: str


class _Encoded(msgspec.Struct, frozen=True, tag=True):
    """The shared memory starts with an encoded image of `length` bytes."""

    length: int
    captured: float


class _Raw(msgspec.Struct, frozen=True, tag=True):
    """The shared memory starts with `height` x `width` BGR pixels."""

    width: int
    height: int
    captured: float


_Reply = _Ready | _Opened | _Failed | _Unusable | _Encoded | _Raw
_Kind = TypeVar("_Kind", _Ready, _Opened)
_REPLY_DECODER = msgspec.json.Decoder(_Reply)


class SubprocessCamera(Closing):
    """A live camera that returns or raises in time, whatever its library does; the parent's side."""

    live = True
    on_demand = True
    """The child drops the frames that nobody captures."""

    def __init__(
        self,
        reader: str,
        settings: msgspec.Struct,
        *,
        shown: str,
        timeout_s: float,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        """Start `reader` (`module:class`) with `settings` in a child process.

        `shown` names the camera in messages, without credentials; `environment` is added to the child's. Waits at most
        `START_S` for the process, then `timeout_s` and a margin for the source. Raises `CameraError`, or
        `CameraSpecError` if the reader reports an error that retrying cannot fix.
        """
        _LINGERING.check(shown)
        self._shown = shown
        self.timeout_s = timeout_s
        """Time limit of a capture, seconds."""
        self._number = 0
        self._closed = threading.Event()
        self._lock = threading.Lock()
        try:
            self._child = _Child({**_ENVIRONMENT, **filter_environment(os.environ), **(environment or {})})
        except OSError as error:
            raise CameraError(f"camera {shown}: its process cannot be started ({error.strerror})") from None
        begun = time.monotonic()
        self.started_s = 0.0
        """Time that the process took to start and import its library, seconds."""
        try:
            self._child.send(msgspec.json.encode(_OpenRequest(reader, msgspec.to_builtins(settings))))
            ready = self._expect(_Ready, START_S, "its process did not start")
            if ready.as_root:
                logger.warning("camera %s: its process keeps the rights of root: %s", shown, ready.as_root)
            self.started_s = time.monotonic() - begun
            opened = self._expect(_Opened, timeout_s + _OPEN_MARGIN_S, "it did not open")
        except BaseException as error:
            self._end(grace_s=0)
            if isinstance(error, CameraError):
                error.started_s = self.started_s or time.monotonic() - begun
            raise
        note = redact(opened.note)[:_MAX_NOTE_CHARS]
        self._source = f"{shown} ({note})" if note else shown
        self.problems = tuple(redact(problem)[:_MAX_REASON_CHARS] for problem in opened.problems[:_MAX_PROBLEMS])
        """Controls that could not be set."""

    @property
    def pid(self) -> int:
        """The child's process id."""
        return self._child.pid

    def capture(self) -> Frame | None:
        """Return the next frame; None after `close`, at once even if that happens while this waits.

        Raises `ImageError` for a frame that cannot be decoded. Raises `CameraError` if none arrived in time, the source
        failed or the child died; the child is then gone, and the camera must be reopened.
        """
        with self._lock:
            if self._closed.is_set():
                return None
            source = f"{self._source}#{self._number}"
            self._number += 1
            try:
                requested = time.monotonic()
                self._child.send(b"n")
                return self._frame(self._receive(self.timeout_s, "no frame came"), source, requested)
            except CameraError:
                if self._closed.is_set():
                    return None  # and `close` ends the child
                self._end(grace_s=0)
                raise

    def close(self) -> None:
        """End the child: gracefully if it responds, within half a second in any case."""
        self._closed.set()
        self._child.disconnect()
        with self._lock:
            self._end(grace_s=_GRACE_S)

    def _end(self, *, grace_s: float) -> None:
        if not self._child.end(grace_s=grace_s):
            _LINGERING.add(self._shown, self._child)

    def _frame(self, reply: _Reply, source: str, requested: float) -> Frame:
        """Copy the image that `reply` describes out of the shared memory."""
        if isinstance(reply, _Unusable):
            raise ImageError(f"{source}: {reply.reason[:_MAX_REASON_CHARS]}")
        if isinstance(reply, _Encoded) and 0 < reply.length <= BUFFER_BYTES:
            moment, image = self._time(reply, requested), self._child.memory[: reply.length]
            return Frame(image=image, time=moment, source=source, captured=reply.captured)
        if isinstance(reply, _Raw) and reply.width > 0 < reply.height and not oversize(reply.width, reply.height):
            count = reply.width * reply.height * 3
            if count <= BUFFER_BYTES:
                moment = self._time(reply, requested)
                flat = np.frombuffer(self._child.memory, dtype=np.uint8, count=count)
                pixels = flat.reshape(reply.height, reply.width, 3).copy()
                return Frame(image=pixels, time=moment, source=source, captured=reply.captured)
        raise CameraError(f"camera {self._shown}: invalid reply from its process, which was ended")

    def _time(self, reply: _Encoded | _Raw, requested: float) -> float:
        """Wall-clock time of the capture. Raises `CameraError` for one in the future or long before its request.

        The child grabs a frame before it looks for a request, so a request may be a little younger than its frame.
        """
        now = time.monotonic()
        if not requested - self.timeout_s <= reply.captured <= now:
            raise CameraError(
                f"camera {self._shown}: its process says that it captured a frame {reply.captured - now:+.3g} s from "
                f"now, requested {now - requested:.3g} s ago; the process was ended"
            )
        return time.time() - (now - reply.captured)

    def _expect(self, kind: type[_Kind], timeout_s: float, timeout_reason: str) -> _Kind:
        reply = self._receive(timeout_s, timeout_reason)
        if not isinstance(reply, kind):
            raise CameraError(f"camera {self._shown}: invalid reply from its process, which was ended")
        return reply

    def _receive(self, timeout_s: float, timeout_reason: str) -> _Reply:
        """Receive the child's next message. Raises `CameraError` for a failure, a timeout or an invalid reply."""
        data = self._child.receive(timeout_s)
        if data is None:
            raise CameraError(f"camera {self._shown}: {timeout_reason} within {timeout_s:g} s; its process was ended")
        if not data:
            raise CameraError(f"camera {self._shown}: its process ended unexpectedly ({self._child.exit_status()})")
        try:
            reply: _Reply = _REPLY_DECODER.decode(data)
        except (msgspec.DecodeError, UnicodeDecodeError):
            raise CameraError(f"camera {self._shown}: invalid reply from its process, which was ended") from None
        if isinstance(reply, _Failed):
            kind = CameraSpecError if reply.permanent else CameraRefused if reply.refused else CameraError
            raise kind(f"camera {self._shown}: {reply.reason[:_MAX_REASON_CHARS]}")
        return reply


class _Child:
    """The child process, its socket and the shared memory."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        with contextlib.ExitStack() as undo:
            shared = os.memfd_create("eyas-frame", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
            undo.callback(os.close, shared)
            os.ftruncate(shared, BUFFER_BYTES)
            # Reading truncated memory would kill this process, so the size is final.
            fcntl.fcntl(shared, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
            self.memory = mmap.mmap(shared, BUFFER_BYTES, prot=mmap.PROT_READ)
            self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            undo.callback(theirs.close)
            self._process = subprocess.Popen(
                module_command(__name__, str(theirs.fileno()), str(shared)),
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                pass_fds=(theirs.fileno(), shared),
                env=environment,
                start_new_session=True,  # Ctrl-C in a terminal is only for the parent
            )
        self.pid = self._process.pid

    def send(self, message: bytes) -> None:
        """Send a message; if that fails, the next receive finds the socket closed."""
        with contextlib.suppress(OSError):
            self._socket.send(message, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)

    def receive(self, timeout_s: float) -> bytes | None:
        """The next message, empty if the socket is closed; None after `timeout_s`."""
        if self.memory.closed:
            return b""
        poll = select.poll()
        poll.register(self._socket, select.POLLIN)
        if not poll.poll(1000 * timeout_s):
            return None
        try:
            with contextlib.suppress(ConnectionResetError):
                return self._socket.recv(_MAX_MESSAGE_BYTES)
            # The child left with a request unread: this error comes first, then its last message.
            return self._socket.recv(_MAX_MESSAGE_BYTES, socket.MSG_DONTWAIT)
        except OSError:
            return b""

    def disconnect(self) -> None:
        """Shut the socket down; pending reads on both sides return an empty message."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def exit_status(self) -> str:
        """How the process ended, for messages."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            code = self._process.wait(_GRACE_S)
            return f"signal {-code}" if code < 0 else f"exit code {code}"
        return "still running"

    @property
    def alive(self) -> bool:
        """Whether the process still exists."""
        return self._process.poll() is None

    def end(self, *, grace_s: float) -> bool:
        """Wait `grace_s` for the process to end, else kill it, and free everything; return whether it is gone.

        Calling it twice is allowed.
        """
        self.disconnect()
        if grace_s:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(grace_s)
        self._process.kill()
        # A process that hangs in a driver dies only when the driver returns: do not wait for that.
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_GRACE_S)
        if self._process.stdin is not None:
            self._process.stdin.close()
        self._socket.close()
        self.memory.close()
        return not self.alive


class _Lingering:
    """Processes that were killed and live on, because a driver does not return: each source may leave one at most."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._children: dict[str, _Child] = {}

    def add(self, shown: str, child: _Child) -> None:
        """Remember a child that could not be killed."""
        with self._lock:
            self._children[shown] = child

    def check(self, shown: str) -> None:
        """Raises `CameraError` while the earlier process of a source lives."""
        with self._lock:
            child = self._children.get(shown)
            if child is not None and not child.alive:
                del self._children[shown]
                return
        if child is not None:
            raise CameraError(
                f"camera {shown}: its earlier process {child.pid} hangs in a driver and cannot be killed; it is opened "
                "again when that has ended. Unplugging the camera may help, restarting the device will"
            )


_LINGERING = _Lingering()


def main(arguments: list[str]) -> None:
    """Entry point of the child: `arguments` are the file descriptors of the socket and of the shared memory."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # the parent decides when this process ends
    buffer = np.frombuffer(mmap.mmap(int(arguments[1]), BUFFER_BYTES), dtype=np.uint8)
    with socket.socket(fileno=int(arguments[0])) as parent:
        if not _end_with_parent():
            return
        raise_oom_score()
        request = msgspec.json.decode(parent.recv(_MAX_MESSAGE_BYTES), type=_OpenRequest)
        reader = _load(request.reader)
        as_root = confine(str(request.settings.get("source", "")))
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            parent.send(msgspec.json.encode(_Ready(as_root)))
            _serve(reader, request.settings, parent, buffer)


def _load(name: str) -> Callable[[dict[str, Any]], Reader]:
    """Import a reader and what its library imports late: another user may not be able to read those files."""
    module_name, class_name = name.split(":")
    module = importlib.import_module(module_name)
    "x".encode("idna")
    for late in getattr(module, "PRELOAD", ()):
        with contextlib.suppress(ImportError):  # the reader reports it
            importlib.import_module(late)
    return cast("Callable[[dict[str, Any]], Reader]", getattr(module, class_name))


def _serve(
    open_reader: Callable[[dict[str, Any]], Reader],
    settings: dict[str, Any],
    parent: socket.socket,
    buffer: npt.NDArray[np.uint8],
) -> None:
    """Open the source and serve requests for frames until the parent disconnects or the source fails."""

    def send(reply: _Reply) -> None:
        parent.send(msgspec.json.encode(reply))

    try:
        reader = open_reader(settings)
    except EyasError as error:
        send(
            _Failed(
                str(error),
                permanent=isinstance(error, CameraSpecError),
                refused=isinstance(error, CameraRefused),
            )
        )
        return
    requests = select.poll()
    requests.register(parent, select.POLLIN)
    try:
        send(_Opened(getattr(reader, "note", ""), getattr(reader, "problems", [])))
        while reader.grab():
            captured = time.monotonic()
            if requests.poll(0):
                if not parent.recv(_MAX_MESSAGE_BYTES):
                    return
                send(_image(reader, buffer, captured))
        send(_Failed("the source ended or stopped delivering"))
    except CameraError as error:
        send(_Failed(str(error)))
    finally:
        reader.close()


def _image(reader: Reader, buffer: npt.NDArray[np.uint8], captured: float) -> _Reply:
    """Write the grabbed frame to the shared buffer."""
    try:
        image = reader.retrieve(buffer)
        size = len(image) if isinstance(image, bytes) else image.nbytes
        if size > len(buffer):
            return _Unusable(f"{size} bytes; at most {len(buffer)} are allowed")
        if isinstance(image, bytes):
            buffer[:size] = np.frombuffer(image, dtype=np.uint8)
            return _Encoded(size, captured)
        pixels = as_bgr(image)
    except ImageError as error:
        return _Unusable(str(error))
    height, width = pixels.shape[:2]
    target = buffer[: pixels.nbytes].reshape(pixels.shape)
    if pixels.ctypes.data != target.ctypes.data:
        target[...] = pixels
    return _Raw(width, height, captured)


def _end_with_parent() -> bool:
    """Let the kernel kill this process when the parent's end of standard input closes; False if it is already closed.

    Source: fcntl(2), F_SETSIG; the kernel signals a pipe's readers when its last writer goes.
    """
    fcntl.fcntl(0, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(0, fcntl.F_SETSIG, signal.SIGKILL)
    fcntl.fcntl(0, fcntl.F_SETFL, fcntl.fcntl(0, fcntl.F_GETFL) | os.O_ASYNC)
    poll = select.poll()
    poll.register(0, 0)
    return not poll.poll(0)
