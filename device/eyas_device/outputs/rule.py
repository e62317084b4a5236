"""The rule of an output: which predictions count, and when they switch it.

While the output is off, a prediction counts for switching on if it has one of the labels with at least `confidence`.
While it is on, a prediction with at least `confidence - hysteresis` still holds it. `hits` of the last `of` frames that
count switch it on, and as many that do not hold it switch it off again, after `min_on_s` at the earliest. Because
`hits` is more than half of `of`, both can never be true at once, and a change takes at most `of` frames.
"""

from __future__ import annotations

from collections import Counter, deque
from typing import NamedTuple

from eyas_device.config import OutputSection


class _Frame(NamedTuple):
    label: str
    counts: bool
    """Whether it counts for switching on."""
    holds: bool
    """Whether it keeps an output on."""


class Debouncer:
    """State machine of one output: undecided, on or off."""

    def __init__(self, rule: OutputSection) -> None:
        self.on: bool | None = None
        """None: undecided, too few frames since the start or the last `reset`."""
        self.label = ""
        """On: the debounced label; otherwise the label of the last prediction."""
        self.confidence = 0.0
        """Confidence of the last prediction with that label."""
        self._rule = rule
        self._frames: deque[_Frame] = deque(maxlen=rule.of)
        self._on_since = 0.0

    def add(self, label: str, confidence: float, *, uncertain: bool, now: float) -> None:
        """Take the prediction of a frame at `now`, monotonic seconds."""
        rule = self._rule
        named = (not rule.labels or label in rule.labels) and (rule.uncertain or not uncertain)
        counts = named and confidence >= rule.confidence
        holds = named and confidence >= rule.confidence - rule.hysteresis
        self._frames.append(_Frame(label, counts, holds))
        if self.on:
            released = sum(not frame.holds for frame in self._frames)
            if released >= rule.hits and now - self._on_since >= rule.min_on_s:
                self.on = False
        else:
            counted = sum(frame.counts for frame in self._frames)
            if counted >= rule.hits:
                self.on, self._on_since, self.label = True, now, ""
            elif len(self._frames) - counted >= rule.hits:
                self.on = False
        self._name(label, confidence)

    def reset(self) -> None:
        """Forget all frames: what was seen before a pause decides nothing after it."""
        self.on, self.label, self.confidence = None, "", 0.0
        self._frames.clear()

    def _name(self, label: str, confidence: float) -> None:
        """Update the label: while on, another one needs `hits` frames of its own."""
        if not self.on:
            self.label, self.confidence = label, confidence
            return
        held = Counter(frame.label for frame in self._frames if frame.holds)
        if held:
            best, count = held.most_common(1)[0]
            if not self.label or count >= self._rule.hits:
                self.label = best
        if label == self.label:
            self.confidence = confidence
