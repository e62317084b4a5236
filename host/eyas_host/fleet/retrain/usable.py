"""Which labelled samples of the store may be trained on, and why the others may not.

An image counts as new by its content: the champion's split knows every image that it was made from by hash. No clock of
a device matters, and a store that was restored from a backup offers nothing twice.
"""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from eyas_host.fleet.samples.exchange import WITHOUT_CONSENT, allowed_image, folder_problem, name_of
from eyas_host.fleet.samples.records import Sample
from eyas_host.fleet.samples.rules import verdicts


class Usable(NamedTuple):
    """A new image with its label."""

    label: str
    name: str
    """Of its file."""
    device: str
    sha256: str
    image: bytes
    """JPEG."""


class Found(NamedTuple):
    """What the store has for a training."""

    images: tuple[Usable, ...]
    left_out: dict[str, int]
    """Why samples are left out -> how many."""

    @property
    def counts(self) -> dict[str, int]:
        """Label -> new images."""
        return dict(Counter(one.label for one in self.images))


def usable(
    found: Sequence[Sample],
    known: Mapping[str, str],
    *,
    labels: Sequence[str],
    now: float,
    people: int = 1,
    per_device: int = 100,
) -> Found:
    """Choose the samples that are new and labelled, and whose image may be trained on.

    Args:
        found: Samples of the store about which people said something.
        known: sha256 -> label of the images that the champion knows; one with another label is a correction, and new.
        labels: Classes that are allowed; empty: any.
        now: The time, seconds since 1970.
        people: So many have to agree.
        per_device: Images of one device, at most: none floods a training.

    """
    states = verdicts(found, people=people)
    left_out: Counter[str] = Counter()
    images: dict[str, Usable] = {}
    for sample in found:
        state, label = states[sample.key]
        if state != "labelled":
            left_out[state] += 1
        elif sample.image() is None:
            left_out["without an image"] += 1
        elif not sample.may_train:
            left_out[WITHOUT_CONSENT] += 1
        elif (image := allowed_image(sample, now)) is None:
            left_out["may not be kept any longer"] += 1
        elif (labels and label not in labels) or folder_problem(label):
            left_out["of another class"] += 1
        elif known.get(digest := hashlib.sha256(image).hexdigest()) == label:
            left_out["known to it"] += 1
        elif digest in images:
            left_out["the same image"] += 1
        else:
            images[digest] = Usable(label, name_of(sample), sample.event.device, digest, image)
    chosen = tuple(_of_each_device(images.values(), per_device))
    if beyond := len(images) - len(chosen):
        left_out[f"beyond {per_device} of a device"] += beyond
    return Found(chosen, dict(left_out))


def _of_each_device(images: Iterable[Usable], per_device: int) -> Iterable[Usable]:
    """At most so many of each device, of its labels in turn, so that a flood of one leaves the others their place."""
    of_label: defaultdict[str, Counter[str]] = defaultdict(Counter)
    by_device: defaultdict[str, list[tuple[int, Usable]]] = defaultdict(list)
    for one in sorted(images, key=lambda one: one.sha256):  # an order that no device chooses
        of_label[one.device][one.label] += 1
        by_device[one.device].append((of_label[one.device][one.label], one))
    for ranked in by_device.values():
        yield from (one for _, one in sorted(ranked, key=lambda pair: pair[0])[:per_device])
