"""Which samples to label first: what two versions disagree on, then what the model is least sure of, no two alike.

A share is drawn at random among those that devices drew at random: only they tell the accuracy, and a queue of hard
samples alone would never show it. The share is larger while an alarm says that the world has changed for many.
Disagreements decide whether a new version goes on. The others are chosen one after the other: of those that are
uncertain most, the one that is farthest from all chosen ones (k-centre, greedy; Sener & Savarese, "Active learning for
convolutional neural networks: a core-set approach", ICLR 2018), within a quota for each device and each predicted
label.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable, Sequence

import cv2
import numpy as np
import numpy.typing as npt

from eyas_host.fleet.drift.causes import CERTAINTY, PERIODIC, SEASON, SHIFT, SITE
from eyas_host.fleet.samples.records import Sample

RANDOM_SHARE = 0.25
"""Share of the queue that is drawn at random."""
CHANGED_SHARE = 0.75
"""The same while an alarm says that the images or labels of many have changed: then any image tells as much as a hard
one, and hard ones alone are not what the model will see."""
_CHANGED = frozenset({SEASON, SHIFT, SITE, PERIODIC, CERTAINTY})
"""Causes of such alarms."""
_SIDE = 8
_PER_PLACE = 4
"""Candidates for each place: among so many times as many uncertain samples, the most different ones are chosen."""
_QUOTA = 0.34
"""Largest share of one device, and of one predicted label, while there are others."""


def choose(found: Sequence[Sample], count: int, *, random_share: float = RANDOM_SHARE, seed: int = 0) -> list[Sample]:
    """The samples to label, the first ones first.

    Args:
        found: Samples that nobody has labelled.
        count: How many.
        random_share: Share of them that is drawn at random, 0..1.
        seed: Of the dice.

    """
    dice = random.Random(seed)
    drawn = [sample for sample in found if sample.is_random]
    dice.shuffle(drawn)
    places_left = count - min(len(drawn), round(random_share * count))
    hard = [sample for sample in found if not sample.is_random]
    chosen = _of_each_device(sample for sample in hard if sample.event.why == "disagreement")[:places_left]
    hard = [sample for sample in hard if sample.event.why != "disagreement"]
    chosen += _farthest(sorted(hard, key=uncertainty, reverse=True), places_left - len(chosen))
    at_random = drawn[
        : count - len(chosen)
    ]  # in the dice's order, also where hard ones are missing: they tell the accuracy
    places = dice.sample(range(len(chosen) + len(at_random)), len(at_random))
    queue = list(chosen)
    for place, sample in zip(sorted(places), at_random, strict=True):
        queue.insert(place, sample)  # nobody can tell by the place which ones were drawn at random
    return queue


def share_at_random(causes: Iterable[str]) -> float:
    """Share of the queue to draw at random, with open alarms of these causes (`fleet.drift.causes`)."""
    return CHANGED_SHARE if _CHANGED.intersection(causes) else RANDOM_SHARE


def uncertainty(sample: Sample) -> float:
    """How unsure the prediction was, 0..1: 1 - margin between the two best labels."""
    margin = sample.event.margin or max(0.0, 2 * sample.event.confidence - 1)
    return 1.0 - min(max(margin, 0.0), 1.0)


def _of_each_device(found: Iterable[Sample]) -> list[Sample]:
    """The first sample of each device, then the second of each, and so on."""
    places: Counter[str] = Counter()
    ranked = []
    for sample in found:
        ranked.append((places[sample.event.device], sample))
        places[sample.event.device] += 1
    return [sample for _, sample in sorted(ranked, key=lambda pair: pair[0])]


def _farthest(ranked: Sequence[Sample], count: int) -> list[Sample]:
    """`count` of the first samples, each as far as possible from those before it."""
    candidates = list(ranked[: _PER_PLACE * count])
    if count <= 0 or not candidates:
        return []
    features = np.stack([_features(sample) for sample in candidates])
    limit = max(1, round(_QUOTA * count))
    taken: Counter[tuple[str, str]] = Counter()
    distance = np.full(len(candidates), np.inf)
    left = list(range(len(candidates)))
    chosen: list[int] = []
    while left and len(chosen) < count:
        free = [number for number in left if all(taken[key] < limit for key in _quotas(candidates[number]))] or left
        best = max(free, key=lambda number: (round(float(distance[number]), 6), -number))
        chosen.append(best)
        left.remove(best)
        taken.update(_quotas(candidates[best]))
        distance = np.minimum(distance, np.linalg.norm(features - features[best], axis=1))
    return [candidates[number] for number in chosen]


def _quotas(sample: Sample) -> tuple[tuple[str, str], tuple[str, str]]:
    """What a sample is counted by: its device, and its predicted label."""
    return ("device", sample.event.device), ("label", sample.event.label)


def _features(sample: Sample) -> npt.NDArray[np.float32]:
    """Where a sample lies: its image in few pixels, and the model's probabilities; float32 [pixels + labels]."""
    image, pixels = sample.image(), np.full(3 * _SIDE * _SIDE, 0.5, np.float32)
    if image is not None:
        decoded = cv2.imdecode(np.frombuffer(image, np.uint8), cv2.IMREAD_REDUCED_COLOR_8)
        if decoded is not None:
            small = cv2.resize(decoded, (_SIDE, _SIDE), interpolation=cv2.INTER_AREA)
            pixels = (small.astype(np.float32) / 255).ravel()
    labels = np.zeros(16, np.float32)
    for label, probability in sample.event.top.items():
        labels[sum(label.encode()) % len(labels)] += probability
    return np.concatenate([pixels / np.sqrt(len(pixels)), labels / 2])
