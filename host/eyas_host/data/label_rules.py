"""What a label may be: it names a folder, and no other label looks the same."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Mapping

from eyas_host.support.errors import DataError

LABEL_RULE = "up to 200 bytes of UTF-8 without / or \\, control characters, a dot in front, or blanks at the ends"
_SHOWN = 5
_MAX_LABEL = 200
_JOINERS = "\u200c\u200d"
"""Invisible characters that the spelling of Persian, of Indian languages and of emoji needs."""
_UNSEEN = dict.fromkeys(
    [
        *map(ord, _JOINERS + "\u034f\u115f\u1160\u17b4\u17b5\u180b\u180c\u180d\u2800\u3164\uffa0"),
        *range(0xFE00, 0xFE10),
    ],
    "",
)
"""Characters that count as printable and show nothing."""
_LOOKALIKES = str.maketrans(
    "аеорсухіјѕһԁԛԝΑΒΕΖΗΙΚΜΝΟΡΤΥΧАВЕКМНОРСТУХІЈЅο"  # noqa: RUF001 - Cyrillic and Greek
    "\u0261\u2010\u2011\u2012\u2013\u2014\u2212",
    "aeopcyxijshdqwABEZHIKMNOPTYXABEKMHOPCTYXIJSo" + "g------",
)
"""Letters of other alphabets that look like Latin ones, and the dashes."""


def check_labels(labels: Iterable[str], where: object, lines: Mapping[str, str] = {}) -> None:
    """Raise `DataError` for labels that cannot be used, and for two that nobody can tell apart.

    `lines` says of labels from a table where they are first.
    """
    labels = sorted(labels)
    wrong = [f"{label!r} ({why}{_at(label, lines)})" for label in labels if (why := label_error(label))]
    if wrong:
        more = ", ..." if len(wrong) > _SHOWN else ""
        raise DataError(
            f"{where}: {len(wrong)} label{'s' * (len(wrong) > 1)} cannot be used: "
            f"{', '.join(wrong[:_SHOWN])}{more}; a label is a folder's name: {LABEL_RULE}"
        )
    seen: dict[str, str] = {}
    for label in labels:
        look = appearance(label)
        if seen.setdefault(look, label) != label:
            one, two = (f"{same!a}{_at(same, lines)}" for same in (seen[look], label))
            raise DataError(f"{where}: the labels {one} and {two} look the same; use one spelling")


def _at(label: str, lines: Mapping[str, str]) -> str:
    return f", {lines[label]}" if label in lines else ""


def label_error(label: str) -> str:
    """Why a label cannot be used, it names a folder on many systems; empty if it can."""
    if any(mark in label for mark in "/\\"):
        return "has a path separator"
    if not label.translate({ord(joiner): "" for joiner in _JOINERS}).isprintable():
        return "has a control or invisible character"
    if label.startswith("."):
        return "begins with a dot"
    if label != label.strip() or not label.translate(_UNSEEN).strip():
        return "begins or ends with a blank"
    return "is too long" if len(label.encode()) > _MAX_LABEL else ""


def appearance(label: str) -> str:
    """What is left of a label when all that is hard to see is taken away: two labels with the same one look the same.

    That is Unicode's compatibility form without further blanks, invisible characters, other alphabets' twins of Latin
    letters, and upper case, which is kept where the label is a single letter: `a` and `A` may be a reader's classes.
    """
    look = unicodedata.normalize("NFKC", label.translate(_UNSEEN)).translate(_LOOKALIKES)
    look = " ".join(look.split())
    return look.casefold() if len(look) > 1 else look
