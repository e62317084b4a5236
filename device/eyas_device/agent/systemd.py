"""Service notifications to systemd: readiness, status text and watchdog beats.

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

from eyas_device.agent.loop import Listener
from eyas_device.camera.reconnecting import CameraState
from eyas_device.predict import Classifier
from eyas_device.support.closing import Closing
from eyas_device.support.redact import redact

UNIT = Path(__file__).parents[1] / "eyas-device.service"
"""The hardened unit file for a camera."""
LOAD_S = 300.0
"""Start-up time that a load of a model requests."""
ENGINE_S = 1800.0
"""Start-up time for a runtime that builds an engine for this device first."""
_RETRY_S = 1.0
_MAX_ADDRESS = 107
"""Bytes in `sockaddr_un.sun_path`, less the closing zero."""
_MAX_STATUS = 200


class Notifier(Closing, Listener):
    """Loop listener that notifies systemd: ready when the loop starts, then watchdog beats.

    Ready means that the agent is initialised; whether the camera delivers is in the status line and in the telemetry.
    The beats come from the loop itself: inference that hangs stops them, a lost camera does not. They also stop while
    `stalled` names another part of the agent.
    """

    def __init__(self, *, environ: Mapping[str, str] = os.environ, clock: Callable[[], float] = time.monotonic) -> None:
        self.watchdog_s = _watchdog(environ)
        """Watchdog timeout; None without a watchdog."""
        self.ready = False
        """Whether systemd knows that the service is ready."""
        self.lost = 0
        """Messages that could not be sent."""
        self.stalled: Callable[[], str] = lambda: ""
        """Names the part of the agent that makes no progress; empty if all do."""
        self._clock = clock
        self._next_beat = -math.inf
        self._status = self._model = self._camera = self._problem = self._facts = ""
        self._reloading = False
        self._address = _address(environ.get("NOTIFY_SOCKET", ""))
        self._socket = None if self._address is None else _open()

    def extend(self, seconds: float) -> None:
        """Request `seconds` for what comes next; a no-op once the service is ready."""
        if not self.ready:
            self._send(f"EXTEND_TIMEOUT_USEC={seconds * 1e6:.0f}")

    def problem(self, text: str) -> None:
        """Show what is wrong with the model; empty if nothing is."""
        self._problem = text
        self._describe()

    def facts(self, text: str) -> None:
        """Show figures and the state of the link; call it every few seconds at most."""
        self._facts = text
        self._describe()

    def on_model(self, classifier: Classifier) -> None:
        """Show the active model; a new one ends a reload."""
        self._model = str(classifier)
        self._describe()
        self.reloaded()

    def on_camera_state(self, state: CameraState) -> None:
        """Show the camera's state."""
        self._camera = str(state)
        self._describe()

    def on_tick(self) -> None:
        """Report readiness, and send a watchdog beat if one is due."""
        self.beat()

    def beat(self) -> None:
        """Send readiness, then a watchdog beat at most every third of the watchdog's timeout; cheap."""
        if (now := self._clock()) < self._next_beat:
            return
        if self._socket is None or (self.ready and self.watchdog_s is None):
            self.ready, self._next_beat = True, math.inf
            return
        stalled = self.stalled()
        if stalled:
            self.status(f"the {stalled} thread makes no progress; the watchdog will end the service")
        lines = [] if self.ready else ["READY=1"]
        lines += [] if self.watchdog_s is None or stalled else ["WATCHDOG=1"]
        sent = self._send(*lines) if lines else True
        self.ready = self.ready or sent
        interval = (self.watchdog_s or math.inf) / 3
        self._next_beat = now + (interval if sent else min(interval, _RETRY_S))

    def status(self, text: str) -> None:
        """Set the line that `systemctl status` shows; sent when it changes."""
        line = re.sub(r"[\x00-\x1f\x7f]+", " ", redact(text))[:_MAX_STATUS]  # a line break would start another field
        if line != self._status and self._send(f"STATUS={line}"):
            self._status = line

    def reloading(self) -> None:
        """Report that a reload started, which `reloaded` ends; a no-op before readiness."""
        if self.ready and not self._reloading:
            self._reloading = True
            self._send("RELOADING=1", f"MONOTONIC_USEC={time.monotonic_ns() // 1000}")

    def reloaded(self) -> None:
        """Report that the reload ended, successful or not."""
        if self._reloading:
            self._reloading = False
            self._send("READY=1")

    def close(self) -> None:
        """Report that the service stops."""
        if self._socket is not None:
            self._send("STOPPING=1")
            self._socket.close()
            self._socket = None

    def _describe(self) -> None:
        self.status("; ".join(text for text in (self._model, self._problem, self._camera, self._facts) if text))

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
    """The socket's address: a path, or an abstract name that starts with a zero byte; None if it is invalid."""
    raw = os.fsencode(text)
    if not 1 < len(raw) <= _MAX_ADDRESS or raw[:1] not in (b"/", b"@") or b"\x00" in raw:
        return None
    return b"\x00" + raw[1:] if raw[:1] == b"@" else raw


def _watchdog(environ: Mapping[str, str]) -> float | None:
    """Seconds of `$WATCHDOG_USEC` if it applies to this process."""
    usec, pid = environ.get("WATCHDOG_USEC", ""), environ.get("WATCHDOG_PID", str(os.getpid()))
    if not re.fullmatch(r"\d{1,18}", usec, re.ASCII) or int(usec) == 0 or pid != str(os.getpid()):
        return None
    return int(usec) / 1e6
