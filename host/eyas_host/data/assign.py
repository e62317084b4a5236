"""Assignment of images to splits: by a hash, stratified and with groups kept whole, or by time.

Every unit (an image, a group, a cluster of near-duplicates) has a place in 0..1 that follows from the seed and its own
key alone. A split takes the units whose place lies in its interval, so further images move nobody. Only where that
misses the split's fraction of a small cell (label x stratum) by much, units next to the border change sides.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence

import msgspec
import numpy as np
import numpy.typing as npt

from eyas_host.data.sources import LabelledImage
from eyas_host.data.units import Indices

Floats = npt.NDArray[np.float64]
Cell = tuple[str, str]
"""Label and stratum."""

DAY = 86_400.0
_SLACK = 0.25
"""By how much a split's size in a small cell may differ from the requested one, relative to that, uncorrected."""
_SMALL, _ORDINARY = 100, 300
"""Units of a cell between which the slack grows to twice that, which a random draw hardly ever exceeds."""


class _Unit(msgspec.Struct, frozen=True):
    images: Indices
    place: float
    """0..1, from the seed and the unit's key."""
    cell: Cell
    """The rarest of its images' cells."""
    labels: frozenset[str]


def assign_stratified(
    images: Sequence[LabelledImage],
    units: Sequence[Indices],
    fractions: tuple[float, float, float],
    seed: int,
    fold: tuple[int, int] = (0, 0),
    *,
    grouped: bool = False,
) -> tuple[Indices, Indices, Indices]:
    """Indices of training, validation and test, stratified by label x stratum; `units` are never divided.

    Units are named by their group if `grouped`, else by an image.

    A split's size in a cell of up to 100 units is within 25 % of its fraction (50 % from 300 units), or one image or
    half a unit if that is more; it varies within that as a random draw does. A class with three units or more reaches
    every split. With `fold` = (k, n) the test set is the k-th of n disjoint folds that cover all images, and the rest
    is divided between training and validation by their fractions.
    """
    drawn = _draw_units(images, units, seed, grouped=grouped)
    train, validation, test = fractions
    if not fold[1]:
        parts = _divide(drawn, (test, validation, train))
    else:
        number, count = fold
        folds = _divide(drawn, (1 / count,) * count)
        end = (number + 1) / count
        rest = [  # in the order of the folds after the test's
            msgspec.structs.replace(unit, place=(unit.place - end) % 1.0 / (1 - 1 / count))
            for index, own in enumerate(folds)
            for unit in own
            if index != number
        ]
        parts = [folds[number], *_divide(rest, (validation / (train + validation), train / (train + validation)))]
    chosen = [sorted(index for unit in part for index in unit.images) for part in parts]
    return chosen[2], chosen[1], chosen[0]


def _draw_units(images: Sequence[LabelledImage], units: Sequence[Indices], seed: int, *, grouped: bool) -> list[_Unit]:
    """All units, also of one image, by their place."""
    cells = Counter((image.label, image.stratum) for image in images)
    linked = {index for unit in units for index in unit}
    drawn = []
    every_label: dict[frozenset[str], frozenset[str]] = {}
    for unit in (*units, *([index] for index in range(len(images)) if index not in linked)):
        own = [images[index] for index in unit]
        labels = frozenset(p.label for p in own)
        digest = hashlib.sha256(f"{seed}:{_key(own, grouped=grouped)}".encode()).digest()
        drawn.append(
            _Unit(
                images=unit,
                place=int.from_bytes(digest[:8]) / 2**64,
                cell=min({(p.label, p.stratum) for p in own}, key=lambda cell: (cells[cell], cell)),
                labels=every_label.setdefault(labels, labels),
            )
        )
    return sorted(drawn, key=lambda unit: unit.place)


def _key(unit: Sequence[LabelledImage], *, grouped: bool) -> str:
    """Name of a unit: its group, or the hash of its earliest image (the smallest hash without times).

    It stays the same when images join, but for an image of the same time with a smaller hash.
    """
    groups = [image.group for image in unit if image.group and grouped]
    if groups:
        return f"group {min(groups)}"
    return min(unit, key=lambda p: (p.time is None, p.time or 0.0, p.sha256)).sha256


def _divide(units: Sequence[_Unit], fractions: Sequence[float]) -> list[list[_Unit]]:
    """Units of each part: those in its interval of 0..1, corrected in small cells."""
    cells: dict[Cell, list[_Unit]] = {}
    for unit in sorted(units, key=lambda unit: unit.place):
        cells.setdefault(unit.cell, []).append(unit)
    parts: list[list[_Unit]] = [[] for _ in fractions]
    for own in cells.values():
        sizes = np.array([len(unit.images) for unit in own], dtype=np.float64)
        places = np.array([unit.place for unit in own])
        start = 0
        for part, stop in zip(parts, _borders(places, sizes, fractions), strict=True):
            part += own[start:stop]
            start = stop
    _complete(parts, fractions)
    return parts


def _borders(places: Floats, sizes: Floats, fractions: Sequence[float]) -> list[int]:
    """Where each part of the ascending `places` [n] ends.

    An end lies at the border of the part's interval, or as near to it as leaves the part, and those behind it, the
    requested sums of `sizes` within the slack.
    """
    total = float(sizes.sum())
    wanted = total * np.asarray(fractions)
    growth = np.clip((len(sizes) - _SMALL) / (_ORDINARY - _SMALL), 0.0, 1.0)
    slack = np.maximum(np.maximum(1.0, sizes.max() / 2), _SLACK * (1.0 + growth) * wanted)
    lowest, highest = np.maximum(0.0, wanted - slack), wanted + slack
    sums = np.concatenate([[0.0], np.cumsum(sizes)])
    ends: list[int] = []
    start = 0
    for part in range(len(fractions) - 1):
        left = total - sums[start]
        low = max(lowest[part], left - highest[part + 1 :].sum())
        high = min(highest[part], left - lowest[part + 1 :].sum())
        natural = max(start, int(np.searchsorted(places, sum(fractions[: part + 1]))))
        taken = sums[start:] - sums[start]
        outside = np.maximum(np.maximum(low - taken, taken - high), 0.0)
        distance = np.abs(np.arange(start, len(sums)) - natural)
        start += int(np.lexsort((distance, outside))[0])
        ends.append(start)
    return [*ends, len(sizes)]


def _complete(parts: list[list[_Unit]], fractions: Sequence[float]) -> None:
    """Give every part a unit of each label, where a label has enough units: the one nearest to the part's interval."""
    counts = [Counter(label for unit in part for label in unit.labels) for part in parts]
    totals = sum(counts, Counter[str]())
    edges = np.concatenate([[0.0], np.cumsum(fractions)])
    for label in sorted(totals, key=lambda label: (totals[label], label)):
        for target in range(len(parts)):
            if counts[target][label]:
                continue
            donors = [
                (-counts[source][label], max(edges[target] - unit.place, unit.place - edges[target + 1]), source, unit)
                for source, part in enumerate(parts)
                for unit in part
                if label in unit.labels and all(counts[source][own] > 1 for own in unit.labels)
            ]
            if not donors:
                continue
            *_, source, unit = min(donors, key=lambda donor: donor[:2])
            parts[source].remove(unit)
            parts[target].append(unit)
            counts[source].subtract(unit.labels)
            counts[target].update(unit.labels)


def assign_divided(
    images: Sequence[LabelledImage], units: Sequence[Indices], fractions: tuple[float, float, float], seed: int
) -> tuple[Indices, Indices, Indices]:
    """Indices of training, validation and test as their folders or tables say (`LabelledImage.split`).

    A split without images takes its fraction of the training images, by their hash.
    """
    names = ("train", "validation", "test")
    own = {name: [i for i, image in enumerate(images) if image.split == name] for name in names}
    missing = [0.0 if own[name] else fraction for name, fraction in zip(own, fractions, strict=True)]
    if any(missing):
        rows = own["train"]
        position = {row: index for index, row in enumerate(rows)}
        inner = [[position[i] for i in unit if i in position] for unit in units]
        parts = assign_stratified(
            [images[row] for row in rows],
            [unit for unit in inner if unit],
            (1.0 - sum(missing), missing[1], missing[2]),
            seed,
        )
        for name, part, fraction in zip(names, parts, missing, strict=True):
            if fraction:
                own[name] = [rows[i] for i in part]
        taken = {*own["validation"], *own["test"]}
        own["train"] = [row for row in rows if row not in taken]
    return own["train"], own["validation"], own["test"]


def assign_by_time(
    images: Sequence[LabelledImage], clusters: Sequence[Indices], fractions: tuple[float, float, float], gap_days: float
) -> tuple[tuple[Indices, Indices, Indices], dict[str, Indices]]:
    """Indices of training, validation and test in temporal order, and of the images set aside, by reason.

    A cut lies between two different times, as close to the fractions as possible. Images within `gap_days` after a cut
    are set aside, and so are near-duplicates (`clusters`) of an image in an earlier split. Every image needs a time.
    """
    times = np.array([image.time for image in images], dtype=np.float64)
    order = np.argsort(times, kind="stable")
    moments, first = np.unique(times[order], return_index=True)
    train_end = moments[_nearest_cut(first, fractions[0] * len(order))]
    validation_start = train_end + gap_days * DAY
    validation_end = max(
        moments[_nearest_cut(first, (fractions[0] + fractions[1]) * len(order))],
        moments[min(len(moments) - 1, np.searchsorted(moments, train_end, side="right"))],
    )
    test_start = validation_end + gap_days * DAY
    numbers = np.select(
        [times < train_end, times < validation_start, times < validation_end, times < test_start],
        [0, 3, 1, 3],
        2,
    )
    for cluster in clusters:
        earliest = min((number for number in numbers[cluster] if number < 3), default=3)
        for index in cluster:
            if numbers[index] not in (earliest, 3):
                numbers[index] = 4
    train, validation, test, gap, duplicates = ([int(i) for i in order[numbers[order] == n]] for n in range(5))
    return (train, validation, test), {"gap": gap, "near-duplicate of an earlier split": duplicates}


def _nearest_cut(first: npt.NDArray[np.int64], wanted: float) -> int:
    """Index of the time, from 1, whose number of earlier images is closest to `wanted`."""
    return 1 + int(np.abs(first[1:] - wanted).argmin()) if len(first) > 1 else 0
