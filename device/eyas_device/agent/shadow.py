"""The previous model in shadow: it answers some of the new model's frames, for comparison and for nobody else."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from eyas_device.agent.loop import FramePrediction
from eyas_device.errors import ImageError
from eyas_device.ood import OodJudge
from eyas_device.predict import Prediction
from eyas_device.preprocess import Pixels
from eyas_device.support.closing import Closing
from eyas_device.support.histogram import LogHistogram
from eyas_device.updates.activate import ActiveModel
from eyas_device.updates.probation import LATENCY_GROWTH
from eyas_device.updates.records import Tally
from eyas_device.updates.release import Bounds

OnDisagreement = Callable[[FramePrediction, Prediction], None]
"""Takes the new model's prediction and the previous model's of the same frame, whose labels differ; must not block."""


class Shadow(Closing):
    """Compares a new model's predictions with those of the previous model, frame by frame.

    It works in the frame loop, after the new model's prediction went to everybody else: no prediction is late, and the
    frame needs no copy. Both models predict then, in alternating order, to compare their times: the prediction that the
    frame waited for is slower than one that follows another, by caches and by the processor's clock. `shadow_every`
    bounds what that costs.
    """

    def __init__(
        self,
        previous: ActiveModel,
        new: ActiveModel,
        bounds: Bounds,
        tally: Tally,
        on_disagreement: OnDisagreement = lambda predicted, previous: None,
    ) -> None:
        self.previous = previous
        """The previous model, which is closed with the shadow unless it is taken back."""
        self._on_disagreement = on_disagreement
        self._new = new.classifier
        self._bounds, self._tally = bounds, tally
        self._latency = LogHistogram(LATENCY_GROWTH, bins=tally.latency_bins)
        self._previous_latency = LogHistogram(LATENCY_GROWTH, bins=tally.previous_latency_bins)
        tally.latency_bins, tally.previous_latency_bins = self._latency.bins, self._previous_latency.bins
        measured = bounds.max_ood_share < 1
        self._judges = [OodJudge(m.classifier.bundle) for m in (new, previous)] if measured else []

    def compare(self, predicted: FramePrediction) -> None:
        """Let both models predict the frame, and count the difference. Raises what the runtimes raise."""
        prediction, tally, frame = predicted.prediction, self._tally, predicted.frame
        try:
            pixels = frame.pixels(self._new.spec)
            previous_pixels = frame.pixels(self.previous.classifier.spec)
        except ImageError:
            return  # the previous model wants it at another scale, at which it cannot be decoded
        if tally.shadowed % 2:
            new, before = self._new.predict(pixels), self.previous.classifier.predict(previous_pixels)
        else:
            before, new = self.previous.classifier.predict(previous_pixels), self._new.predict(pixels)
        if not (prediction.finite and before.finite):
            return  # the new model's are counted as errors, the previous one's say nothing
        tally.shadowed += 1
        tally.slower += new.latency_ms > self._bounds.max_latency_factor * before.latency_ms
        if prediction.label != before.label:
            tally.different += 1
            self._on_disagreement(predicted, before)
        self._latency.add(new.latency_ms)
        self._previous_latency.add(before.latency_ms)
        if self._judges:
            for_new, for_previous = self._judges
            tally.ood += _is_unusual(for_new, pixels, prediction.probabilities) and not _is_unusual(
                for_previous, previous_pixels, before.probabilities
            )

    def close(self) -> None:
        """Free the previous model and its slot."""
        self.previous.close()


def _is_unusual(judge: OodJudge, pixels: Pixels, probabilities: np.ndarray) -> bool:
    observation = judge.observe(pixels, probabilities)
    return observation is not None and judge.is_unusual(observation)
