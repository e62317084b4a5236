"""Disagreements of a new version with the previous one, as devices on probation sent them and people labelled them."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping

from eyas_host.fleet.rollout.plan import ProofSection
from eyas_host.fleet.rollout.proof import Evidence
from eyas_host.fleet.rollout.state import Rollout
from eyas_host.fleet.samples.records import Key, Sample, count_words, samples
from eyas_host.fleet.samples.rules import labels_of
from eyas_host.fleet.store.database import Store

EVERY_S = 600.0
"""Time after which disagreements are counted again of which nobody said anything, seconds."""
_DIGITS = 12


class EvidenceReader:
    """Reads what the labelled disagreements of rollouts say: again when people said something, or after `EVERY_S`.

    Samples come with their images, and reading all of them at every turn would be a load.
    """

    def __init__(self, store: Store, clock: Callable[[], float] = time.time) -> None:
        self._store, self._clock = store, clock
        self._read: dict[str, tuple[float, tuple[int, int], Evidence]] = {}
        """Rollout -> when it was read, what had been said by then, and what it says."""

    def read(self, rollout: Rollout) -> Evidence:
        """The evidence of a rollout."""
        now, said = self._clock(), count_words(self._store)
        at, before, evidence = self._read.get(rollout.id, (-math.inf, (-1, -1), Evidence()))
        if said == before and now - at < EVERY_S:
            return evidence
        evidence = read_evidence(self._store, rollout)
        self._read[rollout.id] = now, said, evidence
        return evidence


def read_evidence(store: Store, rollout: Rollout) -> Evidence:
    """What the labelled disagreements of a rollout say."""
    proof = rollout.plan.proof
    found = [
        sample for sample in samples(store, since=rollout.created) if is_disagreement(sample, digest=rollout.digest)
    ]
    return weigh(found, labels_of(found, people=proof.people), proof)


def is_disagreement(sample: Sample, *, digest: str = "") -> bool:
    """Whether both versions gave the sample a label, and not the same; of the new version `digest`, if given."""
    event = sample.event
    differs = bool(event.previous_label) and event.previous_label != event.label
    return event.why == "disagreement" and differs and event.digest[:_DIGITS].startswith(digest)


def weigh(found: Iterable[Sample], labels: Mapping[Key, str], proof: ProofSection) -> Evidence:
    """Count labelled disagreements, at most one of a device in `spacing_s`: neighbouring frames show one scene."""
    counts = {"disagreements": 0, "labelled": 0, "new_right": 0, "previous_right": 0}
    for scene in _scenes(found, proof.spacing_s):
        counts["disagreements"] += 1
        sample = next((sample for sample in scene if sample.key in labels), None)
        if sample is None:
            continue
        label = labels[sample.key]
        counts["labelled"] += 1
        counts["new_right"] += label == sample.event.label
        counts["previous_right"] += label == sample.event.previous_label
    return Evidence(alpha=proof.alpha, **counts)


def _scenes(found: Iterable[Sample], spacing_s: float) -> Iterator[list[Sample]]:
    """Samples of one device within `spacing_s` of the first of them."""
    scene: list[Sample] = []
    for sample in sorted(found, key=lambda sample: (sample.event.device, sample.event.time, sample.key)):
        event = sample.event
        if scene and (event.device != scene[0].event.device or event.time >= scene[0].event.time + spacing_s):
            yield scene
            scene = []
        scene.append(sample)
    if scene:
        yield scene
