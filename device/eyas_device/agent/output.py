"""Output of a running loop: a status line for people, JSON lines for programs."""

from __future__ import annotations

import sys
import time
import traceback
from pathlib import Path
from typing import TextIO

import msgspec

from eyas_device.agent.accuracy import Accuracy
from eyas_device.agent.loop import FramePrediction, Listener
from eyas_device.agent.reporter import Reporter
from eyas_device.camera.reconnecting import CameraState
from eyas_device.errors import ImageError
from eyas_device.predict import Classifier
from eyas_device.support.redact import redact
from eyas_device.telemetry.aggregate import LoopStats

_PERIOD_S = 1.0


class StatusLine(Listener):
    """Prints a status line once a second, in place on a terminal, and a summary at the end."""

    def __init__(self, stream: TextIO, reporter: Reporter | None = None) -> None:
        self._stream = stream
        self._reporter = reporter
        self._live = stream.isatty()
        self.begin()
        self._skipped, self._skipped_at = "", 0.0

    def begin(self) -> None:
        """Start to count."""
        self._stats = LoopStats()
        self._shown_at = time.monotonic()
        self._shown_frames = 0

    def on_prediction(self, predicted: FramePrediction) -> None:
        """Count the prediction; once a second, print the counts and this prediction."""
        stats, prediction = self._stats, predicted.prediction
        stats.add(prediction, predicted.latency_ms)
        now = time.monotonic()
        if now - self._shown_at < _PERIOD_S:
            return
        fps = (stats.frames - self._shown_frames) / (now - self._shown_at)
        self._shown_at, self._shown_frames = now, stats.frames
        fields = [
            f"frames {stats.frames}",
            f"{fps:.1f} fps",
            f"latency p50 {stats.latency.quantile(0.5):.1f} ms",
            f"{prediction.label} {prediction.confidence:.2f}{'?' * prediction.uncertain}",
            f"uncertain {stats.uncertain}",
        ]
        if stats.unreadable:
            fields.append(f"unreadable {stats.unreadable}")
        if self._reporter is not None:
            fields.append(f"mqtt {self._reporter.description}")
        line = "  ".join(fields)
        self._stream.write(f"\r{line}\x1b[K" if self._live else f"{line}\n")
        self._stream.flush()

    def on_unreadable(self, error: ImageError) -> None:
        """Count the frame and print why it was skipped; the same reason at most once a second."""
        self._stats.unreadable += 1
        now = time.monotonic()
        if str(error) == self._skipped and now - self._skipped_at < _PERIOD_S:
            return
        self._skipped, self._skipped_at = str(error), now
        self.say(f"skipped: {error}")

    def on_camera_state(self, state: CameraState) -> None:
        """Print the camera's new state."""
        self.say(str(state))

    def on_error(self, error: Exception) -> None:
        """Print the error and where it came from."""
        self.say(f"the loop goes on after an error: {error_with_place(error)}")

    def on_model(self, classifier: Classifier) -> None:
        """Print the active model."""
        self.say(str(classifier))

    def summary(self, accuracy: Accuracy | None = None) -> None:
        """Print the counts and latencies of the run."""
        stats, seconds = self._stats, self._stats.seconds()
        latency = stats.latency.summary()
        lines = [f"{stats.frames} frames in {seconds:.1f} s, {stats.frames / max(seconds, 1e-9):.1f} fps"]
        if latency:
            lines[0] += (
                f"; latency p50 {latency['p50']:.2f} ms, p90 {latency['p90']:.2f} ms, max {latency['max']:.2f} ms"
            )
            lines.append(", ".join(f"{label} {count}" for label, count in stats.counts.most_common()))
            lines[-1] += f"; uncertain {stats.uncertain}"
        if stats.unreadable:
            lines.append(f"{stats.unreadable} could not be decoded and were skipped")
        if accuracy is not None:
            lines.append(_accuracy_summary(accuracy))
        if self._reporter is not None:
            lines.append(f"mqtt: {self._reporter.description}")
        self._stream.write(self._start_of_line() + "\n".join(lines) + "\n")
        self._stream.flush()

    def say(self, text: str) -> None:
        """Print a line of its own."""
        self._stream.write(f"{self._start_of_line()}{redact(text)}\n")
        self._stream.flush()

    def _start_of_line(self) -> str:
        return "\r\x1b[K" if self._live else ""


class JsonLines(Listener):
    """Prints one JSON object per prediction on standard output, flushed at once, for pipes."""

    def on_prediction(self, predicted: FramePrediction) -> None:
        """Print the prediction."""
        prediction = predicted.prediction
        row = {
            "number": predicted.number,
            "source": redact(predicted.source),
            "time": predicted.time,
            "label": prediction.label,
            "confidence": round(prediction.confidence, 4),
            "uncertain": prediction.uncertain,
            "finite": prediction.finite,
            "probabilities": [round(float(p), 4) for p in prediction.probabilities],
            "latency_ms": round(predicted.latency_ms, 3),
        }
        sys.stdout.write(msgspec.json.encode(row).decode() + "\n")
        sys.stdout.flush()


class Scorer(Listener):
    """Compares each prediction with the class folder that its image lies in."""

    def __init__(self, accuracy: Accuracy) -> None:
        self._accuracy = accuracy

    def on_prediction(self, predicted: FramePrediction) -> None:
        """Count the prediction as correct or wrong."""
        self._accuracy.add(predicted.source, predicted.prediction.index)


def error_with_place(error: BaseException) -> str:
    """An error as one line, with the file and line that raised it."""
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
    return f"{' '.join(f'{type(error).__name__}: {error}'.split())}{place}"


def _accuracy_summary(accuracy: Accuracy) -> str:
    score = accuracy.score()
    if score is None:
        return "accuracy: not measured; no image lies in a folder that is named like a label"
    line = (
        f"accuracy {score.accuracy:.4f}, balanced accuracy {score.balanced_accuracy:.4f} "
        f"({score.images} labelled images)"
    )
    return line + (f"; {accuracy.unlabelled} lie in no folder named like a label" if accuracy.unlabelled else "")
