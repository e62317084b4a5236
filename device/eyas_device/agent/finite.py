"""Watch for a model that answers NaN or infinity: its arithmetic is broken, and every answer says nothing."""

from __future__ import annotations

import logging
from collections.abc import Callable

from eyas_device.agent.loop import FramePrediction, Listener
from eyas_device.predict import Classifier

MAX_NONFINITE = 10
"""Answers in a row that are not finite after which the model is reported as faulty."""
_log = logging.getLogger(__name__)


class FiniteWatch(Listener):
    """Loop listener that reports a model whose answers are not finite numbers, and its recovery."""

    def __init__(self) -> None:
        self.fault = ""
        """What is wrong, for people; empty while the answers are numbers."""
        self.on_change: Callable[[], None] = lambda: None
        """Called when `fault` changes."""
        self._count = 0
        self._model = ""

    def on_model(self, classifier: Classifier) -> None:
        """Start again with another model."""
        self._model = f"{classifier.artefact.name} on {classifier.runtime.name}"
        self._count = 0
        self._set("")

    def on_prediction(self, predicted: FramePrediction) -> None:
        """Count an answer that is not finite; a finite one ends the fault."""
        if predicted.prediction.finite:
            self._count = 0
            if self.fault:
                self._set("")
            return
        self._count += 1
        if self._count == MAX_NONFINITE:
            self._set(f"the model's answers are not finite numbers (NaN or infinity): {self._model}; run another model")

    def _set(self, fault: str) -> None:
        if fault == self.fault:
            return
        self.fault = fault
        if fault:
            _log.error(fault)
        else:
            _log.info("the model's answers are finite numbers again")
        self.on_change()
