"""Robustness: accuracy of the shipped artefact, and what a device says of itself, when light, focus or view change.

Each change of `evaluation.changes` is applied to validation images, which are then prepared, predicted and judged by
the device's own code. The held-out test set is not touched.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import cv2
import msgspec
import numpy as np
import numpy.typing as npt

from eyas_device.bundle import Bundle
from eyas_device.ood import HISTORY, MIN_IMAGES, Observation, OodJudge, judge_scores, scene_distances
from eyas_device.predict import Classifier
from eyas_device.preprocess import Pixels
from eyas_host.data.split import Split
from eyas_host.evaluation.changes import CHANGES
from eyas_host.evaluation.metrics import balanced_mean
from eyas_host.evaluation.ood_streams import observe
from eyas_host.pipeline.runner import BUNDLE, RunContext
from eyas_host.support.progress import Meter, meter

_MAX_IMAGES = 200
WINDOW_FRAMES = HISTORY
"""Frames after which a device has to notice a change."""
_WINDOWS = 100
_SEED = 0
_EXAMPLE_SIDE = 128
_MIN_SIDE = 300

Ints = npt.NDArray[np.int64]


class RobustnessRow(msgspec.Struct, frozen=True, kw_only=True):
    """The shipped artefact on validation images after one change."""

    change: str
    """Name of the change and its level, e.g. `light x0.5`."""
    balanced_accuracy: float
    drop: float
    """Balanced accuracy lost against the unchanged images; negative: gained."""
    confidence: float | None
    """Mean calibrated confidence of the wrong predictions; null without any."""
    flagged: float | None = None
    """Fraction of windows that a device calls out of distribution at any moment; null without a reference."""
    reason: str = ""
    """What a device says most often in these windows."""


class Robustness(msgspec.Struct, frozen=True, kw_only=True):
    """The shipped artefact on changed validation images."""

    images: int
    """Validation images, as many of each label as there are, up to a bound."""
    windows: int
    """Windows of random images that were judged for each change."""
    window_frames: int
    """Images of a window."""
    balanced_accuracy: float
    """Of the unchanged images."""
    flagged: float | None
    """Fraction of windows of unchanged images that are called out of distribution: false alarms."""
    rows: tuple[RobustnessRow, ...]

    def unnoticed(self, *, min_drop: float, min_flagged: float) -> tuple[RobustnessRow, ...]:
        """Changes that cost at least `min_drop` and are flagged in less than `min_flagged` of the windows."""
        return tuple(row for row in self.rows if row.drop >= min_drop and (row.flagged or 0.0) < min_flagged)


def measure_robustness(bundle: Bundle, artefact: str, images: Sequence[Pixels], targets: Ints) -> Robustness:
    """Measure `artefact` of the bundle on changed images.

    Args:
        bundle: The packed bundle.
        artefact: The artefact that ships.
        images: Decoded validation images, uint8 [h, w, 3] BGR.
        targets: Their labels' positions [n] in the manifest.

    """
    rows = sample_rows(targets, _MAX_IMAGES)
    shrunk = [_shrunk(images[row], bundle.manifest.preprocessing.size) for row in rows]
    chosen = targets[rows]
    with (
        Classifier.load(bundle, artefact=artefact) as classifier,
        meter("robustness", len(rows) * (1 + len(CHANGES))) as bar,
    ):
        plain = _Measured.of(classifier, shrunk, lambda image: image, bar)
        before = plain.balanced_accuracy(chosen)
        results = []
        for change in CHANGES:
            changed = _Measured.of(classifier, shrunk, change.apply, bar)
            accuracy = changed.balanced_accuracy(chosen)
            flagged, reason = changed.judge()
            results.append(
                RobustnessRow(
                    change=change.name,
                    balanced_accuracy=accuracy,
                    drop=before - accuracy,
                    confidence=changed.wrong_confidence(chosen),
                    flagged=flagged,
                    reason=reason,
                )
            )
        return Robustness(
            images=len(rows),
            windows=_WINDOWS,
            window_frames=WINDOW_FRAMES,
            balanced_accuracy=before,
            flagged=plain.judge()[0],
            rows=tuple(results),
        )


def measure_run(context: RunContext, artefact: str) -> Robustness:
    """Measure an artefact of a run's bundle on the run's validation images."""
    images = Split.load(context.root, context.recipe.image.preprocessing()).validation
    return measure_robustness(Bundle.open(context.root / BUNDLE), artefact, images.pixels, images.targets)


def changed_examples(images: Sequence[Pixels]) -> Mapping[str, Pixels]:
    """Name of each change -> the first image after it, for the report; empty without images."""
    if not len(images):
        return {}
    image = _shrunk(images[0], _EXAMPLE_SIDE)
    return {change.name: change.apply(image) for change in CHANGES}


def sample_rows(targets: Ints, count: int) -> Ints:
    """At most `count` positions [n], evenly from all labels as far as they go; the same ones each time."""
    generator = np.random.default_rng(_SEED)
    order = generator.permutation(len(targets))
    turn = np.zeros(len(targets), dtype=np.int64)  # how many of its label come before each position
    for label in np.unique(targets):
        own = order[targets[order] == label]
        turn[own] = np.arange(len(own))
    return np.sort(order[np.argsort(turn[order], kind="stable")][:count])


class _Measured(NamedTuple):
    """Predictions and frames after one change."""

    bundle: Bundle
    observations: list[Observation]
    """Empty if the bundle has no reference."""
    predicted: Ints
    confidence: npt.NDArray[np.float64]

    @classmethod
    def of(
        cls, classifier: Classifier, images: Sequence[Pixels], change: Callable[[Pixels], Pixels], bar: Meter
    ) -> _Measured:
        judge = OodJudge(classifier.bundle)
        observations, predictions = [], []
        for image in images:
            frame = change(image)
            predictions.append(classifier.predict(frame))
            observations.append(judge.observe(frame, predictions[-1].probabilities))
            bar.advance()
        return cls(
            classifier.bundle,
            [observation for observation in observations if observation is not None],
            np.array([prediction.index for prediction in predictions], dtype=np.int64),
            np.array([prediction.confidence for prediction in predictions]),
        )

    def balanced_accuracy(self, targets: Ints) -> float:
        return balanced_mean(self.predicted == targets, targets)

    def wrong_confidence(self, targets: Ints) -> float | None:
        wrong = self.predicted != targets
        return float(self.confidence[wrong].mean()) if wrong.any() else None

    def judge(self) -> tuple[float | None, str]:
        """Fraction of windows that are out of distribution at any moment, and what is said of most of these.

        The same as an `OodJudge` for each window says; all windows at once, because one image costs it a millisecond.
        """
        reference = self.bundle.reference()
        if reference is None or reference.table is None:
            return None, ""
        table, count = reference.table, len(self.observations)
        scores = np.stack([observation.scores for observation in self.observations if observation.scores is not None])
        generator = np.random.default_rng(_SEED)
        drawn = [generator.choice(count, WINDOW_FRAMES, replace=count < WINDOW_FRAMES) for _ in range(_WINDOWS)]
        rows = np.stack(drawn)
        streams = observe(rows, scores[rows], scene_distances(scores, table.names), table)
        over = streams.deviation > np.interp(streams.scenes, table.effective, table.thresholds)
        reasons: Counter[str] = Counter()
        for window in np.flatnonzero(over.any(axis=1)):
            seen = MIN_IMAGES + int(over[window].argmax())
            reasons[judge_scores(scores[rows[window, :seen]], table)[1]] += 1
        return reasons.total() / _WINDOWS, reasons.most_common(1)[0][0] if reasons else ""


def _shrunk(image: Pixels, size: int) -> Pixels:
    """The image with its shorter side at most at twice `size` pixels, so that changes cost little on large images."""
    height, width = image.shape[:2]
    scale = max(_MIN_SIDE, 2 * size) / min(height, width)
    if scale >= 1.0:
        return image
    return np.asarray(
        cv2.resize(image, (max(1, round(width * scale)), max(1, round(height * scale))), interpolation=cv2.INTER_AREA)
    )
