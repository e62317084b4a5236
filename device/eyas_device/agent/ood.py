"""Out-of-distribution detection in the frame loop: one predicted frame a second is measured."""

from __future__ import annotations

from time import monotonic

from eyas_device.agent.loop import FramePrediction, Listener
from eyas_device.bundle import Bundle
from eyas_device.errors import ImageError
from eyas_device.ood import OodJudge
from eyas_device.predict import Classifier

_INTERVAL_S = 1.0


class OodDetector(OodJudge, Listener):
    """Loop listener that measures one frame a second."""

    def __init__(self, bundle: Bundle | None = None) -> None:
        super().__init__(bundle)
        self._due = 0.0

    def on_model(self, classifier: Classifier) -> None:
        """Compare with the new model's reference."""
        self.use_reference(classifier.bundle)

    def on_prediction(self, predicted: FramePrediction) -> None:
        """Measure the frame if a second has passed."""
        if self._reference is None or (now := monotonic()) < self._due:
            return
        self._due = now + _INTERVAL_S
        try:
            self.measure(predicted.frame.pixels(self._spec))
        except ImageError:
            return  # the loop decoded it, so this cannot happen; and it is no reason to stop
