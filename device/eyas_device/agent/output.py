"""Output of a running loop: log lines, a live line on a terminal, JSON lines for programs, a summary at the end."""

from __future__ import annotations

import logging
import os
import sys
import time
import traceback
import unicodedata
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TextIO

from eyas_device.agent.accuracy import Accuracy
from eyas_device.agent.loop import FramePrediction, Listener
from eyas_device.agent.recent import Recent
from eyas_device.camera.reconnecting import CameraState
from eyas_device.errors import ImageError
from eyas_device.predict import Classifier
from eyas_device.support import logs
from eyas_device.support.redact import redact
from eyas_device.support.streams import output_of, to_json
from eyas_device.telemetry.aggregate import LoopStats

logger = logging.getLogger(__name__)

_TURN_S = 1.0
_SKIP_S = 10.0
_LIVE_SPAN_S = 10.0
_SUMMARIES_S = (10.0, 60.0, 600.0, 3600.0)
"""Pauses between the summary lines of the log; the last one is repeated."""
_CLEAR = "\r\x1b[K"
_COLUMNS = 80
"""Of a terminal that does not tell."""
_DIGITS = dict.fromkeys(map(ord, "0123456789"))
"""For `str.translate`: removes them."""


class RunLog(Listener):
    """Logs what happens in the loop, at most once a second, and a summary now and then: an hour apart after a while.

    States are compared each second rather than taken from callbacks alone, so that a reason that changes while the
    condition stays is logged too.
    """

    def __init__(
        self,
        recent: Recent,
        *,
        camera: Callable[[], CameraState | None] = lambda: None,
        link: Callable[[], str] = lambda: "",
        handler: logs.LogHandler | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Log what `recent` counts; `camera` and `link` return the present state of either, empty without one."""
        self._recent, self._camera, self._link, self._handler, self._clock = recent, camera, link, handler, clock
        self._known: dict[str, str] = {}
        """Subject -> its last state."""
        self._turn_at = clock()
        self._summary_at = self._turn_at + _SUMMARIES_S[0]
        self._skipped_for, self._skipped_at, self._skipped = "", self._turn_at, 0
        self._summaries, self._counted = 0, (self._turn_at, 0, 0, 0)

    def on_unreadable(self, error: ImageError) -> None:
        """Log why the frame was skipped; a reason that comes with each frame is only counted for a while."""
        now, reason = self._clock(), str(error)
        same = reason.translate(_DIGITS)
        self._skipped += 1
        if same != self._skipped_for or now - self._skipped_at >= _SKIP_S:
            logger.warning("skipped: %s", reason, extra={"times": self._skipped})
            self._skipped_for, self._skipped_at, self._skipped = same, now, 0

    def on_camera_state(self, state: CameraState) -> None:
        """Log the camera's new state."""
        if self._is_news("camera", str(state)):
            healthy = state.condition in ("delivering", "opening", "closed")
            logger.log(logging.INFO if healthy else logging.WARNING, "%s", state)

    def on_error(self, error: Exception) -> None:
        """Log the error and where it came from."""
        logger.error("the loop goes on after an error: %s", error_with_place(error))

    def on_model(self, classifier: Classifier) -> None:
        """Log the active model."""
        logger.info("%s", classifier, extra=logs.KEEP)

    def on_tick(self) -> None:
        """Log changed states and the summary that is due."""
        now = self._clock()
        if now - self._turn_at < _TURN_S:
            return
        self._turn_at = now
        state = self._camera()
        if state is not None:
            self.on_camera_state(state)
        link = self._link()
        if link and self._is_news("mqtt", link):
            logger.log(logging.INFO if link == "connected" else logging.WARNING, "mqtt %s", link)
        if logger.isEnabledFor(logging.DEBUG):
            logger.debug("%s", "  ".join(fields(self._recent, link)))
        if now >= self._summary_at:
            self._summaries += 1
            self._summary_at = now + _SUMMARIES_S[min(self._summaries, len(_SUMMARIES_S) - 1)]
            logger.info("%s", self._summary(now), extra=logs.KEEP)
        if self._handler is not None:
            self._handler.tick()

    def _is_news(self, subject: str, text: str) -> bool:
        """Whether a state differs from the one before in more than numbers."""
        before, self._known[subject] = self._known.get(subject), text
        return before is None or (text != before and logs.normalise(text) != logs.normalise(before))

    def _summary(self, now: float) -> str:
        """What happened since the last summary, and the states of camera and link now."""
        recent = self._recent
        then, frames, uncertain, unreadable = self._counted
        self._counted = now, recent.frames, recent.uncertain, recent.unreadable
        frames, seconds = recent.frames - frames, now - then
        texts = [f"{frames:,} frames in {logs.duration(seconds)}, {frames / seconds:.1f} fps"]
        latency = recent.figures().latency_ms
        if latency:
            texts[0] += f", latency p50 {latency['p50']:.1f} ms"
        texts.append(f"uncertain {recent.uncertain - uncertain:,}, unreadable {recent.unreadable - unreadable:,}")
        state = self._camera()
        texts += [str(state)] if state is not None else []
        texts += [f"mqtt {link}"] if (link := self._link()) else []
        return "; ".join(texts)


class LiveLine(Listener):
    """Shows counts, latency and the last prediction in one line of a terminal, in place, once a second."""

    def __init__(
        self, stream: TextIO, recent: Recent, log: logs.LogHandler, *, link: Callable[[], str] = lambda: ""
    ) -> None:
        """Show `recent` and `link` on a terminal; the lines of `log` take the place of the live line."""
        self._stream, self._recent, self._link = stream, recent, link
        self._shown_at = time.monotonic()
        log.start_of_line = _CLEAR

    @staticmethod
    def fits(stream: TextIO, environ: Mapping[str, str] = os.environ) -> bool:
        """Whether the stream is a terminal that can show it."""
        return stream.isatty() and environ.get("TERM", "dumb") != "dumb"

    def on_tick(self) -> None:
        """Show the line again if a second has passed."""
        now = time.monotonic()
        if now - self._shown_at < _TURN_S:
            return
        self._shown_at = now
        line = logs.clean("  ".join(fields(self._recent, self._link())))
        self._stream.write(f"{_CLEAR}{clip(line, _columns(self._stream) - 1)}")
        self._stream.flush()


class JsonLines(Listener):
    """Prints one JSON object per prediction on standard output, flushed at once, for pipes.

    A full disk costs lines, is logged once, and is tried again; a reader that has left ends the loop by `on_closed`.
    """

    def __init__(self, on_closed: Callable[[], None]) -> None:
        self._on_closed = on_closed
        self._problem = ""

    def on_prediction(self, predicted: FramePrediction) -> None:
        """Print the prediction."""
        prediction, stream = predicted.prediction, sys.stdout
        row = {
            "number": predicted.number,
            "source": _source(predicted.source),
            "time": predicted.time,
            "label": prediction.label,
            "confidence": round(prediction.confidence, 4),
            "uncertain": prediction.uncertain,
            "finite": prediction.finite,
            "probabilities": [round(float(p), 4) for p in prediction.probabilities],
            "latency_ms": round(predicted.latency_ms, 3),
        }
        try:
            stream.write(to_json(row, stream) + "\n")
            stream.flush()
        except BrokenPipeError:
            logger.info("the reader of standard output has closed it: the loop ends")
            self._on_closed()
            return
        output = output_of(stream)
        problem = str(output.error.strerror) if output is not None and output.error is not None else ""
        if output is not None and problem and problem != self._problem:
            logger.error("standard output: %s; predictions are not written until it works again", problem)
            output.reported = True
        elif self._problem and not problem:
            logger.info("standard output works again")
        self._problem = problem


class Scorer(Listener):
    """Compares each prediction with the class folder that its image lies in."""

    def __init__(self, accuracy: Accuracy) -> None:
        self._accuracy = accuracy

    def on_prediction(self, predicted: FramePrediction) -> None:
        """Count the prediction as correct or wrong."""
        self._accuracy.add(predicted.source, predicted.prediction.index)


class Summary(Listener):
    """Counts and latencies of a whole run."""

    def __init__(self) -> None:
        self._stats = LoopStats()

    def begin(self) -> None:
        """Start to count."""
        self._stats = LoopStats()

    def on_prediction(self, predicted: FramePrediction) -> None:
        """Count the prediction."""
        self._stats.add(predicted.prediction, predicted.latency_ms)

    def on_unreadable(self, error: ImageError) -> None:
        """Count the frame."""
        self._stats.unreadable += 1

    def lines(self, accuracy: Accuracy | None = None) -> list[str]:
        """The summary, one text a line."""
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
        return lines


def fields(recent: Recent, link: str) -> list[str]:
    """The fields of the live line, the most important ones first."""
    figures = recent.figures(_LIVE_SPAN_S)
    texts = [f"frames {recent.frames}", f"{figures.fps:.1f} fps"]
    if figures.latency_ms:
        texts.append(f"latency p50 {figures.latency_ms['p50']:.1f} ms")
    if recent.label:
        texts.append(recent.label)
    texts.append(f"uncertain {recent.uncertain}")
    if recent.unreadable:
        texts.append(f"unreadable {recent.unreadable}")
    if link:
        texts.append(f"mqtt {link}")
    return texts


def clip(text: str, columns: int) -> str:
    """Cut `text` to at most `columns` columns of a terminal, where East Asian characters take two."""
    width = 0
    for position, character in enumerate(text):
        width += 0 if unicodedata.combining(character) else 1 + (unicodedata.east_asian_width(character) in "WF")
        if width > columns:
            return text[:position]
    return text


def error_with_place(error: BaseException) -> str:
    """An error as one line, with the file and line that raised it."""
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
    return f"{' '.join(f'{type(error).__name__}: {error}'.split())}{place}"


def _source(source: str) -> str:
    """A source without passwords; bytes of a file's name that are no UTF-8 are escaped."""
    return redact(source.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace"))


def _columns(stream: TextIO) -> int:
    try:
        columns = os.get_terminal_size(stream.fileno()).columns
    except (OSError, ValueError):
        columns = 0
    return columns or _COLUMNS


def _accuracy_summary(accuracy: Accuracy) -> str:
    score = accuracy.score()
    if score is None:
        return "accuracy: not measured; no image lies in a folder that is named like a label"
    line = (
        f"accuracy {score.accuracy:.4f}, balanced accuracy {score.balanced_accuracy:.4f} "
        f"({score.images} labelled images)"
    )
    return line + (f"; {accuracy.unlabelled} lie in no folder named like a label" if accuracy.unlabelled else "")
