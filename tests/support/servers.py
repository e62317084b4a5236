"""Real stream servers for tests, each a process of its own that can be killed, stopped and started again."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from eyas_device.camera import Frame
from tests.support.brokers import free_port
from tests.support.system_parts import unavailable

PLENTY_S = 20.0
"""Far beyond what anything takes on a busy machine, and far below the waits that would be wrong."""
_SYSTEM_PYTHON = "/usr/bin/python3"


class StreamServer:
    """`streams.py` in a process of its own; with a file of certificate and key it speaks TLS."""

    def __init__(self, certificate: Path | None = None) -> None:
        self.port = free_port()
        self._arguments = [] if certificate is None else [str(certificate)]
        self.process: subprocess.Popen[str] | None = None

    def start(self) -> None:
        path = str(Path(__file__).with_name("streams.py"))
        self.process = subprocess.Popen(
            [sys.executable, path, str(self.port), *self._arguments], stdout=subprocess.PIPE, text=True
        )
        assert self.process.stdout is not None
        assert int(self.process.stdout.readline()) == self.port

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait(PLENTY_S)

    def spec(self, mode: str, login: str = "") -> str:
        return f"mjpeg:http{'s' if self._arguments else ''}://{login}127.0.0.1:{self.port}/{mode}"


class RtspServer:
    """`rtsp_server.py` on a port of its own; with a file of certificate and key it speaks TLS."""

    def __init__(self, certificate: Path | None = None) -> None:
        self.port = free_port()
        self._arguments = [] if certificate is None else [str(certificate)]
        self.process: subprocess.Popen[str] | None = None

    def start(self) -> None:
        """Skips the test where the server cannot be had, but fails it on continuous integration."""
        why = "GStreamer's RTSP server is not installed (make system-deps)"
        if not Path(_SYSTEM_PYTHON).exists():
            unavailable(why)
        self.process = subprocess.Popen(
            [_SYSTEM_PYTHON, str(Path(__file__).with_name("rtsp_server.py")), str(self.port), *self._arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
        )
        assert self.process.stdout is not None
        if not self.process.stdout.readline():
            assert self.process.wait(PLENTY_S) == 77, "the RTSP server did not start"
            unavailable(why)

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait(PLENTY_S)

    @property
    def url(self) -> str:
        return f"rtsp{'s' if self._arguments else ''}://127.0.0.1:{self.port}/ball"


def taken(camera: Any) -> Frame:
    frame = camera.capture()
    assert isinstance(frame, Frame)
    return frame


def gone(pid: int, *, within_s: float = PLENTY_S) -> bool:
    """Whether a process has ended; a zombie has."""
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            return True
        if state == "Z":
            return True
        time.sleep(0.02)
    return False
