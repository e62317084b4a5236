"""Probation of the model in a slot: until it is over, each attempt to run the slot counts.

A model without a signed release is through when it has run for a while. A signed one has to keep to its release's
bounds on real frames, in comparison with the model of the other slot; see `eyas_device.updates.probation`.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from contextlib import suppress

import msgspec

from eyas_device.agent.loop import FramePrediction, Listener
from eyas_device.agent.shadow import OnDisagreement, Shadow
from eyas_device.support.closing import Closing
from eyas_device.updates.activate import ActiveModel
from eyas_device.updates.probation import Assessment, assess, begin, ended, write_verdict
from eyas_device.updates.records import Lock, Verdict, short_reason
from eyas_device.updates.release import Release
from eyas_device.updates.slots import Slots, other_slot

logger = logging.getLogger(__name__)

HEALTHY_FRAMES = 500
"""Predictions after which a model is healthy."""
HEALTHY_S = 60.0
"""Time in the loop after which it is healthy, with or without frames: a dark or absent camera is no fault of it."""
SAVE_S = 30.0
"""Time after which the counts of a probation are written down: a kill or a power cut costs no more of them."""


class Trial(Closing):
    """A signed release that has to prove itself: what was counted, and the model that it is compared with.

    While it lasts, nothing is installed over the slot of the previous model.
    """

    def __init__(self, slots: Slots, slot: str, release: Release, verdict: Verdict) -> None:
        self.slot = slot
        self.bounds = release.probation
        self.verdict = verdict
        """As it was written last."""
        self.tally = verdict.tally
        self.previous = _previous(slots, slot)
        """Slot of the previous model; empty if that is not good."""
        self.compares = bool(self.previous) and self.bounds.shadow_every > 0
        """Whether there is, or will soon be, a previous model to compare with."""
        self.shadow: Shadow | None = None
        self.assessment = Assessment("running")
        """The loop does not touch shadow and tally any more when it says how the probation ended."""
        self._slots = slots
        self._lock: Lock | None = None
        if self.previous:
            with suppress(OSError):  # a disk that takes no lock file keeps no model from running
                self._lock = slots.hold(self.previous)

    @property
    def running(self) -> bool:
        """Whether the probation has not ended."""
        return self.assessment.state == "running"

    def wants(self, slot: str) -> bool:
        """Whether the model of `slot` should be loaded, to compare with."""
        return self.running and self.compares and self.shadow is None and slot == self.previous

    def follow(self, previous: ActiveModel, new: ActiveModel, on_disagreement: OnDisagreement) -> None:
        """Compare with `previous` from now on; it is the trial's until `take_previous`."""
        self.verdict = msgspec.structs.replace(self.verdict, previous=previous.record.model)
        self.shadow = Shadow(previous, new, self.bounds, self.tally, on_disagreement)

    def give_up_comparing(self, reason: str) -> None:
        """Judge errors alone from now on."""
        logger.warning("probation: the answers are not compared: %s", reason)
        self.compares = False
        self._drop_shadow()

    def take_previous(self) -> ActiveModel | None:
        """Hand over the previous model, open as it is; None if it is not loaded."""
        shadow, self.shadow = self.shadow, None
        return shadow.previous if shadow is not None else None

    def save(self) -> None:
        """Write down what was counted so far, and how it ended."""
        if self.running:
            self.verdict = msgspec.structs.replace(self.verdict, tally=self.tally)
        elif not self.verdict.ended:
            self.verdict = ended(self.verdict, self.assessment, self.tally, now=time.time())
        write_verdict(self._slots, self.slot, self.verdict)

    def close(self) -> None:
        """Free the previous model and its slot."""
        self._drop_shadow()
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def _drop_shadow(self) -> None:
        shadow, self.shadow = self.shadow, None
        if shadow is not None:
            shadow.close()


class Probation(Listener):
    """Loop listener that counts for the probation of a slot's model, and ends it."""

    def __init__(self, slots: Slots, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.trial: Trial | None = None
        """The signed release that has to prove itself; None if the model owes no proof (any more)."""
        self.on_end: Callable[[Trial], None] = lambda trial: None
        """Called in the loop with a trial that has ended; must not block."""
        self.on_save: Callable[[Trial], None] = lambda trial: None
        """Called in the loop when a trial's counts should be written down; must not block."""
        self.is_paused: Callable[[], bool] = lambda: False
        """Whether the loop is paused: that is no time on probation."""
        self._slots, self._clock = slots, clock
        self._slot = ""
        self._frames = self._since = self._ticked = self._saved = 0.0
        self._settled = False

    def save(self, trial: Trial) -> None:
        """Write down a trial's counts; not for the loop, it waits for the disk."""
        trial.save()
        if not self._settled and self._clock() - self._since >= HEALTHY_S:
            self._settled = True
            self._slots.settle_attempt(trial.slot)

    def prepare(self, slot: str) -> Trial | None:
        """The trial that a model from `slot` is on, continued if it has begun; None if it owes no proof. Any thread."""
        running = self.trial
        found = begin(self._slots, slot, now=time.time()) if slot else None
        if found is None:
            return None
        release, verdict = found
        if running is not None and running.slot == slot and running.verdict.manifest_sha256 == verdict.manifest_sha256:
            return running
        trial = Trial(self._slots, slot, release, verdict)
        trial.save()
        return trial

    def begin(self, slot: str, trial: Trial | None = None) -> None:
        """Start with a model that was just loaded from `slot`; empty for a bundle outside of the slots."""
        if self.trial is not None and self.trial is not trial:
            self.trial.close()
        self._slot, self.trial, self._frames, self._settled = slot, trial, 0, False
        self._since = self._ticked = self._saved = self._clock()

    def stopped(self) -> None:
        """The agent stops on purpose: this attempt does not count against the slot."""
        if self.trial is not None:
            self.trial.save()
        self._end(healthy=False)

    def close(self) -> None:
        """Free the previous model."""
        if self.trial is not None:
            self.trial.close()

    def passed(self) -> None:
        """The trial's model has proved itself: forget the attempts to run it, and the previous model."""
        if self.trial is not None:
            self.trial.close()
        self.trial = None
        self._end(healthy=True)

    def on_prediction(self, predicted: FramePrediction) -> None:
        """Count the prediction; let the previous model answer a frame now and then."""
        self._frames += 1
        trial = self.trial
        if trial is None:
            if self._slot and self._frames >= HEALTHY_FRAMES:
                self._end(healthy=True)
            return
        if not trial.running:
            return
        trial.tally.frames += 1
        trial.tally.errors += not predicted.prediction.finite
        if trial.shadow is not None and trial.tally.frames % trial.bounds.shadow_every == 0:
            try:
                trial.shadow.compare(predicted)
            except Exception as error:  # of the previous model: no fault of the new one
                trial.give_up_comparing(short_reason(error))
        self._assess(trial)

    def on_model_error(self, error: Exception) -> None:
        """Count a prediction that failed."""
        if self.trial is not None and self.trial.running:
            self.trial.tally.frames += 1
            self.trial.tally.errors += 1
            self._assess(self.trial)

    def on_tick(self) -> None:
        """End the probation when it has lasted long enough."""
        now, trial = self._clock(), self.trial
        healthy = now - self._since >= HEALTHY_S
        if trial is None:
            if self._slot and healthy:
                self._end(healthy=True)
            return
        if not trial.running:
            return
        if not self.is_paused():
            trial.tally.seconds += now - self._ticked
        self._ticked = now
        if now - self._saved >= SAVE_S:
            self._saved = now
            self.on_save(trial)
        if trial.tally.seconds >= trial.bounds.seconds:
            self._assess(trial)

    def _assess(self, trial: Trial) -> None:
        assessment = assess(trial.tally, trial.bounds, compared=trial.compares)
        if assessment.state != "running":
            trial.assessment = assessment
            self.on_end(trial)

    def _end(self, *, healthy: bool) -> None:
        if self._slot:
            self._slots.end_attempt(self._slot, healthy=healthy, proven=healthy and self._frames > 0)
            self._slot = ""


def _previous(slots: Slots, slot: str) -> str:
    """The slot to compare with and to go back to; empty if its model is not good."""
    other = other_slot(slot)
    bad = slots.problem(other) or slots.refusal(other) or slots.has_failed(other)
    return "" if bad else other
