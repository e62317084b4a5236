"""Out-of-distribution detection in the frame loop: one predicted frame a second is measured."""

from __future__ import annotations

import logging
from collections.abc import Callable
from time import monotonic

from eyas_device.agent.loop import FramePrediction, Listener
from eyas_device.bundle import Bundle
from eyas_device.errors import ImageError
from eyas_device.ood import OodJudge
from eyas_device.predict import Classifier

_INTERVAL_S = 1.0
_QUIET_S = 60.0
"""After a report, another reason for the same judgement is reported no sooner."""
_log = logging.getLogger(__name__)


class OodDetector(OodJudge, Listener):
    """Loop listener that measures one frame a second of a live camera, and every frame of a folder or a video."""

    def __init__(self, bundle: Bundle | None = None) -> None:
        super().__init__(bundle)
        self.interval_s = _INTERVAL_S
        """Time from a measured frame to the next; 0: every frame, for a source that is read as fast as it goes."""
        self.on_change: Callable[[], None] = lambda: None
        """Called when the camera becomes in or out of distribution, or for another reason."""
        self._due = 0.0
        self._reported: tuple[bool, str] | None = None
        self._quiet_until = 0.0

    def on_model(self, classifier: Classifier) -> None:
        """Compare with the new model's reference."""
        self.use_reference(classifier.bundle)

    def on_prediction(self, predicted: FramePrediction) -> None:
        """Measure the frame if it is due."""
        if self._reference is None or (now := monotonic()) < self._due:
            return
        self._due = now + self.interval_s
        prediction = predicted.prediction
        try:
            self.measure(predicted.frame.pixels(self._spec), prediction.probabilities if prediction.finite else None)
        except ImageError:
            return  # the loop decoded it, so this cannot happen; and it is no reason to stop
        self._report_change()

    def _report_change(self) -> None:
        """Log a changed judgement and call `on_change`."""
        judgement = self.judgement()
        if judgement is None or not judgement.enough:
            return
        kind = judgement.reason.partition(" than ")[0]  # its percentage moves with every frame
        previous, current = self._reported, (judgement.ood, kind)
        turned = previous is None or previous[0] != judgement.ood
        if previous == current or (not turned and monotonic() < self._quiet_until):
            return
        self._reported, self._quiet_until = current, monotonic() + _QUIET_S
        if judgement.ood:
            _log.warning("camera %s", judgement)
        elif previous is not None:
            _log.info("camera %s", judgement)
        self.on_change()
