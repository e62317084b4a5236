"""Log lines that a device writes in a day, in hard conditions: each wears its SD card.

    python benchmarks/log_lines.py [--quick] [--json FILE]

A day at 30 frames a second passes through the agent's own log and log handler, on a clock that is moved by hand.
`--quick` takes 3 frames a second.
"""

from __future__ import annotations

import argparse
import io
import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np

from common import Figure, finish
from eyas_device.agent import output
from eyas_device.agent.loop import FramePrediction
from eyas_device.agent.output import RunLog
from eyas_device.agent.recent import Recent
from eyas_device.camera import Frame
from eyas_device.camera.reconnecting import CameraState, Condition
from eyas_device.errors import ImageError
from eyas_device.predict import Prediction
from eyas_device.support.logs import LogHandler
from eyas_host.support.machine import cpu_pressure

DAY_S = 86400
_BOUND = 200.0
_AWAY = "not connected: the broker cannot be reached ([Errno 111] Connection refused); trying again"
_FULL = "/var/lib/eyas/spool: database or disk is full; messages wait in memory, and the disk is tried again"


class Day:
    """A camera's day."""

    def __init__(self) -> None:
        self.now = 0.0
        self.camera, self.link = CameraState("delivering"), "connected"
        self.stream = io.StringIO()
        handler = LogHandler(self.stream, clock=self._clock)
        self._logger = logging.Logger("day", logging.INFO)
        self._logger.addHandler(handler)
        self._recent = Recent(self._clock)
        self.log = RunLog(
            self._recent, camera=lambda: self.camera, link=lambda: self.link, handler=handler, clock=self._clock
        )
        prediction = Prediction("ok", 0, 0.9, False, np.array([0.9, 0.1], dtype=np.float32), 1.0)
        frame = Frame(np.zeros((8, 8, 3), dtype=np.uint8), source="x", time=0.0, captured=0.0)
        self._predicted = FramePrediction(
            number=0,
            source="x",
            time=0.0,
            prediction=prediction,
            latency_ms=9.0,
            decode_ms=1.0,
            age_ms=1.0,
            frame=frame,
        )

    def lines(self, scenario: Callable[[Day, int], None], fps: int) -> int:
        """Lines of a day in which `scenario` is called with the number of each frame."""
        before, output.logger = output.logger, self._logger
        try:
            for number in range(DAY_S * fps):
                self.now += 1 / fps
                scenario(self, number)
                self.log.on_tick()
        finally:
            output.logger = before
        return self.stream.getvalue().count("\n")

    def answer(self) -> None:
        """A frame that is answered."""
        self._recent.on_prediction(self._predicted)

    def skip(self, text: str) -> None:
        """A frame that is unusable."""
        error = ImageError(text)
        self._recent.on_unreadable(error)
        self.log.on_unreadable(error)

    def change(self, condition: Condition, reason: str = "") -> None:
        """A state of the camera, which its callback reports if it is new."""
        if (condition, reason) != (self.camera.condition, self.camera.reason):
            self.camera = CameraState(condition, reason)
            self.log.on_camera_state(self.camera)

    def _clock(self) -> float:
        return self.now


def _dark(day: Day, number: int) -> None:
    day.change("black", "every value of the image is at most 4")
    day.skip(f"mjpeg:http://10.0.0.7/#{number}: black; is the lens covered, or the light off?")


def _garbage(day: Day, number: int) -> None:
    if number % 3:
        day.answer()
    else:
        day.skip(f"mjpeg:http://10.0.0.7/#{number}: a damaged JPEG of {number % 7919} bytes, without a frame header")


def _flapping(day: Day, number: int) -> None:
    if int(day.now) // 2 % 2:
        day.change("delivering")
        day.answer()
    else:
        day.change("lost", f"http://10.0.0.7:80/: connection refused, attempt {int(day.now)}")


def _away(day: Day, number: int) -> None:
    day.link = _AWAY if int(day.now) // 30 % 2 else "connecting"
    day.answer()


def _full(day: Day, number: int) -> None:
    day.link = f"connected; {_FULL}" if int(day.now) // 5 % 2 else f"{_AWAY}; {_FULL}"
    day.answer()


def _raising(day: Day, number: int) -> None:
    if day.now >= getattr(day, "due", 0.0):  # the loop pauses for a second after each error
        day.due = day.now + 1.0  # type: ignore[attr-defined]
        day.log.on_error(RuntimeError(f"failed to invoke node {number} at 0x{number:x}"))


SCENARIOS: dict[str, tuple[Callable[[Day, int], None], str]] = {
    "healthy": (lambda day, number: day.answer(), "frames are answered, the broker is there"),
    "dark": (_dark, "every frame is black"),
    "garbage": (_garbage, "every third frame is unreadable"),
    "flapping": (_flapping, "the camera comes and goes every two seconds"),
    "broker_away": (_away, "no connection, tried again and again"),
    "disk_full": (_full, "the spool's disk is full, and the broker comes and goes"),
    "model_raises": (_raising, "every inference fails"),
}


def main() -> None:
    """Let the days pass and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    before = cpu_pressure()
    figures = {
        f"lines_a_day_{name}": Figure(
            value=float(Day().lines(scenario, 3 if arguments.quick else 30)),
            unit="lines",
            bound=_BOUND,
            better="lower",
            note=note,
        )
        for name, (scenario, note) in SCENARIOS.items()
    }
    finish(figures, before, arguments.json)


if __name__ == "__main__":
    main()
