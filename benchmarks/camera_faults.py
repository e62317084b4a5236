"""How soon a camera's fault is noticed and named, and how soon the camera delivers again once it is well.

    python benchmarks/camera_faults.py [--quick] [--json FILE]

A real MJPEG server for each fault, all at the same time: it is well, then has the fault for twelve seconds (a frozen
image: as long as it takes to be noticed, and five seconds), then is well again. The device's camera reads it with its
default settings. Of a server that fell silent, connections stay silent for ever that were made while it was ill.
"""

from __future__ import annotations

import argparse
import re
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import cv2
import numpy as np

from common import Figure, finish
from eyas_device.camera import Frame, open_camera
from eyas_device.camera.reconnecting import CameraState, ReconnectingCamera
from eyas_device.errors import ImageError
from eyas_host.support.machine import cpu_pressure

_FPS = 20.0
_WELL_S, _ILL_S, _FROZEN_S = 3.0, 12.0, 35.0
_PATIENCE_S = 20.0
_RECOVERY_S = 2.0
"""Time in which a camera that is well again must deliver, seconds."""
_DELIVERS = ("delivering", "degraded", "resized")
_FAULTS = {
    "stall": "accepts and sends nothing",
    "drip": "sends a byte every tenth of a second",
    "garbage": "every third image is damaged",
    "resize": "sends another image size",
    "freeze": "sends the same image",
    "black": "sends black images",
    "eof": "ends each stream after the header",
    "gone": "nothing listens",
    "refuses": "answers 503",
    "flapping": "ends each stream after two seconds",
    "rtsp": "an RTSP server is killed",
}


def jpeg(number: int, *, width: int = 640, height: int = 480, black: bool = False) -> bytes:
    """An image that differs for each number."""
    pixels = np.full((height, width, 3), 0 if black else 60, dtype=np.uint8)
    if not black:
        cv2.circle(pixels, (40 + 7 * number % (width - 80), height // 2), 40, (40, 220, 90), -1)
    return cv2.imencode(".jpg", pixels)[1].tobytes()


class Server:
    """An MJPEG server with a fault that can be switched on and off."""

    def __init__(self, fault: str) -> None:
        self.fault, self.ill = fault, False
        self._listener: socket.socket | None = None
        self.port = 0
        self.listen()

    @property
    def url(self) -> str:
        """The camera's specification."""
        return f"mjpeg:http://127.0.0.1:{self.port}/"

    def close(self) -> None:
        """A no-op: its threads end with the process."""

    def listen(self) -> None:
        """Accept connections."""
        self._listener = socket.create_server(("127.0.0.1", self.port), reuse_port=True)
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, args=(self._listener,), daemon=True).start()

    def switch(self, *, ill: bool) -> None:
        """Become ill or well."""
        self.ill = ill
        if self.fault == "gone" and ill and self._listener is not None:
            self._listener.shutdown(socket.SHUT_RDWR)
            self._listener.close()
        elif self.fault == "gone":
            self.listen()

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                connected, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(connected,), daemon=True).start()

    def _serve(self, connected: socket.socket) -> None:
        with connected:
            try:
                connected.recv(65536)
                if self.ill and self.fault == "refuses":
                    connected.sendall(b"HTTP/1.1 503 Busy\r\nContent-Length: 0\r\n\r\n")
                    return
                connected.sendall(b"HTTP/1.1 200 OK\r\nContent-Type: multipart/x-mixed-replace; boundary=b\r\n\r\n")
                for piece in self._pieces():
                    connected.sendall(piece)
            except OSError:
                pass  # the reader left

    def _pieces(self) -> Iterator[bytes]:
        started, number = time.monotonic(), 0
        while True:
            image, ill = jpeg(number), self.ill
            if ill and self.fault in ("eof", "gone", "refuses"):
                return
            if ill and self.fault == "flapping" and time.monotonic() - started > 2.0:
                return
            if ill and self.fault == "stall":
                time.sleep(3600)
            while ill and self.fault == "drip":
                yield b"x"
                time.sleep(0.1)
            if ill and self.fault == "garbage" and number % 3 == 0:
                image = image[: len(image) // 2]
            elif ill and self.fault == "resize":
                image = jpeg(number, width=320, height=240)
            elif ill and self.fault in ("freeze", "black"):
                image = jpeg(0, black=self.fault == "black")
            yield b"--b\r\nContent-Length: %d\r\n\r\n" % len(image) + image + b"\r\n"
            number += 1
            time.sleep(1 / _FPS)


class Watch:
    """The device's camera on a server, with the times of its good frames and states."""

    def __init__(self, server: Server | RtspServer) -> None:
        self.frames: list[float] = []
        self.states: list[tuple[float, CameraState]] = []
        self.camera = ReconnectingCamera(
            lambda: open_camera(server.url), on_change=lambda state: self.states.append((time.monotonic(), state))
        )
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        while True:
            try:
                frame = self.camera.capture()
                if frame is None:
                    return
                good = self._decoded(frame)
            except ImageError:
                continue
            if good:
                self.frames.append(time.monotonic())

    def _decoded(self, frame: Frame) -> bool:
        """Decode, and tell the camera the outcome, as the frame loop does."""
        try:
            frame.pixels()
        except ImageError:
            self.camera.decoded(False)
            return False
        self.camera.decoded(True)
        return True


class RtspServer:
    """The tests' RTSP server, which is killed."""

    _process: subprocess.Popen[str]

    def __init__(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.url = f"rtsp://127.0.0.1:{free.getsockname()[1]}/ball"
        self.switch(ill=False)

    def switch(self, *, ill: bool) -> None:
        """Kill it, or start it and wait until it listens."""
        if ill:
            self._process.kill()
            self._process.wait()
            return
        port = self.url.rpartition(":")[2].partition("/")[0]
        command = ["/usr/bin/python3", "tests/support/rtsp_server.py", port]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        assert self._process.stdout is not None
        if not self._process.stdout.readline():
            raise SystemExit("GStreamer's RTSP server is not installed: make system-deps")

    def close(self) -> None:
        """End it."""
        self._process.kill()
        self._process.wait()


Row = tuple[float | None, str, float | None, float]
"""Seconds until the fault was noticed, its reason, seconds until it delivered again, fraction of time that it did."""


def measure(fault: str) -> Row:
    """Let a server fall ill and become well again."""
    server = RtspServer() if fault == "rtsp" else Server(fault)
    watch = Watch(server)
    wait_until(lambda: bool(watch.frames), _PATIENCE_S)
    time.sleep(_WELL_S)
    ill_at = time.monotonic()
    server.switch(ill=True)
    time.sleep(_FROZEN_S if fault == "freeze" else _ILL_S)
    server.switch(ill=False)
    well_at = time.monotonic()
    wait_until(lambda: any(when > well_at + 0.2 for when in watch.frames), _PATIENCE_S)
    seen = [(when - ill_at, str(state)) for when, state in watch.states if ill_at < when < well_at and state.reason]
    frames = np.array([when for when in watch.frames if ill_at < when < well_at])
    seconds = np.unique(np.floor((frames - ill_at) * 5)) / 5
    back = min((when - well_at for when in watch.frames if when > well_at + 1 / _FPS), default=None)
    watch.camera.close()
    server.close()
    return seen[0][0] if seen else None, seen[-1][1] if seen else "", back, len(seconds) / 5 / (well_at - ill_at)


def wait_until(done: Callable[[], bool], seconds: float) -> None:
    """Wait for a condition, at most for so long."""
    ends = time.monotonic() + seconds
    while not done() and time.monotonic() < ends:
        time.sleep(0.02)


def main() -> None:
    """Measure all faults and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="each fault once instead of five times")
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    before = cpu_pressure()
    rows: dict[str, list[Row]] = {fault: [] for fault in _FAULTS}
    for _ in range(1 if arguments.quick else 5):
        threads = [threading.Thread(target=lambda f=fault: rows[f].append(measure(f))) for fault in _FAULTS]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    figures: dict[str, Figure] = {}
    for fault, measured in rows.items():
        noticed = [row[0] for row in measured if row[0] is not None]
        named = next((row[1] for row in measured if row[1]), "")
        reason = re.sub(r"(mjpeg|rtsp):\S+: ", "", named)
        figures[f"{fault}_noticed_s"] = Figure(
            value=float(np.median(noticed)) if len(noticed) == len(measured) else None,
            unit="s",
            note=f"{_FAULTS[fault]}; named: {reason}",
        )
        back = [np.inf if row[2] is None else row[2] for row in measured]
        figures[f"{fault}_recovered_s"] = Figure(
            value=float(max(back)),
            unit="s",
            bound=_RECOVERY_S,
            better="lower",
            spread=f"median {np.median(back):.2f}",
            note=f"delivered {np.median([row[3] for row in measured]):.0%} of the time meanwhile",
        )
    finish(figures, before, arguments.json)


if __name__ == "__main__":
    main()
