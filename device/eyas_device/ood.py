"""Out-of-distribution (OOD) detection: whether a camera sees what the model was trained on.

A classifier labels any image, also one of a wall. Each bundle therefore carries a reference of its training images:
what is usual for named statistics of an image (brightness, sharpness, colour ...), the mean and the principal
directions of a descriptor, and how certain the model is of validation images. All but the last depend on the pixels
alone, so they are the same for every runtime and precision.

A camera is judged by its last thirty images, one a second. Each statistic is averaged over them and compared with the
range that known sub-populations (labels, strata, groups) have. How far it may leave that range depends on how many
different scenes the images show: the mean of thirty different scenes hardly varies, one scene seen thirty times is one
image. Where labels look very different, hardly an image is unusual among all of them; it is also compared with those of
the label that the model predicts (the most probable one). The thresholds are calibrated on the validation images, see
`eyas_host.bundle.ood_thresholds`.

Source: the distance is Mahalanobis' within the principal subspace plus the residual outside of it, as in Moghaddam &
Pentland, "Probabilistic Visual Learning for Object Representation", 1997. Means of labels with one covariance: Lee et
al., "A Simple Unified Framework for Detecting Out-of-Distribution Samples and Adversarial Attacks", 2018.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple

import cv2
import msgspec
import numpy as np
import numpy.typing as npt

from eyas_device.bundle import Bundle
from eyas_device.image_statistics import STATISTICS, image_statistics
from eyas_device.preprocess import Pixels, prepare
from eyas_device.reference import Floats, Reference, ScoreTable

Values = npt.NDArray[np.float64]
HISTORY = 30
"""Images that a camera is judged by."""
MIN_IMAGES = 5
"""Fewer images are not judged."""
OOD_THRESHOLD = 0.95
"""Without a table of scores, in bundles of before: a camera is out of distribution if the median of its last images is
farther away than this fraction of the validation images."""
_BACK = 0.8
"""A camera is in distribution again when its deviation is below this fraction of the threshold, so that the judgement
does not flap."""
_MAX_DIFFERENCE = 6.0
"""Larger differences of two scores count as this one when scenes are compared."""
_EXPLAINS = 0.4
"""The first of `REASONS` that deviates at least this fraction of the largest deviation explains a judgement."""
_UNDER_WAY = 1.5
"""Where the newest images deviate this many times as much as all, they explain a judgement."""
LAYOUT, DETAILS, CERTAINTY = "layout", "details", "certainty"
_OF_LABEL = "_of_label"
TOGETHER, LAYOUT_OF_LABEL, DETAILS_OF_LABEL = "together" + _OF_LABEL, LAYOUT + _OF_LABEL, DETAILS + _OF_LABEL
OF_LABEL = (*(statistic.name + _OF_LABEL for statistic in STATISTICS), TOGETHER, LAYOUT_OF_LABEL, DETAILS_OF_LABEL)
"""The same compared with the training images of the predicted label: a page that is called a brick must look like one.
`TOGETHER` is the distance of all named statistics."""
NAMES = (*(statistic.name for statistic in STATISTICS), LAYOUT, DETAILS, CERTAINTY, *OF_LABEL)
"""What an image is judged by: named statistics, distance in the principal subspace, residual, the model's certainty,
and the same among the images of the predicted label."""


class Reason(NamedTuple):
    """How people call a statistic that moved."""

    name: str
    sign: int
    words: str
    """Followed by "99 % of the training images", or by those of the same label."""


REASONS = (
    Reason("red", 1, "redder than"),
    Reason("blue", 1, "bluer than"),
    Reason("brightness", -1, "darker than"),
    Reason("brightness", 1, "brighter than"),
    Reason("white", 1, "more overexposed than"),
    Reason("noise", 1, "noisier than"),
    Reason("red", -1, "less red than"),
    Reason("blue", -1, "yellower than"),
    Reason("colour", 1, "more colourful than"),
    Reason("colour", -1, "less colourful than"),
    Reason("sharpness", -1, "blurrier than"),
    Reason("detail", -1, "with less detail than"),
    Reason("black", 1, "with more black than"),
    Reason("contrast", -1, "of less contrast than"),
    Reason("contrast", 1, "of more contrast than"),
    Reason("light_x", 1, "brighter on the right than"),
    Reason("light_x", -1, "brighter on the left than"),
    Reason("light_y", 1, "brighter at the bottom than"),
    Reason("light_y", -1, "brighter at the top than"),
    Reason("direction", 1, "with more vertical edges than"),
    Reason("direction", -1, "with more horizontal edges than"),
    Reason("edges_x", 1, "with more edges on the right than"),
    Reason("edges_x", -1, "with more edges on the left than"),
    Reason("edges_y", 1, "with more edges at the bottom than"),
    Reason("edges_y", -1, "with more edges at the top than"),
    Reason("sharpness", 1, "sharper than"),
    Reason("detail", 1, "with more detail than"),
    Reason("skewness", 1, "with fewer bright areas than"),
    Reason("skewness", -1, "with fewer dark areas than"),
    Reason("edges", 1, "with edges over more of the image than"),
    Reason("edges", -1, "with edges over less of the image than"),
    Reason("noise", -1, "smoother than"),
    Reason("black", -1, "with less black than"),
    Reason("white", -1, "less overexposed than"),
    Reason(LAYOUT, 1, "laid out less usually than"),
    Reason(DETAILS, 1, "with more unusual details than"),
    Reason("together", 1, "with a more unusual mix of light, colour and detail than"),
    Reason(CERTAINTY, -1, "with less certain predictions than"),
    Reason(CERTAINTY, 1, "with more certain predictions than"),
)
"""In the order in which they explain a judgement: causes first, what follows from them after."""


def describe(image: Pixels) -> Floats:
    """The descriptor of a prepared image, uint8 [size, size, 3]: float32 [324].

    A thumbnail of 8 x 8 colours, 8 edge directions in 4 x 4 cells, and brightness, contrast and sharpness.
    """
    thumbnail = cv2.resize(image, (8, 8), interpolation=cv2.INTER_AREA).astype(np.float32).ravel() / 255.0
    grey = cv2.resize(cv2.cvtColor(image, cv2.COLOR_BGR2GRAY), (64, 64), interpolation=cv2.INTER_AREA)
    light = grey.astype(np.float32) / 255.0
    across, down = cv2.Sobel(light, cv2.CV_32F, 1, 0), cv2.Sobel(light, cv2.CV_32F, 0, 1)
    strength = np.hypot(across, down)
    direction = np.minimum((np.arctan2(down, across) % math.pi) * (8 / math.pi), 7.999).astype(np.int64)
    cell = np.arange(64) // 16
    bins = (cell[:, None] * 4 + cell[None, :]) * 8 + direction
    edges = np.bincount(bins.ravel(), weights=strength.ravel(), minlength=128) / 256.0
    fine = cv2.Laplacian(cv2.cvtColor(image, cv2.COLOR_BGR2GRAY), cv2.CV_32F)
    overall = [light.mean(), light.std(), math.log(1e-3 + strength.mean()), math.log(1.0 + np.abs(fine).mean())]
    return np.concatenate([thumbnail, np.sqrt(edges), overall]).astype(np.float32)


def distance(descriptor: Floats, reference: Reference) -> float:
    """Distance of an image from the mean of the training images, in units of their own spread up to a constant."""
    centred = (descriptor - reference.mean) / reference.scale
    inside, outside = _energies(centred, reference)
    return math.sqrt((inside + outside) / (len(reference.spread) + 1))


def _energies(centred: Floats, reference: Reference) -> tuple[float, float]:
    """Squared distance in the principal subspace, and outside of it, both in units of the training images' variance."""
    along = reference.components @ centred
    outside = centred - reference.components.T @ along
    return float(np.square(along / reference.spread).sum()), float(np.square(outside).sum()) / reference.residual


def ood_quantile(value: float, reference: Reference) -> float:
    """Fraction of the validation images that are nearer to the training images than `value`, 0..1."""
    return float(np.searchsorted(reference.distances, value, side="left") / len(reference.distances))


def all_statistics(
    of_pixels: Values,
    descriptor: Floats,
    reference: Reference,
    probabilities: npt.NDArray[np.floating[Any]] | None = None,
) -> Values:
    """The values of `NAMES` for an image: those of `image_statistics` and what follows from the rest, float64 [names].

    Without the model's probabilities, float [classes], the certainty is NaN.
    """
    inside, outside = _energies((descriptor - reference.mean) / reference.scale, reference)
    k, d = reference.components.shape
    layout, details = (_log_root(energy) for energy in (inside / k, outside / max(1, d - k)))
    certain = math.nan if probabilities is None else certainty(probabilities)
    return np.concatenate(
        [of_pixels, [layout, details, certain], _of_label(of_pixels, descriptor, reference, probabilities)]
    )


def _of_label(
    of_pixels: Values,
    descriptor: Floats,
    reference: Reference,
    probabilities: npt.NDArray[np.floating[Any]] | None,
) -> Values:
    """The values of `OF_LABEL`: how an image differs from the training images of the predicted label."""
    labels = reference.labels
    if labels is None or probabilities is None or labels.mean.shape != (len(probabilities), len(of_pixels)):
        return np.full(len(OF_LABEL), math.nan)
    label = int(np.argmax(probabilities))
    differences = (of_pixels - labels.mean[label]) / labels.scale[label]
    centred = (descriptor - reference.mean) / reference.scale - labels.centre[label]
    along = labels.components @ centred
    outside = centred - labels.components.T @ along
    k, d = labels.components.shape
    energies = (
        float(np.square(labels.whitening @ differences).mean()),
        float(np.square(along / labels.spread).mean()),
        float(np.square(outside).sum()) / max(1, d - k) / float(labels.residual[label]),
    )
    return np.concatenate([differences, [_log_root(energy) for energy in energies]])


def _log_root(energy: float) -> float:
    return 0.5 * math.log(1e-6 + energy)


def certainty(probabilities: npt.NDArray[np.floating[Any]]) -> float:
    """Log odds of the most probable label, from the probabilities float [classes], at most about 80."""
    ordered = np.sort(probabilities.astype(np.float64))
    return math.log(max(float(ordered[-1]), 1e-35)) - math.log(max(float(ordered[:-1].sum()), 1e-35))


def normal_scores(values: Values, table: ScoreTable) -> Values:
    """The normal scores of the statistics of one image, both float64 [table.names]; NaN stays."""
    return np.array(
        [np.interp(x, quantiles, table.scores) for x, quantiles in zip(values, table.quantiles, strict=True)]
    )


def scene_distances(scores: Values, names: tuple[str, ...]) -> Values:
    """Distances between images, float64 [n, n], of their scores [n, names]; by the statistics of the pixels alone."""
    pixels = [name not in (LAYOUT, DETAILS, CERTAINTY, *OF_LABEL) for name in names]
    used = np.clip(scores[:, pixels], -_MAX_DIFFERENCE, _MAX_DIFFERENCE)
    return np.asarray(np.sqrt(np.square(used[:, None] - used[None]).sum(axis=-1)))


def novelty(distances: Values, distinct: float) -> Values:
    """How far each image shows another scene than those before it: 0..1, [..., n], of distances [..., n, n].

    Their sum is the number of different scenes. An image counts half if it is three quarters of `distinct` away from
    the nearest one before it, and not at all below a half: noise and flicker make no other scene.
    """
    earlier = np.tril(np.ones(distances.shape[-2:], dtype=bool), -1)
    nearest = np.where(earlier, distances, np.inf).min(axis=-1)
    return np.asarray(np.clip(2.0 * nearest / distinct - 1.0, 0.0, 1.0))


def deviations(means: Values, table: ScoreTable) -> Values:
    """Distance of mean scores [..., names] from the usual range; negative within it, and for what is not known."""
    outside = np.maximum(means - table.high, table.low - means)
    return np.where(np.isnan(outside), -1.0, outside)


class Judgement(msgspec.Struct, frozen=True):
    """Verdict on the last images of a camera."""

    images: int
    ood_quantile: float
    """Fraction of the validation images that are nearer to the training images than this camera's median, 0..1."""
    ood: bool = False
    """Whether the camera is out of distribution: it does not see what the model was trained on."""
    reason: str = ""
    """What moved, for people, if it is."""

    @property
    def enough(self) -> bool:
        """Whether there were enough images for a verdict."""
        return self.images >= MIN_IMAGES

    def __str__(self) -> str:
        if not self.enough:
            return f"not judged yet: {self.images} of {MIN_IMAGES} images"
        if not self.ood:
            return f"in distribution: farther away than {self.ood_quantile:.0%} of the validation images"
        return (
            "out of distribution: this camera does not see what the model was trained on; its images are "
            f"{self.reason} (check view, light and focus)"
        )


class Observation(NamedTuple):
    """One frame as the detector sees it."""

    descriptor: Floats
    distance: float
    scores: Values | None
    """Normal scores of the reference's statistics; None if it has none."""


class OodJudge:
    """Measures frames against a bundle's reference and judges the last thirty."""

    def __init__(self, bundle: Bundle | None = None) -> None:
        self.on_descriptor: list[Callable[[Floats], None]] = []
        """Called with the descriptor of each frame that was measured."""
        self._reference: Reference | None = None
        self._judgement: Judgement | None = None
        if bundle is not None:
            self.use_reference(bundle)

    def measure(self, frame: Pixels, probabilities: npt.NDArray[np.floating[Any]] | None = None) -> None:
        """Measure one frame, uint8 [h, w, 3] BGR, and what the model made of it (float [classes])."""
        observation = self.observe(frame, probabilities)
        if observation is not None:
            self.add(observation)

    def observe(self, frame: Pixels, probabilities: npt.NDArray[np.floating[Any]] | None = None) -> Observation | None:
        """Measure one frame without judging it; None if the bundle has no reference."""
        reference = self._reference
        if reference is None:
            return None
        image = prepare(frame, self._spec)
        described = describe(image)
        scores = None
        if self._table is not None:
            values = all_statistics(image_statistics(image), described, reference, probabilities)[self._columns]
            scores = normal_scores(values, self._table)
        return Observation(described, distance(described, reference), scores)

    def is_unusual(self, observation: Observation) -> bool:
        """Whether a frame that was observed is out of distribution by itself, without those before it."""
        if self._reference is None:
            return False
        if self._table is None or observation.scores is None:
            return ood_quantile(observation.distance, self._reference) > OOD_THRESHOLD
        return judge_scores(observation.scores[np.newaxis], self._table)[0] > 1

    def add(self, observation: Observation) -> None:
        """Judge a frame that was observed, together with those before it."""
        reference = self._reference
        if reference is None:
            return
        self._distances.append(observation.distance)
        if observation.scores is not None:
            self._scores.append(observation.scores)
        self._judgement = self._judge(reference)
        for callback in self.on_descriptor:
            callback(observation.descriptor)

    def judgement(self) -> Judgement | None:
        """Verdict on the last images; None if the bundle has no reference."""
        return self._judgement

    def use_reference(self, bundle: Bundle) -> None:
        """Compare with this bundle's reference from now on."""
        self._reference = reference = bundle.reference()
        self._spec = bundle.manifest.preprocessing
        self._table, self._columns = (None, []) if reference is None else _known(reference.table)
        self._distances: deque[float] = deque(maxlen=HISTORY)
        self._scores: deque[Values] = deque(maxlen=HISTORY)
        self._judgement = None if reference is None else Judgement(images=0, ood_quantile=0.0)

    def _judge(self, reference: Reference) -> Judgement:
        images = len(self._distances)
        quantile = ood_quantile(float(np.median(self._distances)), reference)
        judged = Judgement(images=images, ood_quantile=quantile)
        if not judged.enough:
            return judged
        was = self._judgement is not None and self._judgement.ood
        if self._table is None:
            ratio, reason = quantile / OOD_THRESHOLD, f"farther from the training images than {_percent(quantile)} of"
            reason += " the validation images"
            threshold = 1.0 if not was else (2 * OOD_THRESHOLD - 1) / OOD_THRESHOLD
        else:
            ratio, reason = judge_scores(np.stack(self._scores), self._table)
            threshold = _BACK if was else 1.0
        ood = ratio > threshold
        return msgspec.structs.replace(judged, ood=ood, reason=reason if ood else "")


def judge_scores(scores: Values, table: ScoreTable) -> tuple[float, str]:
    """The largest deviation of images' scores, float64 [n, names], as a multiple of its threshold, and what moved."""
    scenes = float(novelty(scene_distances(scores, table.names), table.distinct).sum())
    means = scores.mean(axis=0)
    largest = float(deviations(means, table).max())
    ratio = largest / float(np.interp(scenes, table.effective, table.thresholds))
    newest = scores[-MIN_IMAGES:]
    alone = deviations(newest, table).max(axis=1) > table.thresholds[0]
    if alone.any():  # they are unusual whatever the others are
        means = newest[alone].mean(axis=0)
    elif float(deviations(newest.mean(axis=0), table).max()) > _UNDER_WAY * largest:  # most are from before the change
        means = newest.mean(axis=0)
    return ratio, _explain(means, table)


def _explain(means: Values, table: ScoreTable) -> str:
    """What mean scores [names] mean, for people."""
    deviation = deviations(means, table)
    least = max(_EXPLAINS * float(deviation.max()), 1e-9)
    by_name = dict(zip(table.names, zip(means.tolist(), deviation.tolist(), strict=True), strict=True))
    for name, sign, words in REASONS:
        for among, of in (
            (name, "the validation images" if name in (LAYOUT, DETAILS, CERTAINTY) else "the training images"),
            (name + _OF_LABEL, "the validation images of the same label"),
        ):
            mean, size = by_name.get(among, (0.0, -1.0))
            if size >= least and mean * sign > 0:
                fraction = 1.0 - 0.5 * math.erfc(abs(mean) / math.sqrt(2))
                return f"{words} {_percent(fraction)} of {of}"
    return "unlike the training images"


def _known(table: ScoreTable | None) -> tuple[ScoreTable | None, list[int]]:
    """The part of the table that this agent knows, and the positions of its statistics in `NAMES`."""
    if table is None:
        return None, []
    rows = [row for row, name in enumerate(table.names) if name in NAMES]
    if not rows:
        return None, []
    known = msgspec.structs.replace(
        table,
        names=tuple(table.names[row] for row in rows),
        quantiles=table.quantiles[rows],
        low=table.low[rows],
        high=table.high[rows],
    )
    return known, [NAMES.index(name) for name in known.names]


def _percent(fraction: float) -> str:
    """A fraction as a whole percentage that does not claim all of them."""
    return f"{min(99, math.floor(100 * fraction))} %"
