"""The time left for a chain of stages: estimates before, corrected by what was measured since."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence

from msgspec import Struct

from eyas_host.support.progress import Meter, about

_PRIOR = 0.1
"""Weight of the estimates against the measured times, as a fraction of all work: the first seconds say little."""
_TRUSTED_S = 15.0
"""A loop's own speed counts fully after this time."""
_MAX_CORRECTION = 5.0


class Step(Struct, frozen=True):
    """A part of a stage."""

    seconds: float
    """Estimated duration."""
    title: str = ""
    """The title of its meter; empty for what has none."""


class ChainClock:
    """Follows the stages and their meters, and estimates the time left for all of them.

    A loop's own speed replaces its estimate; what lies ahead is corrected by how the estimates did so far.
    """

    def __init__(self, stages: Mapping[str, Sequence[Step]], now: Callable[[], float] = time.monotonic) -> None:
        self._steps = [(stage, step) for stage, steps in stages.items() for step in steps]
        self._now = now
        self._at = -1
        self._stage = ""
        self._began = now()
        self._meter: Meter | None = None
        self._estimated = self._measured = 0.0
        """Seconds of the steps that are done: as estimated, and as they would have taken in full."""

    def enter(self, stage: str) -> None:
        """A stage begins; those before it need not run."""
        self._stage = stage
        self._go_to(next((i for i, (name, _) in enumerate(self._steps) if name == stage), self._at))

    def leave(self) -> None:
        """The stage has ended."""
        last = max((i for i, (name, _) in enumerate(self._steps) if name == self._stage), default=self._at)
        if self._at <= last:
            self._finish()
            self._go_to(last + 1)
        self._stage = ""

    def follow(self, meter: Meter | None) -> None:
        """A loop of the stage begins; None: the last one has ended."""
        if meter is None:
            if self._matches(self._at):
                self._finish()
                self._go_to(self._at + 1)
            self._meter = None
            return
        self._meter = meter
        at = next((i for i in range(max(self._at, 0), len(self._steps)) if self._matches(i)), None)
        if at is not None:
            if at != self._at:
                self._finish()
            self._go_to(at)
            self._meter = meter

    def estimated(self, stage: str) -> float:
        """Seconds that a stage was to take."""
        return sum(step.seconds for name, step in self._steps if name == stage)

    def left(self) -> float:
        """Seconds until the whole chain has ended."""
        if self._at >= len(self._steps):
            return 0.0
        ahead = self._correction() * sum(step.seconds for _, step in self._steps[max(self._at + 1, 0) :])
        return ahead + (self._left_of_step() if self._at >= 0 else 0.0)

    def line(self) -> str:
        """`about 12 min left in all; distill: student 12/90  loss 0.31`."""
        what = self._stage or (self._steps[max(self._at, 0)][0] if self._at < len(self._steps) else "finishing")
        if self._meter is not None:
            what += f": {self._meter.title} {self._meter.done}/{self._meter.total}  {self._meter.note}".rstrip()
        return f"about {about(left)} left in all; {what}" if (left := self.left()) else what

    def _matches(self, at: int) -> bool:
        """Whether the meter shows step `at`."""
        if self._meter is None or not 0 <= at < len(self._steps):
            return False
        stage, step = self._steps[at]
        return (stage, step.title) == (self._stage, self._meter.title)

    def _go_to(self, at: int) -> None:
        self._at, self._began, self._meter = at, self._now(), None

    def _finish(self) -> None:
        """Remember how long the step took, as if it had run in full."""
        fraction = self._done_fraction() if self._matches(self._at) else 1.0
        if 0 <= self._at < len(self._steps) and fraction > 0:
            self._estimated += self._steps[self._at][1].seconds
            self._measured += (self._now() - self._began) / fraction

    def _done_fraction(self) -> float:
        meter = self._meter
        return 0.0 if meter is None else (meter.done - meter.first) / max(1, meter.total - meter.first)

    def _correction(self) -> float:
        prior = _PRIOR * sum(step.seconds for _, step in self._steps)
        ratio = (self._measured + prior) / (self._estimated + prior)
        return min(max(ratio, 1 / _MAX_CORRECTION), _MAX_CORRECTION)

    def _left_of_step(self) -> float:
        estimate = self._steps[self._at][1].seconds * self._correction()
        elapsed, done = self._now() - self._began, self._done_fraction() if self._matches(self._at) else 0.0
        if not done:
            return max(estimate - elapsed, 0.1 * estimate)
        trust = min(1.0, elapsed / _TRUSTED_S + done)
        return (1 - done) * (trust * elapsed / done + (1 - trust) * estimate)
