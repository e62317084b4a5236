"""What several people's words make of a sample, and of all that show the same image."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple

from eyas_host.fleet.samples.records import OBJECTION, UNKNOWN, Key, Said, Sample

State = Literal["open", "needs another person", "labelled", "disputed", "unclear"]
"""In the order in which people should look: disputed ones need a third opinion."""


class Verdict(NamedTuple):
    """What a sample is, as far as people agree."""

    state: State
    label: str = ""
    """The label of a labelled sample."""


def verdict(said: Sequence[Said], *, people: int = 1) -> Verdict:
    """What people's words make of an image.

    It is labelled when `people` say the same and more words than for anything else do; where as many say something
    else it is disputed until one more person decides. `?` is no word for a label, and none against it. After an
    objection (`OBJECTION`) nothing counts until a person has said a label since.
    """
    given = [one for one in said if one.source != OBJECTION]
    objected = max((one.order for one in said if one.source == OBJECTION), default=0)
    words = Counter(one.label for one in given if one.label != UNKNOWN)
    if not words:
        return Verdict("unclear") if len({one.person for one in given}) >= people else Verdict("open")
    if objected and all(one.order <= objected for one in given if one.label != UNKNOWN):
        return Verdict("disputed")
    (label, most), *others = words.most_common()
    if others and others[0][1] == most:
        return Verdict("disputed")
    agree = {one.person for one in given if one.label == label}
    return Verdict("labelled", label) if len(agree) >= people else Verdict("needs another person")


def verdicts(found: Iterable[Sample], *, people: int = 1) -> dict[Key, Verdict]:
    """What people's words make of each sample.

    What was said of one sample holds for all that have the same image, byte by byte, as a camera that hangs sends them:
    else one image could be trained on under two labels.
    """
    by_image: defaultdict[str | Key, list[Sample]] = defaultdict(list)
    for sample in found:
        by_image[sample.event.image or sample.key].append(sample)
    return {
        sample.key: one
        for same in by_image.values()
        for one in [verdict([said for sample in same for said in sample.said], people=people)]
        for sample in same
    }


def labels_of(found: Iterable[Sample], *, people: int = 1) -> dict[Key, str]:
    """Identity -> label, of the samples that are labelled."""
    return {key: one.label for key, one in verdicts(found, people=people).items() if one.state == "labelled"}
