"""Usual names of the folders of a data set that is divided into splits already."""

from __future__ import annotations

import itertools
import re
from typing import Literal

SplitName = Literal["train", "validation", "test"]

_WORDS: dict[str, SplitName] = {
    **dict.fromkeys(("train", "training", "trn", "trainval"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "validate", "validating", "dev", "devel"), "validation"),
    **dict.fromkeys(("test", "testing", "tst", "holdout", "heldout", "eval", "evaluation"), "test"),
}
"""Word in lower case -> split."""
_PAIRS = {("hold", "out"): "holdout", ("held", "out"): "heldout", ("train", "val"): "trainval"}
_FILLERS = frozenset(
    {"set", "data", "dataset", "split", "folder", "dir", "image", "images", "img", "imgs", "picture", "pictures"}
    | {"photo", "photos", "pic", "pics", "sample", "samples"}
)
"""Words that say nothing beside the name of a split."""


def split_name(folder: str) -> SplitName | None:
    """The split that a folder of this name usually holds; None if it is no name of one.

    >>> split_name("Train_set"), split_name("test1"), split_name("VALID"), split_name("hold-out images")
    ('train', 'test', 'validation', 'test')
    >>> split_name("train station"), split_name("images"), split_name("contest")
    (None, None, None)
    """
    spaced = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", folder)
    words = re.findall(r"[^\W\d_]+", spaced.lower())
    for one, two in itertools.pairwise(words):
        if joined := _PAIRS.get((one, two)):
            words = [joined, *(word for word in words if word not in (one, two))]
            break
    splits = {_of(word) for word in words if word not in _FILLERS}
    return splits.pop() if len(splits) == 1 else None


def _of(word: str) -> SplitName | None:
    """The split of one word, with or without a filler at its end: `trainset`."""
    if word in _WORDS:
        return _WORDS[word]
    return next((_WORDS[start] for end in _FILLERS if (start := word.removesuffix(end)) in _WORDS), None)
