"""What systemd is told of a running loop: `READY=1`, what it is doing, and a beat for the watchdog.

The protocol is sd_notify(3): datagrams to the socket that `$NOTIFY_SOCKET` names. Without that variable nothing
happens, and a socket that fails never disturbs the loop.
"""

from __future__ import annotations

import math
import os
import re
import socket
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from eyas_device.agent.loop import FramePrediction, Listener
from eyas_device.camera.reconnecting import CameraState
from eyas_device.errors import ImageError
from eyas_device.predict import Classifier
from eyas_device.support.closing import Closing

UNIT = Path(__file__).parents[1] / "eyas-device.service"
"""The hardened unit file for a camera."""
START_S = 60.0
"""Before the first answer each beat asks systemd for so much more time to start: a camera may come later."""
_RETRY_S = 1.0
_LONGEST_ADDRESS = 107
"""Bytes in `sockaddr_un.sun_path`, less the closing zero."""
_LONGEST_STATUS = 200


class Notifier(Closing, Listener):
    """Listens to the loop and tells systemd: ready after the first answer, then a beat at most every third of the
    watchdog's time. The loop beats itself, by `turned`: inference that hangs stops the beat, a lost camera does not.
    """

    def __init__(self, *, environ: Mapping[str, str] = os.environ, clock: Callable[[], float] = time.monotonic) -> None:
        self.watchdog_s = _watchdog(environ)
        """How long systemd waits for a beat before it ends the process; None: it does not."""
        self.ready = False
        """Whether systemd was told that the service is ready."""
        self.lost = 0
        """Messages that could not be sent."""
        self._clock = clock
        self._next_beat = -math.inf
        self._told = self._model = self._camera = ""
        self._reloading = False
        self._address = _address(environ.get("NOTIFY_SOCKET", ""))
        self._socket = None if self._address is None else _open()

    def answered(self, answer: FramePrediction) -> None:
        """After the first answer: the service is ready."""
        if not self.ready:
            self._tell_ready()

    def unreadable(self, reason: ImageError) -> None:
        """Nothing: a frame without an answer makes nothing ready."""

    def swapped(self, classifier: Classifier) -> None:
        """Say which model answers; a new one ends a reload."""
        self._model = str(classifier)
        self._describe()
        self.reloaded()

    def changed(self, camera: CameraState) -> None:
        """Say how the camera is."""
        self._camera = str(camera)
        self._describe()

    def turned(self) -> None:
        """The loop went round: beat."""
        self.beat()

    def beat(self) -> None:
        """Tell systemd that the loop is alive. Cheap: sends at most every third of the watchdog's time."""
        if self._socket is None or (now := self._clock()) < self._next_beat:
            return
        if self.ready and self.watchdog_s is None:
            self._next_beat = math.inf
            return
        lines = [] if self.watchdog_s is None else ["WATCHDOG=1"]
        if not self.ready:
            lines.append(f"EXTEND_TIMEOUT_USEC={START_S * 1e6:.0f}")
        every = (self.watchdog_s or START_S) / 3
        self._next_beat = now + (every if self._send(*lines) else min(every, _RETRY_S))

    def status(self, text: str) -> None:
        """What `systemctl status` shows: one line, sent when it changes."""
        plain = re.sub(r"[\x00-\x1f\x7f]+", " ", text)[:_LONGEST_STATUS]  # a line break would start another field
        if plain != self._told and self._send(f"STATUS={plain}"):
            self._told = plain

    def reloading(self) -> None:
        """The configuration or the model is being read again; `reloaded` ends it. Before the first answer: nothing."""
        if self.ready and not self._reloading:
            self._reloading = True
            self._send("RELOADING=1", f"MONOTONIC_USEC={time.monotonic_ns() // 1000}")

    def reloaded(self) -> None:
        """The reload is over, whether it succeeded or not."""
        if self._reloading:
            self._reloading = False
            self._tell_ready()

    def close(self) -> None:
        """Tell systemd that the service stops."""
        if self._socket is not None:
            self._send("STOPPING=1")
            self._socket.close()
            self._socket = None

    def _describe(self) -> None:
        self.status("; ".join(part for part in (self._model, self._camera) if part))

    def _tell_ready(self) -> None:
        """`READY=1`; where that does not get through, the next answer tries again."""
        self.ready = self._socket is None or self._send("READY=1")
        self._next_beat = -math.inf

    def _send(self, *lines: str) -> bool:
        if self._socket is None or self._address is None:
            return False
        try:
            self._socket.sendto("\n".join(lines).encode("utf-8", "replace"), self._address)
        except OSError:
            self.lost += 1
            return False
        return True


def _open() -> socket.socket | None:
    try:
        opened = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
    except OSError:
        return None
    opened.setblocking(False)
    return opened


def _address(text: str) -> bytes | None:
    """The socket's address for the system: a path, or an abstract name that starts with a zero byte."""
    raw = os.fsencode(text)
    if not 1 < len(raw) <= _LONGEST_ADDRESS or raw[:1] not in (b"/", b"@") or b"\x00" in raw:
        return None
    return b"\x00" + raw[1:] if raw[:1] == b"@" else raw


def _watchdog(environ: Mapping[str, str]) -> float | None:
    """Seconds of `$WATCHDOG_USEC`, if it is meant for this process."""
    usec, pid = environ.get("WATCHDOG_USEC", ""), environ.get("WATCHDOG_PID", str(os.getpid()))
    if not re.fullmatch(r"\d{1,18}", usec, re.ASCII) or int(usec) == 0 or pid != str(os.getpid()):
        return None
    return int(usec) / 1e6
