"""A slot's model is on probation until it has run for a while: until then, each attempt to run it counts."""

from __future__ import annotations

import time
from collections.abc import Callable

from eyas_device.agent.loop import FramePrediction, Listener
from eyas_device.updates.slots import Slots

HEALTHY_FRAMES = 500
"""Predictions after which a model is healthy."""
HEALTHY_S = 60.0
"""Time in the loop after which it is healthy, with or without frames: a dark or absent camera is no fault of it."""


class Probation(Listener):
    """Loop listener that forgets the attempts to run a slot once its model is healthy."""

    def __init__(self, slots: Slots, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._slots, self._clock = slots, clock
        self._slot = ""
        self._since = 0.0
        self._frames = 0

    def begin(self, slot: str) -> None:
        """Start with a model that was just loaded from `slot`; empty for a bundle outside of the slots."""
        self._slot, self._since, self._frames = slot, self._clock(), 0

    def stopped(self) -> None:
        """The agent stops on purpose: this attempt does not count against the slot."""
        self._end(healthy=False)

    def on_prediction(self, predicted: FramePrediction) -> None:
        """Count the prediction."""
        self._frames += 1
        if self._slot and self._frames >= HEALTHY_FRAMES:
            self._end(healthy=True)

    def on_tick(self) -> None:
        """End the probation when it has lasted long enough."""
        if self._slot and self._clock() - self._since >= HEALTHY_S:
            self._end(healthy=True)

    def _end(self, *, healthy: bool) -> None:
        if self._slot:
            self._slots.end_attempt(self._slot, healthy=healthy)
            self._slot = ""
