"""What a person, or the program behind a pipe, sees of a running loop."""

from __future__ import annotations

import sys
import time
from typing import TextIO

import msgspec

from eyas_device.agent.loop import FramePrediction, Listener
from eyas_device.agent.reporter import Reporter
from eyas_device.agent.stats import Accuracy, LoopStats
from eyas_device.camera.reconnecting import CameraState
from eyas_device.errors import ImageError
from eyas_device.predict import Classifier

_PERIOD_S = 1.0


class StatusLine(Listener):
    """One line a second and a summary at the end; rewritten in place on a terminal, a line each elsewhere."""

    def __init__(self, stream: TextIO, tally: LoopStats, link: Reporter | None = None) -> None:
        self._stream = stream
        self._tally = tally
        self._link = link
        self._live = stream.isatty()
        self._shown_at = time.monotonic()
        self._shown_frames = 0
        self._skipped, self._skipped_at = "", 0.0

    def answered(self, answer: FramePrediction) -> None:
        """Count the answer; once a second, show the figures and this answer."""
        self._tally.add(answer.prediction, answer.latency_ms, answer.age_ms)
        now = time.monotonic()
        if now - self._shown_at < _PERIOD_S:
            return
        fps = (self._tally.frames - self._shown_frames) / (now - self._shown_at)
        self._shown_at, self._shown_frames = now, self._tally.frames
        parts = [
            f"frames {self._tally.frames}",
            f"{fps:.1f} fps",
            f"latency p50 {self._tally.latencies.quantile(0.5):.1f} ms",
            f"{answer.prediction.label} {answer.prediction.confidence:.2f}{'?' * answer.prediction.uncertain}",
            f"uncertain {self._tally.uncertain}",
        ]
        if self._tally.unreadable:
            parts.append(f"unreadable {self._tally.unreadable}")
        if self._link is not None:
            parts.append(f"mqtt {self._link.state}")
        line = "  ".join(parts)
        self._stream.write(f"\r{line}\x1b[K" if self._live else f"{line}\n")
        self._stream.flush()

    def unreadable(self, reason: ImageError) -> None:
        """Count the image and say why it was skipped; the same reason again only once a second."""
        self._tally.unreadable += 1
        now = time.monotonic()
        if str(reason) == self._skipped and now - self._skipped_at < _PERIOD_S:
            return
        self._skipped, self._skipped_at = str(reason), now
        self.say(f"skipped: {reason}")

    def changed(self, camera: CameraState) -> None:
        """Say what the camera's state is now."""
        self.say(str(camera))

    def swapped(self, classifier: Classifier) -> None:
        """Say what answers."""
        self.say(str(classifier))

    def summary(self, accuracy: Accuracy | None = None) -> None:
        """The figures of the whole run."""
        tally, seconds = self._tally, self._tally.seconds()
        latency = tally.latencies.summary()
        lines = [f"{tally.frames} frames in {seconds:.1f} s, {tally.frames / max(seconds, 1e-9):.1f} fps"]
        if latency:
            lines[0] += (
                f"; latency p50 {latency['p50']:.2f} ms, p90 {latency['p90']:.2f} ms, max {latency['max']:.2f} ms"
            )
            lines.append(", ".join(f"{label} {count}" for label, count in tally.counts.most_common()))
            lines[-1] += f"; uncertain {tally.uncertain}"
        if tally.unreadable:
            lines.append(f"{tally.unreadable} could not be decoded and were skipped")
        if accuracy is not None:
            lines.append(_accuracy_line(accuracy))
        if self._link is not None:
            lines.append(f"mqtt: {self._link.state}")
        self._stream.write(self._fresh_line() + "\n".join(lines) + "\n")
        self._stream.flush()

    def say(self, text: str) -> None:
        """One line of its own."""
        self._stream.write(f"{self._fresh_line()}{text}\n")
        self._stream.flush()

    def _fresh_line(self) -> str:
        return "\r\x1b[K" if self._live else ""


class JsonLines(Listener):
    """One JSON object per answer on standard output, flushed at once, for pipes."""

    def answered(self, answer: FramePrediction) -> None:
        """Write the answer."""
        prediction = answer.prediction
        row = {
            "number": answer.number,
            "source": answer.source,
            "time": answer.time,
            "label": prediction.label,
            "confidence": round(prediction.confidence, 4),
            "uncertain": prediction.uncertain,
            "probabilities": [round(float(p), 4) for p in prediction.probabilities],
            "latency_ms": round(answer.latency_ms, 3),
        }
        sys.stdout.write(msgspec.json.encode(row).decode() + "\n")
        sys.stdout.flush()


class Scorer(Listener):
    """Compares each answer with the class folder that its image lies in."""

    def __init__(self, accuracy: Accuracy) -> None:
        self._accuracy = accuracy

    def answered(self, answer: FramePrediction) -> None:
        """Count the answer as right or wrong."""
        self._accuracy.add(answer.source, answer.prediction.index)


def _accuracy_line(accuracy: Accuracy) -> str:
    score = accuracy.score()
    if score is None:
        return "accuracy: not measured; no image lies in a folder that is named as a label"
    line = (
        f"accuracy {score.accuracy:.4f}, balanced accuracy {score.balanced_accuracy:.4f} "
        f"({score.images} labelled images)"
    )
    return line + (f"; {accuracy.unlabelled} lie in no folder named as a label" if accuracy.unlabelled else "")
