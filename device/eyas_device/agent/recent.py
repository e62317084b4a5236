"""Predictions of the last minute, for the status line and for whoever asks the agent."""

from __future__ import annotations

import threading
import time
from collections import Counter, deque
from collections.abc import Callable

from eyas_device.agent.loop import FramePrediction, Listener
from eyas_device.errors import ImageError
from eyas_device.support.histogram import LogHistogram
from eyas_device.telemetry.local import Figures

SPAN_S = 60
"""Longest time that is looked back, seconds."""
_GROWTH = 1.02
_MAX_LABELS = 50


class _Second:
    def __init__(self, number: int) -> None:
        self.number = number
        self.frames = self.uncertain = self.unreadable = 0
        self.counts: Counter[str] = Counter()
        self.latency = LogHistogram(_GROWTH)


class Recent(Listener):
    """Loop listener that remembers the last minute, second by second: constant memory. Thread-safe."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.frames = self.uncertain = self.unreadable = 0
        """Predictions, uncertain ones, and unreadable frames since the start."""
        self.label = ""
        """The last prediction, with its confidence."""
        self._clock = clock
        self._started: float | None = None
        self._lock = threading.Lock()
        self._seconds: deque[_Second] = deque(maxlen=SPAN_S + 1)

    def on_prediction(self, predicted: FramePrediction) -> None:
        """Count the prediction."""
        prediction = predicted.prediction
        self.label = f"{prediction.label} {prediction.confidence:.2f}{'?' * prediction.uncertain}"
        self.frames += 1
        self.uncertain += prediction.uncertain
        with self._lock:
            second = self._second()
            second.frames += 1
            second.uncertain += prediction.uncertain
            second.counts[prediction.label] += 1
            second.latency.add(predicted.latency_ms)

    def on_unreadable(self, error: ImageError) -> None:
        """Count the frame."""
        self.unreadable += 1
        with self._lock:
            self._second().unreadable += 1

    def on_tick(self) -> None:
        """Start to count in the first round of the loop."""
        if self._started is None:
            self._started = self._clock()

    def figures(self, span_s: float = SPAN_S) -> Figures:
        """Return the figures of the last `span_s` seconds, at most `SPAN_S`."""
        now = self._clock()
        started = now if self._started is None else self._started
        first = max(int(now - span_s) + 1, int(started))
        latency, counts = LogHistogram(_GROWTH), Counter[str]()
        frames = uncertain = unreadable = 0
        with self._lock:
            for second in self._seconds:
                if second.number >= first:
                    frames += second.frames
                    uncertain += second.uncertain
                    unreadable += second.unreadable
                    counts += second.counts
                    latency.bins += second.latency.bins
                    latency.max_ms = max(latency.max_ms, second.latency.max_ms)
        seconds = max(now - max(float(first), started), 1e-3)
        return Figures(
            seconds=round(seconds, 3),
            frames=frames,
            fps=round(frames / seconds, 2),
            uncertain=uncertain,
            unreadable=unreadable,
            latency_ms=latency.summary(),
            counts=dict(counts.most_common(_MAX_LABELS)),
        )

    def _second(self) -> _Second:
        number = int(self._clock())
        if not self._seconds or self._seconds[-1].number != number:
            self._seconds.append(_Second(number))
        return self._seconds[-1]
