"""What several people's words make of a sample."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Literal, NamedTuple

from eyas_host.fleet.samples.records import UNKNOWN, Key, Sample

State = Literal["open", "needs another person", "labelled", "disputed", "unclear"]
"""In the order in which people should look: disputed ones need a third opinion."""


class Verdict(NamedTuple):
    """What a sample is, as far as people agree."""

    state: State
    label: str = ""
    """The label of a labelled sample."""


def verdict(sample: Sample, *, people: int = 1) -> Verdict:
    """What people's words make of a sample.

    A sample is labelled when `people` say the same and more of them than say anything else; where as many say
    something else it is disputed until one more person decides. `?` is no word for a label, and none against it.
    """
    words = Counter(said.label for said in sample.said if said.label != UNKNOWN)
    if not words:
        return Verdict("unclear") if len(sample.said) >= people else Verdict("open")
    (label, most), *others = words.most_common()
    if others and others[0][1] == most:
        return Verdict("disputed")
    return Verdict("labelled", label) if most >= people else Verdict("needs another person")


def labels_of(found: Iterable[Sample], *, people: int = 1) -> dict[Key, str]:
    """Identity -> label, of the samples that are labelled."""
    verdicts = ((sample.key, verdict(sample, people=people)) for sample in found)
    return {key: one.label for key, one in verdicts if one.state == "labelled"}
