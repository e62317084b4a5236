"""The model that an agent runs: opened at the start, replaced by a reload, recorded for other programs."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path

import msgspec

from eyas_device.agent.loop import FramePrediction, Listener, Loop
from eyas_device.agent.probation import Probation
from eyas_device.agent.systemd import ENGINE_S, LOAD_S, Notifier
from eyas_device.config import Config
from eyas_device.predict import Classifier
from eyas_device.support.closing import Closing
from eyas_device.support.logs import KEEP
from eyas_device.updates.activate import ActiveModel, open_model
from eyas_device.updates.records import AgentFile, AgentRecord, short_reason
from eyas_device.updates.slots import Slots

logger = logging.getLogger(__name__)

_POLL_S = 0.1
Reread = Callable[[], Config]
"""Reads the configuration again."""


class ModelSwitch(Closing, Listener):
    """Opens the agent's models one at a time, swaps them into the loop, and says which runs and what was refused."""

    def __init__(self, config: Config, notifier: Notifier) -> None:
        self.config = config
        """The configuration that is in force."""
        self.on_change: Callable[[], None] = lambda: None
        """Called when another model runs or is refused."""
        self.on_config: Callable[[Config], None] = lambda config: None
        """Called with each configuration that was read again and whose model runs."""
        self.crashed = False
        """Whether the agent ends with an unexpected error, which counts against the slot."""
        self._notifier = notifier
        state = Path(config.device.state)
        self._file = AgentFile(state)
        self.record = AgentRecord()
        """What runs."""
        self._probation = Probation(Slots(state))
        self._active: ActiveModel | None = None
        self._next: ActiveModel | None = None
        self._loaded = 0.0
        self._taken = threading.Event()

    @property
    def holds_state(self) -> bool:
        """Whether no other agent has the state folder, and there is one."""
        return self._file.held

    def open_first(self, *, required: bool) -> Classifier | None:
        """Open the first model; None if none is good, unless it is `required`: then raises like `open_model`."""
        self._loaded = time.monotonic()
        try:
            self._next = self._open(self.config)
        except Exception as error:
            if required:
                raise
            self._refused(error, "no model runs")
            return None
        self._probation.begin(self._next.record.slot)
        return self._next.classifier

    def reload(self, loop: Loop, reread: Reread) -> None:
        """Open the model that is configured now and swap it in; otherwise the present one stays. Returns when done."""
        self._notifier.reloading()
        self._loaded = time.monotonic()
        try:
            config = reread()
            opened = self._open(config)
        except Exception as error:  # whatever it is, the present model goes on and systemd must not wait
            self._notifier.reloaded()
            self._refused(error, "no model runs" if loop.classifier is None else "the model stays as it is")
            return
        self._taken.clear()
        self._next = opened
        if loop.swap(opened.classifier):
            while not (self._taken.wait(_POLL_S) or loop.ended):
                pass  # the next reload must not load a third model
        self._apply(config)

    def on_model(self, classifier: Classifier) -> None:
        """Record the model that runs from now on; release the slot of the one before."""
        if self._next is None or self._next.classifier is not classifier:
            return
        previous, self._active, self._next = self._active, self._next, None
        if previous is not None:
            previous.release()
            self._probation.begin(self._active.record.slot)
        self._set_record(msgspec.structs.replace(self._active.record, loaded=self._loaded))
        record = self.record
        logger.info("%s was selected: %s", record.artefact, record.selection, extra=KEEP)
        refused = f"{record.refused_model} was refused: {record.refused_reason}" if record.refused_model else ""
        if refused:
            logger.error("%s", refused, extra=KEEP)
        self._notifier.problem(refused)
        self._taken.set()

    def on_prediction(self, predicted: FramePrediction) -> None:
        """Count the prediction for the model's probation."""
        self._probation.on_prediction(predicted)

    def on_tick(self) -> None:
        """End the model's probation when it has lasted long enough."""
        self._probation.on_tick()

    def close(self) -> None:
        """Free the models and the slots; without a crash, the last attempt does not count against its slot."""
        for model in (self._active, self._next):
            if model is not None:
                model.close()
        if not self.crashed:
            self._probation.stopped()
        self._file.close()

    def _open(self, config: Config) -> ActiveModel:
        return open_model(config, counted=True, on_load=self._extend)

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
