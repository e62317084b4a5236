"""Labels of samples that may be wrong: confident learning on probabilities of a model that never saw the label.

Confident learning (Northcutt, Jiang & Chuang, "Confident learning: estimating uncertainty in dataset labels", JAIR
2021; cleanlab's implementation) estimates how many labels are wrong from each class's mean confidence; that many, of
those with the smallest probability of their own label, are listed. Its probabilities have to be out of sample:

- `images`: a logistic regression on features of the packaged network, cross-validated over near-duplicate groups, so
  that no copy of an image vouches for its label. It learns the people's words, and is blind to the deployed model.
- `model`: what the device sent. It was predicted before anybody labelled the sample, by a model that cannot have
  trained on it; of one image that was sent again and again, the first prediction counts. Samples that judge the model
  (random ones and disagreements) are left out: looked at again only where the model objects, they would flatter it.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple, get_args

import msgspec
import numpy as np
import numpy.typing as npt

from eyas_device.errors import ImageError
from eyas_host.fleet.samples.exchange import allowed_image, name_of
from eyas_host.fleet.samples.records import OBJECTION, UNKNOWN, Key, Said, Sample, SampleError
from eyas_host.fleet.samples.rules import verdicts

Basis = Literal["images", "model"]
Floats = npt.NDArray[np.float64]
FOLDS = 5
MIN_IMAGES = 50
"""Labelled images, from which a cross-validated classifier is worth asking."""
_MIN_OF_CLASS = FOLDS
"""Labels of a class, from which each fold can train on some."""
LEADS: Mapping[Basis, str] = {
    "images": "Probabilities are those of classifiers that were trained on other labelled images, and on none that "
    "looks alike.",
    "model": "Probabilities are those that the device sent, before anybody had labelled the image.",
}
_NETWORK, _SIDE, _BATCH = "mobilenetv3_small_100", 128, 32
_MAX_BITS = 16
"""Perceptual hashes that differ in so many of 256 bits are of one group."""


class Suspect(msgspec.Struct, frozen=True, kw_only=True):
    """A label that may be wrong."""

    sample: Sample
    given: str
    """Label that people gave."""
    suggested: str
    """The most probable one."""
    probability: float
    """Of the given label, out of sample: the smaller the more suspicious."""
    of_suggested: float
    people: tuple[str, ...]
    """Who gave the label."""


class NoiseCheck(msgspec.Struct, frozen=True, kw_only=True):
    """What was looked at, and what is suspicious, the most suspicious first."""

    basis: Basis
    why: str
    """Why these probabilities."""
    checked: int
    left_out: dict[str, int]
    """Why labels were not looked at -> how many."""
    suspects: tuple[Suspect, ...]

    @property
    def summary(self) -> str:
        """One line."""
        return f"{self.checked} labels, {len(self.suspects)} of which may be wrong"


class _Labelled(NamedTuple):
    sample: Sample
    label: str
    people: tuple[str, ...]


def find_noise(
    found: Sequence[Sample],
    *,
    now: float,
    basis: Basis | None = None,
    people: int = 1,
    classes: Mapping[str, Sequence[str]] | None = None,
) -> NoiseCheck:
    """Look for labels that may be wrong.

    Args:
        found: Samples, oldest first.
        now: Seconds since 1970; images that may not be kept any longer are not looked at.
        basis: Where probabilities come from; `images` by default where they suffice.
        people: So many have to agree before a sample is labelled.
        classes: First digits of a model's digest -> its classes, for probabilities that devices did not send.

    Raises:
        SampleError: no label can be looked at in this way.

    """
    left_out: Counter[str] = Counter()
    labelled = _labelled(found, people, left_out)
    images = {one.sample.key: image for one in labelled if (image := allowed_image(one.sample, now)) is not None}
    enough = _of_common_classes([one for one in labelled if one.sample.key in images])
    why = "as asked for"
    if basis is None:
        possible = len(enough) >= MIN_IMAGES and len({one.label for one in enough}) > 1
        basis = "images" if possible else "model"
        why = (
            "they know nothing of the model's mistakes"
            if possible
            else f"{len(enough)} images of classes with {_MIN_OF_CLASS} labels or more; {MIN_IMAGES} of two are needed"
        )
    if basis == "images":
        left_out["no image"] = len(labelled) - len(images)
        left_out[f"a class with fewer than {_MIN_OF_CLASS} labels"] = len(images) - len(enough)
        checked, names, probabilities = _from_images(enough, images, left_out)
    else:
        checked, names, probabilities = _from_model(labelled, classes or {}, left_out)
    return NoiseCheck(
        basis=basis,
        why=why,
        checked=len(checked),
        left_out={reason: count for reason, count in left_out.items() if count},
        suspects=tuple(_suspects(checked, names, probabilities)),
    )


def objections(check: NoiseCheck, *, now: float) -> list[tuple[Key, Said]]:
    """What makes the suspicious labels disputed, until a person says more; for `records.say`.

    The suggested label is not in them: whoever sees a guess tends to agree with it.
    """
    word = Said(label=UNKNOWN, person=OBJECTION, at=now, source=OBJECTION)
    return [(suspect.sample.key, word) for suspect in check.suspects]


def render(check: NoiseCheck, *, now: float) -> str:
    """The labels as an HTML page, with those images that may still be kept."""
    from eyas_host.report.sample_labels import SampleLabel, render_sample_labels

    rows = [
        SampleLabel(
            path=name_of(one.sample),
            image=allowed_image(one.sample, now),
            label=one.given,
            suggested=one.suggested,
            probability=one.probability,
            of_suggested=one.of_suggested,
            people=", ".join(one.people),
        )
        for one in check.suspects
    ]
    return render_sample_labels("Samples of the fleet", check.summary, LEADS[check.basis], rows, check.left_out)


def _labelled(found: Sequence[Sample], people: int, left_out: Counter[str]) -> list[_Labelled]:
    """One labelled sample an image, the first that was sent, with who gave its label.

    Labels that were objected to before, and that a person has confirmed or changed since, are settled.
    """
    states = verdicts(found, people=people)
    same: defaultdict[str | Key, list[Sample]] = defaultdict(list)
    for sample in found:
        same[sample.event.image or sample.key].append(sample)
    chosen = []
    for samples in same.values():
        first = min(samples, key=lambda sample: sample.event.time)
        state, label = states[first.key]
        if state != "labelled":
            continue
        left_out["the same image again"] += len(samples) - 1
        words = [said for sample in samples for said in sample.said]
        if any(said.source == OBJECTION for said in words):
            left_out["looked at again since an earlier check"] += 1
            continue
        by = tuple(sorted({said.person for said in words if said.label == label}))
        chosen.append(_Labelled(first, label, by))
    return chosen


def _of_common_classes(labelled: Sequence[_Labelled]) -> list[_Labelled]:
    counts = Counter(one.label for one in labelled)
    return [one for one in labelled if counts[one.label] >= _MIN_OF_CLASS]


def _from_model(
    labelled: Sequence[_Labelled], classes: Mapping[str, Sequence[str]], left_out: Counter[str]
) -> tuple[list[_Labelled], list[str], Floats]:
    """Labels to look at, names of the classes, and what devices sent, [labels, classes]; rows sum to 1."""
    known: defaultdict[str, set[str]] = defaultdict(set)
    for one in labelled:
        event = one.sample.event
        known[event.digest] |= {*event.top, event.label, *classes.get(event.digest, ())}
    checked = []
    for one in labelled:
        event = one.sample.event
        if one.sample.hides_guess:
            left_out["judges the model itself: only --by images may look at it"] += 1
        elif not event.top:
            left_out["no probabilities from the device"] += 1
        elif one.label not in known[event.digest]:
            left_out["a class that its model does not have"] += 1
        else:
            checked.append(one)
    names = sorted({name for one in checked for name in known[one.sample.event.digest]})
    column = {name: number for number, name in enumerate(names)}
    probabilities = np.zeros((len(checked), len(names)))
    for row, one in zip(probabilities, checked, strict=True):
        event = one.sample.event
        for name, probability in event.top.items():
            row[column[name]] = max(float(probability), 0.0)
        others = [column[name] for name in known[event.digest] - {*event.top}]
        if others:
            row[others] = max(0.0, 1.0 - row.sum()) / len(others)
        row /= row.sum() or 1.0
    return checked, names, probabilities


def _from_images(
    labelled: Sequence[_Labelled], images: Mapping[Key, bytes], left_out: Counter[str]
) -> tuple[list[_Labelled], list[str], Floats]:
    """Labels to look at, names of the classes, and out-of-fold probabilities, [labels, classes]."""
    from eyas_device.preprocess import decode
    from eyas_host.data.duplicates import cluster_hashes, perceptual_hash

    readable, pixels = [], []
    for one in labelled:
        try:
            pixels.append(decode(images[one.sample.key]))
        except ImageError:
            left_out["an image that cannot be read"] += 1
        else:
            readable.append(one)
    names = sorted({one.label for one in readable})
    if len(names) < 2:
        raise SampleError(
            f"--by images: labels of two classes, {_MIN_OF_CLASS} images of each, are needed; there are "
            f"{len(readable)} of {len(names)}. --by model needs none"
        )
    labels = np.array([names.index(one.label) for one in readable])
    hashes = np.frombuffer(b"".join(map(perceptual_hash, pixels)), np.uint8).reshape(len(pixels), -1)
    groups = cluster_hashes(hashes, _MAX_BITS)
    if len(np.unique(groups)) < 2:
        raise SampleError(f"--by images: all {len(readable)} look alike, and none can judge another. --by model can")
    probabilities, judged = _out_of_fold(_features(pixels), labels, groups)
    left_out["all others of its class look like it"] += int(np.count_nonzero(~judged))
    return [one for one, can in zip(readable, judged, strict=True) if can], names, probabilities[judged]


def _out_of_fold(
    features: npt.NDArray[np.float32], labels: npt.NDArray[np.int64], groups: Any
) -> tuple[Floats, npt.NDArray[np.bool_]]:
    """Probabilities [labels, classes] of classifiers that saw no image of the same group; 0 for classes unseen.

    And whether its classifier saw the class of each label: else its probability of 0 says nothing, [labels].
    """
    import warnings

    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedGroupKFold
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    found, judged = np.zeros((len(labels), int(labels.max()) + 1)), np.zeros(len(labels), bool)
    folds = StratifiedGroupKFold(min(FOLDS, len(np.unique(groups))), shuffle=True, random_state=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # a class in fewer groups than folds
        divided = list(folds.split(features, labels, groups))
    for train, held_out in divided:
        seen = np.unique(labels[train])
        judged[held_out] = np.isin(labels[held_out], seen)
        if len(seen) == 1:
            found[held_out, seen[0]] = 1.0
            continue
        classifier = make_pipeline(
            StandardScaler(), LogisticRegression(C=0.1, max_iter=1000, class_weight="balanced")
        ).fit(features[train], labels[train])
        found[np.ix_(held_out, seen)] = classifier.predict_proba(features[held_out])
    return found, judged


def _features(pixels: Sequence[npt.NDArray[np.uint8]]) -> npt.NDArray[np.float32]:
    """Features [images, channels] of the packaged network, which knows none of these images."""
    import torch

    from eyas_device.preprocess import Preprocessing, prepare
    from eyas_host.models.factory import build

    network, _ = build(_NETWORK, 2, "pretrained")
    network.eval()
    spec, found = Preprocessing(size=_SIDE), []
    with torch.inference_mode():
        for first in range(0, len(pixels), _BATCH):
            batch = np.stack([prepare(image, spec) for image in pixels[first : first + _BATCH]])
            found.append(network.pooled(torch.from_numpy(batch).permute(0, 3, 1, 2)).numpy())
    return np.concatenate(found)


def _suspects(checked: Sequence[_Labelled], names: Sequence[str], probabilities: Floats) -> list[Suspect]:
    """Those whose label confident learning takes for wrong, the least probable label first."""
    from cleanlab.filter import find_label_issues

    labels = np.array([names.index(one.label) for one in checked], dtype=np.int64)
    if len(np.unique(labels)) < 2:
        return []  # without a label of another class nothing says how often one is taken for the other
    wrong = find_label_issues(
        labels, probabilities, filter_by="low_self_confidence", return_indices_ranked_by="self_confidence", n_jobs=1
    )
    suspects = []
    for index in map(int, wrong):
        one, best = checked[index], int(probabilities[index].argmax())
        if best != labels[index]:
            suspects.append(
                Suspect(
                    sample=one.sample,
                    given=one.label,
                    suggested=names[best],
                    probability=float(probabilities[index, labels[index]]),
                    of_suggested=float(probabilities[index, best]),
                    people=one.people,
                )
            )
    return suspects


BASES: tuple[Basis, ...] = get_args(Basis)
"""Where probabilities may come from."""
