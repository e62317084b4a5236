"""What a running loop says: a day of log lines in hard conditions, the live line of a terminal, the last words."""

from __future__ import annotations

import fcntl
import io
import logging
import os
import pty
import re
import struct
import termios
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from eyas_device.agent import output as output_module
from eyas_device.agent.loop import FramePrediction
from eyas_device.agent.output import LiveLine, RunLog, clip
from eyas_device.agent.recent import Recent
from eyas_device.camera import Frame
from eyas_device.camera.reconnecting import CameraState
from eyas_device.errors import ImageError
from eyas_device.predict import Prediction
from eyas_device.support.logs import LogHandler
from tests.device.agent.test_app import Service, serve  # noqa: F401 - fixture

DAY_S = 86400
MAX_LINES = 200


def predicted(latency_ms: float = 10.0, label: str = "disc") -> FramePrediction:
    prediction = Prediction(label, 0, 0.9, False, np.array([0.9, 0.1], dtype=np.float32), latency_ms)
    pixels = np.zeros((8, 8, 3), dtype=np.uint8)
    return FramePrediction(
        number=0,
        source="x",
        time=0.0,
        prediction=prediction,
        latency_ms=latency_ms,
        decode_ms=1.0,
        age_ms=1.0,
        frame=Frame(pixels, source="x", time=0.0, captured=0.0),
    )


class Day:
    """A camera's day, without waiting for it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        self.stream = io.StringIO()
        self.handler = LogHandler(self.stream, clock=self.clock)
        logger = logging.Logger("day", logging.INFO)
        logger.addHandler(self.handler)
        monkeypatch.setattr(output_module, "logger", logger)
        self.camera, self.link = CameraState("delivering"), "connected"
        self.recent = Recent(self.clock)
        self.log = RunLog(
            self.recent,
            camera=lambda: self.camera,
            link=lambda: self.link,
            handler=self.handler,
            clock=self.clock,
        )

    def clock(self) -> float:
        return self.now

    def pass_by(self, step: Callable[[int], object], *, fps: float, seconds: float = DAY_S) -> list[str]:
        """Call `step` with each frame's number; return the lines."""
        for number in range(int(seconds * fps)):
            self.now += 1 / fps
            step(number)
            self.recent.on_tick()
            self.log.on_tick()
        return self.stream.getvalue().splitlines()

    def skip(self, error: ImageError) -> None:
        self.recent.on_unreadable(error)
        self.log.on_unreadable(error)

    def change(self, condition: str, reason: str = "") -> None:
        state = CameraState(condition, reason)  # type: ignore[arg-type]
        if state != self.camera:
            self.camera = state
            self.log.on_camera_state(state)


@pytest.fixture
def day(monkeypatch: pytest.MonkeyPatch) -> Day:
    return Day(monkeypatch)


def test_the_dark(day: Day) -> None:
    def black(number: int) -> None:
        day.change("black", "every value of the image is at most 4")
        day.skip(ImageError(f"mjpeg:http://10.0.0.7/#{number}: black; is the lens covered, or the light off?"))

    day.pass_by(black, fps=30, seconds=600)
    lines = day.pass_by(black, fps=0.5, seconds=DAY_S - 600)
    assert len(lines) <= MAX_LINES
    counts = [int(m[1].replace(",", "")) for line in lines if (m := re.search(r"skipped.*\(([\d,]+) more", line))]
    frames = 600 * 30 + (DAY_S - 600) // 2
    assert 0.95 * frames <= sum(counts) <= frames, "the counts tell how many frames were skipped"


def test_a_healthy_day(day: Day) -> None:
    answer = predicted()
    lines = day.pass_by(lambda number: day.recent.on_prediction(answer), fps=1)
    assert 20 <= len(lines) <= 40
    assert "3,600 frames in 60 min, 1.0 fps, latency p50 10.0 ms" in lines[-1]
    assert lines[-1].endswith("camera delivering; mqtt connected")


def test_every_third_frame_is_garbage(day: Day) -> None:
    reasons = ("a damaged JPEG of {} bytes, without a frame header", "not an image that can be decoded (code -{})")

    def garbage(number: int) -> None:
        if number % 3 == 0:
            day.skip(ImageError(f"rtsp://10.0.0.7/#{number}: {reasons[number % 2].format(number % 7919)}"))
        else:
            day.recent.on_prediction(answer)

    answer = predicted()
    assert len(day.pass_by(garbage, fps=0.5)) <= MAX_LINES


def test_a_camera_that_comes_and_goes_every_two_seconds(day: Day) -> None:
    def flap(number: int) -> None:
        if number % 2:
            day.change("delivering")
        else:
            day.change(
                "lost", f"mjpeg:http://10.0.0.7:80/: connection refused, attempt {number} of port {number % 999}"
            )

    lines = day.pass_by(flap, fps=0.25)  # a full turn takes 8 s: what is faster is logged less, not more
    assert len(lines) <= MAX_LINES
    assert any("camera lost" in line for line in lines) and any("camera delivering" in line for line in lines)


def test_a_broker_that_is_away_and_a_full_disk_in_turn(day: Day) -> None:
    texts = (
        "not connected: the broker cannot be reached ([Errno 111] Connection refused); trying again",
        "not connected: the broker cannot be reached ([Errno 113] No route to host); trying again",
        "not connected: timed out; /var/lib/eyas/spool: database or disk is full; messages wait in memory",
        "connecting; /var/lib/eyas/spool: database or disk is full; messages wait in memory",
    )

    def away(number: int) -> None:
        day.link = texts[number // 7 % 4]

    assert len(day.pass_by(away, fps=0.2)) <= MAX_LINES


def test_a_model_that_raises_with_each_frame(day: Day) -> None:
    def broken(number: int) -> None:
        day.log.on_error(RuntimeError(f"failed to invoke node {number} at 0x{number:x}"))

    assert len(day.pass_by(broken, fps=0.1)) <= MAX_LINES


def test_a_reason_that_changes_is_logged_while_the_condition_stays(day: Day) -> None:
    reasons = iter(["the server closed the connection", "401 Unauthorized", "401 Unauthorized"])

    def lost(number: int) -> None:
        day.camera = CameraState("lost", next(reasons))

    lines = day.pass_by(lost, fps=0.5, seconds=6)
    assert [line.partition("camera lost: ")[2] for line in lines if "lost" in line] == [
        "the server closed the connection",
        "401 Unauthorized",
    ]


def test_a_camera_in_the_dark_says_so_once(
    serve: Callable[..., Service],  # noqa: F811 - fixture
    pristine_bundle: Path,
) -> None:
    dark = "fake:?live=1&fps=50&frames=1000000&size=64x48&black=0-1000000"
    service = serve("--bundle", pristine_bundle, "--camera", dark, "--runtime", "onnx", "--log-level", "info")
    service.wait_for("camera black")
    time.sleep(1.5)
    assert service.end() == 0
    assert len(service.lines) <= 12, service.lines
    assert sum("skipped: " in line and "more in the last" not in line for line in service.lines) <= 1


# The live line


@pytest.fixture
def terminal() -> Iterator[SimpleNamespace]:
    """A terminal of 40 columns: `stream` to write on, `shown` returns what was written."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 40, 0, 0))
    with os.fdopen(slave, "w", encoding="utf-8") as stream:
        yield SimpleNamespace(stream=stream, shown=lambda: os.read(master, 65536).decode())
    os.close(master)


def test_the_live_line_stays_in_its_line_and_is_about_now(
    terminal: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [1000.0]
    monkeypatch.setattr(output_module.time, "monotonic", lambda: now[0])
    recent = Recent(lambda: now[0])
    recent.on_tick()
    handler = LogHandler(terminal.stream)
    shown = ""
    live = LiveLine(terminal.stream, recent, handler, link=lambda: "not connected: " + "no route to host " * 9)
    for second in range(120):
        recent.on_prediction(predicted(latency_ms=500.0 if second < 60 else 5.0, label="猫" * 20))
        now[0] += 1.0
        live.on_tick()
        shown += terminal.shown()
    lines = shown.split("\r\x1b[K")[1:]
    assert len(lines) == 120
    assert "\n" not in "".join(lines)
    assert all(width(line) <= 39 for line in lines)
    assert "latency p50 5" in lines[-1], "the latency is that of the last seconds"
    handler.handle(logging.LogRecord("x", logging.WARNING, "", 0, "camera lost", (), None))
    assert re.fullmatch(r"\r\x1b\[K\S+ \S+ warning camera lost\r\n", terminal.shown())


def width(text: str) -> int:
    """Columns of a text of ASCII and of full-width characters."""
    return sum(1 if ord(character) < 0x300 else 2 for character in text)


@pytest.mark.parametrize("columns", range(12))
def test_a_text_is_cut_at_the_columns_it_takes(columns: int) -> None:
    text = "a猫b\u0301Äc猫猫"
    cut = clip(text, columns)
    assert text.startswith(cut)
    assert sum({"猫": 2, "\u0301": 0}.get(c, 1) for c in cut) <= columns
    rest = text[len(cut) :]
    assert not rest or sum({"猫": 2, "\u0301": 0}.get(c, 1) for c in cut + rest[0]) > columns


def test_a_plain_file_and_a_dumb_terminal_get_no_live_line(terminal: SimpleNamespace) -> None:
    assert LiveLine.fits(terminal.stream, {"TERM": "xterm"})
    assert not LiveLine.fits(terminal.stream, {"TERM": "dumb"})
    assert not LiveLine.fits(io.StringIO(), {"TERM": "xterm"})


def test_figures_of_the_last_minute() -> None:
    now = [7.5]
    recent = Recent(lambda: now[0])
    recent.on_tick()
    for second in range(200):
        for _ in range(3):
            recent.on_prediction(predicted(latency_ms=float(second + 1)))
        recent.on_unreadable(ImageError("x"))
        now[0] += 1.0
    figures = recent.figures()
    assert recent.frames == 600
    assert figures.seconds == pytest.approx(60, abs=1) and figures.fps == pytest.approx(3, rel=0.03)
    assert figures.latency_ms["max"] == 200 and figures.latency_ms["p50"] == pytest.approx(171, abs=4)
    assert figures.unreadable_share == pytest.approx(0.25)
    assert figures.counts == {"disc": figures.frames}
    now[0] += 100
    assert recent.figures().frames == 0 and recent.figures().fps == 0
