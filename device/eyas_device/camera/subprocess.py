"""A camera whose library may hang or crash, in a process of its own that can be killed.

The parent starts a child process. Requests and short answers are messages on a socket pair;
images come through memory that both share, so no pixel goes through a pipe. The parent asks for one frame at a time
and copies it out before it asks again: one place for an image is enough, and frames handed out stay valid for ever.
Between requests the child goes on taking frames from its device and drops them, so that an answer is always new.

The child ends with its parent, however that ends: the kernel kills it when the pipe on its standard input loses its
writer. (`PR_SET_PDEATHSIG` would kill it already when the *thread* ends that opened the camera.)

What the child says is checked as if it came from the network: a stream may have taken its decoder over.
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib
import mmap
import os
import select
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Mapping
from typing import Any, Protocol, TypeVar, cast

import msgspec
import numpy as np
import numpy.typing as npt

from eyas_device.camera import Frame
from eyas_device.errors import CameraError, CameraSpecError, EyasError, ImageError
from eyas_device.preprocess import MAX_SIDE, as_bgr
from eyas_device.support.closing import Closing
from eyas_device.support.opencv import QUIET
from eyas_device.support.processes import module_command

ROOM = 64 << 20
"""Bytes for an image; only what is written takes memory."""
START_S = 30.0
"""How long the child may take to start and to import its library, seconds."""
_OPEN_MARGIN_S = 2.0
"""What the child gets on top of its own timeout to tell why a source did not open."""
_GRACE_S = 0.5
_MESSAGE = 1 << 16
_REASON = 500
"""Characters that are kept of a reason."""
_ENVIRONMENT = {
    **QUIET,
    "LIBCAMERA_LOG_LEVELS": "*:ERROR",
    "OPENBLAS_NUM_THREADS": "1",  # each thread of it would cost memory
}


class Reader(Protocol):
    """What a library does in the child. Made from its settings; raises `CameraError` if that does not work."""

    def grab(self) -> bool:
        """Wait for the next frame and keep it undecoded where that is possible; False when there is none any more."""

    def retrieve(self, room: npt.NDArray[np.uint8]) -> npt.NDArray[Any] | bytes:
        """The grabbed frame: BGR pixels, which may lie at the start of `room` (uint8 [bytes]), or an encoded image.

        Raises `ImageError` if this frame is unusable.
        """

    def close(self) -> None:
        """Give the device back."""


class _Order(msgspec.Struct, frozen=True):
    """The first message to the child."""

    reader: str
    settings: dict[str, Any]


class _Ready(msgspec.Struct, frozen=True, tag=True):
    """The child runs; from now on the source's own timeout counts."""


class _Opened(msgspec.Struct, frozen=True, tag=True):
    """The source is open; `note` says how it differs from what was asked for."""

    note: str = ""


class _Failed(msgspec.Struct, frozen=True, tag=True):
    """The source cannot be opened or stopped delivering; the child ends."""

    reason: str
    mistake: bool = False


class _Unusable(msgspec.Struct, frozen=True, tag=True):
    """A frame that is no image; the next request gets the next one."""

    reason: str


class _Encoded(msgspec.Struct, frozen=True, tag=True):
    """The shared memory begins with an encoded image of `length` bytes."""

    length: int
    time: float
    captured: float


class _Raw(msgspec.Struct, frozen=True, tag=True):
    """The shared memory begins with `height` x `width` BGR pixels."""

    width: int
    height: int
    time: float
    captured: float


_Answer = _Ready | _Opened | _Failed | _Unusable | _Encoded | _Raw
_Kind = TypeVar("_Kind", _Ready, _Opened)
_ANSWERS = msgspec.json.Decoder(_Answer)


class SubprocessCamera(Closing):
    """The parent's side: a live camera that returns or raises in time, whatever its library does."""

    live = True

    def __init__(
        self,
        reader: str,
        settings: msgspec.Struct,
        *,
        shown: str,
        timeout_s: float,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        """Start `reader` (`module:class`) on `settings` in a process of its own.

        `shown` names the camera in messages, without a password; `environment` is added to the child's. Waits at most
        `START_S` for the process and then `timeout_s` and a margin for the source. Raises `CameraError`, or
        `CameraSpecError` for a mistake that the reader told.
        """
        self._shown, self._timeout_s = shown, timeout_s
        self._number = 0
        self._closed = threading.Event()
        self._busy = threading.Lock()
        try:
            self._child = _Child({**_ENVIRONMENT, **os.environ, **(environment or {})})
        except OSError as error:
            raise CameraError(f"camera {shown}: its process cannot be started ({error.strerror})") from None
        try:
            self._child.send(msgspec.json.encode(_Order(reader, msgspec.to_builtins(settings))))
            self._expect(_Ready, START_S, "its process did not start")
            opened = self._expect(_Opened, timeout_s + _OPEN_MARGIN_S, "it did not open")
        except BaseException:
            self._child.end(grace_s=0)
            raise
        self._source = f"{shown} ({opened.note})" if opened.note else shown

    @property
    def pid(self) -> int:
        """The child's process id."""
        return self._child.pid

    def capture(self) -> Frame | None:
        """The next frame, a copy that stays valid; None after `close`, at once if that comes while this waits.

        Raises `ImageError` for a frame that is no image. Raises `CameraError` if none came within the timeout, if
        the source failed or if the child died; the child is gone then, and the camera has to be opened again.
        """
        with self._busy:
            if self._closed.is_set():
                return None
            source = f"{self._source}#{self._number}"
            self._number += 1
            try:
                self._child.send(b"n")
                return self._frame(self._receive(self._timeout_s, "no frame came"), source)
            except CameraError:
                if self._closed.is_set():
                    return None  # and `close` ends the child
                self._child.end(grace_s=0)
                raise

    def close(self) -> None:
        """End the child: in order if it listens, within half a second in any case."""
        self._closed.set()
        self._child.hang_up()
        with self._busy:
            self._child.end(grace_s=_GRACE_S)

    def _frame(self, answer: _Answer, source: str) -> Frame:
        """Copy the image that `answer` announces out of the shared memory."""
        if isinstance(answer, _Unusable):
            raise ImageError(f"{source}: {answer.reason[:_REASON]}")
        if isinstance(answer, _Encoded) and 0 < answer.length <= ROOM:
            image = self._child.memory[: answer.length]
            return Frame(image=image, time=answer.time, source=source, captured=answer.captured)
        if isinstance(answer, _Raw) and 0 < answer.width <= MAX_SIDE and 0 < answer.height <= MAX_SIDE:
            count = answer.width * answer.height * 3
            if count <= ROOM:
                flat = np.frombuffer(self._child.memory, dtype=np.uint8, count=count)
                pixels = flat.reshape(answer.height, answer.width, 3).copy()
                return Frame(image=pixels, time=answer.time, source=source, captured=answer.captured)
        raise CameraError(f"camera {self._shown}: its process answers nonsense; it was ended")

    def _expect(self, kind: type[_Kind], timeout_s: float, late: str) -> _Kind:
        answer = self._receive(timeout_s, late)
        if not isinstance(answer, kind):
            raise CameraError(f"camera {self._shown}: its process answers nonsense; it was ended")
        return answer

    def _receive(self, timeout_s: float, late: str) -> _Answer:
        """The child's next message. Raises `CameraError` for a failure, silence, an end or nonsense."""
        data = self._child.receive(timeout_s)
        if data is None:
            raise CameraError(f"camera {self._shown}: {late} within {timeout_s:g} s; its process was ended")
        if not data:
            raise CameraError(f"camera {self._shown}: its process ended unexpectedly ({self._child.ending()})")
        try:
            answer: _Answer = _ANSWERS.decode(data)
        except (msgspec.DecodeError, UnicodeDecodeError):
            raise CameraError(f"camera {self._shown}: its process answers nonsense; it was ended") from None
        if isinstance(answer, _Failed):
            kind = CameraSpecError if answer.mistake else CameraError
            raise kind(f"camera {self._shown}: {answer.reason[:_REASON]}")
        return answer


class _Child:
    """The process, its socket and the memory shared with it."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        with contextlib.ExitStack() as undo:
            shared = os.memfd_create("eyas-frame", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
            undo.callback(os.close, shared)
            os.ftruncate(shared, ROOM)
            # Reading memory that was cut off would kill this process, so its size is final.
            fcntl.fcntl(shared, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
            self.memory = mmap.mmap(shared, ROOM, prot=mmap.PROT_READ)
            self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            undo.callback(theirs.close)
            self._process = subprocess.Popen(
                module_command(__name__, str(theirs.fileno()), str(shared)),
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                pass_fds=(theirs.fileno(), shared),
                env=environment,
                start_new_session=True,  # Ctrl-C in a terminal is for the parent alone
            )
        self.pid = self._process.pid

    def send(self, message: bytes) -> None:
        """Send a message; one that cannot be sent any more is answered by the end of the socket."""
        with contextlib.suppress(OSError):
            self._socket.send(message, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)

    def receive(self, timeout_s: float) -> bytes | None:
        """The next message, empty when there will be none any more; None after `timeout_s`."""
        if self.memory.closed:
            return b""
        poll = select.poll()
        poll.register(self._socket, select.POLLIN)
        if not poll.poll(1000 * timeout_s):
            return None
        try:
            with contextlib.suppress(ConnectionResetError):
                return self._socket.recv(_MESSAGE)
            # The child left with a request unread: that is told first, and its last message after it.
            return self._socket.recv(_MESSAGE, socket.MSG_DONTWAIT)
        except OSError:
            return b""

    def hang_up(self) -> None:
        """End the conversation: whoever waits for a message, here or there, gets an empty one."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def ending(self) -> str:
        """How the process ended, for a message."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            code = self._process.wait(_GRACE_S)
            return f"signal {-code}" if code < 0 else f"exit code {code}"
        return "still running"

    def end(self, *, grace_s: float) -> None:
        """Wait `grace_s` for the process to end by itself, kill it otherwise, and free everything; twice is fine."""
        self.hang_up()
        if grace_s:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(grace_s)
        self._process.kill()
        # A process that hangs in a driver dies only when the driver lets it; nobody waits for that.
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_GRACE_S)
        if self._process.stdin is not None:
            self._process.stdin.close()
        self._socket.close()
        self.memory.close()


def main(arguments: list[str]) -> None:
    """The child's side: `arguments` are the numbers of the socket and of the shared memory."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # the parent decides when this ends
    room = np.frombuffer(mmap.mmap(int(arguments[1]), ROOM), dtype=np.uint8)
    with socket.socket(fileno=int(arguments[0])) as parent:
        if not _dies_with_parent():
            return
        order = msgspec.json.decode(parent.recv(_MESSAGE), type=_Order)
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            parent.send(msgspec.json.encode(_Ready()))
            _serve(order, parent, room)


def _serve(order: _Order, parent: socket.socket, room: npt.NDArray[np.uint8]) -> None:
    """Open the source and answer requests for frames until the parent hangs up or the source fails."""

    def tell(answer: _Answer) -> None:
        parent.send(msgspec.json.encode(answer))

    module, name = order.reader.split(":")
    try:
        reader = cast(Reader, getattr(importlib.import_module(module), name)(order.settings))
    except EyasError as error:
        tell(_Failed(str(error), mistake=isinstance(error, CameraSpecError)))
        return
    requests = select.poll()
    requests.register(parent, select.POLLIN)
    try:
        tell(_Opened(getattr(reader, "note", "")))
        while reader.grab():
            moment = time.time(), time.monotonic()
            if requests.poll(0):
                if not parent.recv(_MESSAGE):
                    return
                tell(_image(reader, room, *moment))
        tell(_Failed("the source ended or stopped delivering"))
    except CameraError as error:
        tell(_Failed(str(error)))
    finally:
        reader.close()


def _image(reader: Reader, room: npt.NDArray[np.uint8], moment: float, captured: float) -> _Answer:
    """Put the grabbed frame into `room`."""
    try:
        image = reader.retrieve(room)
        size = len(image) if isinstance(image, bytes) else image.nbytes
        if size > len(room):
            return _Unusable(f"{size} bytes; at most {len(room)} are allowed")
        if isinstance(image, bytes):
            room[:size] = np.frombuffer(image, dtype=np.uint8)
            return _Encoded(size, moment, captured)
        pixels = as_bgr(image)
    except ImageError as error:
        return _Unusable(str(error))
    height, width = pixels.shape[:2]
    place = room[: pixels.nbytes].reshape(pixels.shape)
    if pixels.ctypes.data != place.ctypes.data:
        place[...] = pixels
    return _Raw(width, height, moment, captured)


def _dies_with_parent() -> bool:
    """Have the kernel kill this process when the parent's end of standard input closes; False if it is closed already.

    Source: fcntl(2), F_SETSIG; the kernel signals a pipe's readers when its last writer goes.
    """
    fcntl.fcntl(0, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(0, fcntl.F_SETSIG, signal.SIGKILL)
    fcntl.fcntl(0, fcntl.F_SETFL, fcntl.fcntl(0, fcntl.F_GETFL) | os.O_ASYNC)
    poll = select.poll()
    poll.register(0, 0)
    return not poll.poll(0)
