"""The model that an agent runs: opened at the start, replaced by a reload, recorded for other programs."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path

import msgspec

from eyas_device.agent.loop import FramePrediction, Listener, Loop
from eyas_device.agent.probation import Probation, Trial
from eyas_device.agent.shadow import OnDisagreement
from eyas_device.agent.systemd import ENGINE_S, LOAD_S, Notifier
from eyas_device.config import Config
from eyas_device.predict import Classifier, Prediction
from eyas_device.support.closing import Closing
from eyas_device.support.logs import KEEP
from eyas_device.updates.activate import ActiveModel, open_model, open_slot
from eyas_device.updates.probation import Assessment, begin, describe_tally, ended, write_verdict
from eyas_device.updates.records import AgentFile, AgentRecord, Verdict, short_reason
from eyas_device.updates.slots import NAMES, SlotError, Slots

logger = logging.getLogger(__name__)

_POLL_S = 0.1
Reread = Callable[[], Config]
"""Reads the configuration again."""


class ModelSwitch(Closing, Listener):
    """Opens the agent's models one at a time, swaps them into the loop, and says which runs and what was refused.

    A signed release that has not passed its probation runs on trial: the model before it stays loaded beside it, to be
    compared with, and is swapped in again if the new one fails.
    """

    def __init__(self, config: Config, notifier: Notifier) -> None:
        self.config = config
        """The configuration that is in force."""
        self.on_change: Callable[[], None] = lambda: None
        """Called when another model runs or is refused, or a probation has ended."""
        self.on_arm: Callable[[], None] = lambda: None
        """Called when `arm` has changed while the same model runs on; any thread."""
        self.on_disagreement: OnDisagreement = lambda predicted, previous: None
        """Called in the loop with a prediction on trial, and that of the previous model, whose labels differ."""
        self.on_config: Callable[[Config], None] = lambda config: None
        """Called with each configuration that was read again and whose model runs."""
        self.submit: Callable[[Callable[[], object]], None] = lambda job: None
        """Runs a job in the thread that `reload` is called in."""
        self.crashed = False
        """Whether the agent ends with an unexpected error, which counts against the slot."""
        self._notifier = notifier
        state = Path(config.device.state)
        self._file = AgentFile(state)
        self.record = AgentRecord()
        """What runs."""
        self._slots = Slots(state)
        self.probation = Probation(self._slots)
        """The last listener that a prediction should go to: it lets the previous model predict, too."""
        self._verdict = self._newest_verdict()
        self._active: ActiveModel | None = None
        self._next: tuple[ActiveModel, Trial | None] | None = None
        self._loaded = 0.0
        self._taken = threading.Event()

    @property
    def holds_state(self) -> bool:
        """Whether no other agent has the state folder, and there is one."""
        return self._file.held

    @property
    def verdict(self) -> Verdict | None:
        """How the newest signed release does, or did, on probation; None without one."""
        trial = self.probation.trial
        return self._verdict if trial is None else trial.verdict

    @property
    def progress(self) -> str:
        """What was counted on the present probation, for people; empty without one."""
        trial = self.probation.trial
        return describe_tally(trial.tally) if trial is not None and trial.running else ""

    @property
    def arm(self) -> str:
        """Arm of the windows: `candidate` for a signed release on probation, else empty."""
        trial = self.probation.trial
        return "candidate" if trial is not None and trial.running else ""

    def open_first(self, *, required: bool) -> Classifier | None:
        """Open the first model; None if none is good, unless it is `required`: then raises like `open_model`."""
        self._loaded = time.monotonic()
        try:
            model, trial = self._open(self.config)
        except Exception as error:
            if required:
                raise
            self._refused(error, "no model runs")
            return None
        self._next = model, trial
        self.probation.begin(model.record.slot, trial)
        return model.classifier

    def connect(self, loop: Loop, reread: Reread) -> None:
        """Swap models into `loop` from now on."""
        loop.on_replaced = lambda classifier: None  # `on_model` closes it, or keeps it to be compared with
        self.probation.is_paused = lambda: loop.paused
        self.probation.on_end = lambda trial: self.submit(lambda: self._settle(trial, loop, reread))
        self.probation.on_save = lambda trial: self.submit(lambda: self.probation.save(trial))

    def reload(self, loop: Loop, reread: Reread) -> None:
        """Open the model that is configured now and swap it in; otherwise the present one stays. Returns when done."""
        self._notifier.reloading()
        self._loaded = time.monotonic()
        try:
            config = reread()
            model, trial = self._open(config)
        except Exception as error:  # whatever it is, the present model goes on and systemd must not wait
            self._notifier.reloaded()
            self._refused(error, "no model runs" if loop.classifier is None else "the model stays as it is")
            return
        self._swap(loop, model, trial)
        self._apply(config)

    def on_model(self, classifier: Classifier) -> None:
        """Record the model that runs from now on; free the one before, or compare with it."""
        if self._next is None or self._next[0].classifier is not classifier:
            return
        previous = self._active
        (self._active, trial), self._next = self._next, None
        if previous is not None:
            if trial is not None and trial.wants(previous.record.slot):
                trial.follow(previous, self._active, self._disagreed)
            else:
                previous.close()
            self.probation.begin(self._active.record.slot, trial)
        self._set_record(msgspec.structs.replace(self._active.record, loaded=self._loaded))
        record = self.record
        logger.info("%s was selected: %s", record.artefact, record.selection, extra=KEEP)
        if trial is not None:
            logger.info("%s is on probation until it has kept to its bounds", record.model, extra=KEEP)
            if trial.wants(trial.previous):
                self.submit(lambda: self._load_previous(trial))
        refused = f"{record.refused_model} was refused: {record.refused_reason}" if record.refused_model else ""
        if refused:
            logger.error("%s", refused, extra=KEEP)
        self._notifier.problem(refused)
        self._taken.set()

    def close(self) -> None:
        """Free the models and the slots; without a crash, the last attempt does not count against its slot."""
        if not self.crashed:
            self.probation.stopped()
        self.probation.close()
        for model in (self._active, self._next[0] if self._next is not None else None):
            if model is not None:
                model.close()
        self._file.close()

    def _open(self, config: Config) -> tuple[ActiveModel, Trial | None]:
        """Open the model that is configured, and begin or continue its trial if it has to prove itself."""
        model = open_model(config, counted=True, on_load=self._extend)
        if not self.holds_state:
            return model, None
        if model.record.refused_reason:
            self._fail_refused(model.record)
        return model, self.probation.prepare(model.record.slot)

    def _swap(self, loop: Loop, model: ActiveModel, trial: Trial | None) -> None:
        """Swap a model into the loop and wait until it runs."""
        self._taken.clear()
        self._next = model, trial
        if loop.swap(model.classifier):
            while not (self._taken.wait(_POLL_S) or loop.ended):
                pass  # the next reload must not load a third model

    def _load_previous(self, trial: Trial) -> None:
        """Load the model that a trial compares with, after a restart."""
        new = self._active
        if new is None or trial is not self.probation.trial or not trial.wants(trial.previous):
            return
        try:
            trial.follow(open_slot(self.config, self._slots, trial.previous), new, self._disagreed)
        except Exception as error:  # whatever it is, the new model can be judged by its errors
            trial.give_up_comparing(short_reason(error))

    def _settle(self, trial: Trial, loop: Loop, reread: Reread) -> None:
        """Write down how a trial ended, and go back to the previous model if it failed."""
        if trial is not self.probation.trial:
            return  # another model was loaded meanwhile
        if trial.assessment.state == "failed" and not trial.previous:
            stays = "there is no other model to go back to, it stays"
            trial.assessment = Assessment("failed", f"{trial.assessment.reason}; {stays}")
        trial.save()
        self._verdict = trial.verdict
        model, reason = trial.verdict.model, trial.assessment.reason
        if trial.assessment.state == "passed":
            logger.info("%s passed its probation: %s", model, reason, extra=KEEP)
            self.probation.passed()
            self.on_arm()
            self.on_change()
            return
        reason = f"failed on probation: {reason}"
        if not trial.previous:
            logger.error("%s %s", model, reason, extra=KEEP)
            self._notifier.problem(f"{model} {reason}")
            self._set_record(msgspec.structs.replace(self.record, refused_model=model, refused_reason=reason))
            return
        previous = trial.take_previous()
        if previous is not None:
            previous.record = msgspec.structs.replace(previous.record, refused_model=model, refused_reason=reason)
            self._loaded = time.monotonic()
            self._swap(loop, previous, None)
        self._slots.refuse(trial.slot, reason)
        if previous is None:
            self.reload(loop, reread)
        self._point_to_previous()

    def _fail_refused(self, record: AgentRecord) -> None:
        """Note that the release in the current slot failed before it came to frames: another slot's model runs."""
        linked = self._slots.linked()
        found = begin(self._slots, linked, now=time.time()) if linked and linked != record.slot else None
        if found is not None and linked:
            _, verdict = found
            failed = Assessment("failed", record.refused_reason)
            self._verdict = ended(verdict, failed, verdict.tally, now=time.time())
            write_verdict(self._slots, linked, self._verdict)
            self._point_to_previous()

    def _point_to_previous(self) -> None:
        """Make the previous model's slot the current one; what failed comes last also where that cannot be written."""
        try:
            self._slots.roll_back()
        except SlotError as error:
            logger.warning("%s", error)

    def _newest_verdict(self) -> Verdict | None:
        verdicts = [verdict for name in NAMES if (verdict := self._slots.verdict(name)) is not None]
        return max((verdict for verdict in verdicts if verdict.ended), key=lambda verdict: verdict.ended, default=None)

    def _disagreed(self, predicted: FramePrediction, previous: Prediction) -> None:
        self.on_disagreement(predicted, previous)

    def _extend(self, runtime: str) -> None:
        """Tell systemd that a load may take long."""
        self._notifier.extend(ENGINE_S if runtime == "onnx-tensorrt" else LOAD_S)

    def _refused(self, error: Exception, consequence: str) -> None:
        reason = short_reason(error)
        requested = bool(self.record.model)  # not tried again by itself
        logger.error("%s: %s", consequence, reason, extra=KEEP if requested else None)
        self._notifier.problem(f"{consequence}: {reason}")
        record = msgspec.structs.replace(self.record, problem=reason, loaded=self._loaded)
        if not record.model:
            record = msgspec.structs.replace(record, refused_reason=reason)
        self._set_record(record)

    def _set_record(self, record: AgentRecord) -> None:
        self.record = record
        self._file.write(record)
        self.on_change()

    def _apply(self, config: Config) -> None:
        """Use the configuration that was read again, and say what takes effect at the next start only."""
        names = ("device", "camera", "telemetry", "privacy", "output")
        changed = [f"[{name}]" for name in names if getattr(config, name) != getattr(self.config, name)]
        if changed:
            logger.warning("%s changed: restart the agent for that", ", ".join(changed), extra=KEEP)
        self.config = config
        self.on_config(config)
