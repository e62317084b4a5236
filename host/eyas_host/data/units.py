"""Units of a data set: images that are not independent of each other, because of a group or near-duplicates.

A unit lies in one split and is drawn as a whole by every bootstrap. Near-duplicates make a unit only where their hashes
say something about the part in front of the camera: where one fixed camera looks at a line, all its images are alike,
whatever their label, and are not duplicates of each other.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import msgspec
import numpy as np

from eyas_host.data.duplicates import Ints, components
from eyas_host.data.sources import LabelledImage

Indices = list[int]
"""Indices of images."""
MAX_FRACTION = 0.1
"""Fraction of a class from which a cluster is not joined."""
_BURST = 5
"""Images of a cluster that are always joined while every split can have the class: shots of one moment."""


class UnjoinedCluster(msgspec.Struct, frozen=True):
    """Near-duplicates that are not kept in one split."""

    images: tuple[str, ...]
    """sha256 of each."""
    why: str


class Units(msgspec.Struct, frozen=True):
    """The units of a data set, as indices of its images."""

    units: tuple[Indices, ...]
    """Of two or more images."""
    clusters: tuple[Indices, ...]
    """Near-duplicates that were joined."""
    unjoined: tuple[UnjoinedCluster, ...]


def find_units(
    images: Sequence[LabelledImage],
    clusters: Sequence[Indices],
    copies: Sequence[tuple[LabelledImage, LabelledImage]],
    *,
    grouped: bool,
    splits: int = 3,
) -> Units:
    """Join near-duplicate `clusters`, and groups if `grouped`, to units; `copies` link the groups of one image.

    A cluster is not joined, but reported, if it has two or more images of each of two labels, if it takes a tenth of a
    class, if it would leave a class with fewer units than `splits`, or if it links groups to such a unit.
    """
    totals = Counter(image.label for image in images)
    joined: list[Indices] = []
    unjoined: list[UnjoinedCluster] = []
    for cluster in clusters:
        why = _why_unjoined(Counter(images[i].label for i in cluster), totals)
        if why:
            unjoined.append(_unjoined(images, cluster, why))
        else:
            joined.append(cluster)
    groups = _groups(images, copies) if grouped else [[i] for i in range(len(images))]
    while True:
        units = _join(len(images), [*groups, *joined])
        dropped = _to_drop(images, units, groups, joined, totals, splits)
        if not dropped:
            return Units(tuple(unit for unit in units if len(unit) > 1), tuple(joined), tuple(unjoined))
        for position, why in sorted(dropped.items(), reverse=True):
            unjoined.append(_unjoined(images, joined.pop(position), why))


def unit_ids(images: Sequence[LabelledImage], clusters: Sequence[Sequence[str]], *, grouped: bool) -> Ints:
    """Unit of each image, int64 [n] from 0: images linked, transitively, by a group or a cluster have the same one.

    `clusters` are near-duplicates as sha256 hashes, also of images that are not in `images`; groups count if `grouped`.
    """
    rows = {image.sha256: row for row, image in enumerate(images)}
    links = [[rows[sha] for sha in cluster if sha in rows] for cluster in clusters]
    ids = np.empty(len(images), dtype=np.int64)
    for number, unit in enumerate(_join(len(images), [*links, *(_groups(images, ()) if grouped else ())])):
        ids[unit] = number
    return ids


def _why_unjoined(counts: Counter[str], totals: Counter[str]) -> str:
    """Why a cluster with these images of each label is not joined; empty if it is."""
    if sum(count > 1 for count in counts.values()) > 1:
        return "has images of several labels"
    label = max(counts, key=lambda label: counts[label] / totals[label])
    if sum(counts.values()) > _BURST and counts[label] >= MAX_FRACTION * totals[label]:
        return f"holds {counts[label]} of the {totals[label]} images of {label!r}"
    return ""


def _to_drop(
    images: Sequence[LabelledImage],
    units: Sequence[Indices],
    groups: Sequence[Indices],
    joined: Sequence[Indices],
    totals: Counter[str],
    splits: int,
) -> dict[int, str]:
    """Positions of joined clusters that must not be joined after all, each with the reason."""
    dropped: dict[int, str] = {}
    unit_of = {index: number for number, unit in enumerate(units) for index in unit}
    of_unit: dict[int, Indices] = {}
    for position, cluster in enumerate(joined):
        of_unit.setdefault(unit_of[cluster[0]], []).append(position)
    largest = {unit_of[group[0]]: 0 for group in groups}
    for group in groups:
        largest[unit_of[group[0]]] = max(largest[unit_of[group[0]]], len(group))
    for number, positions in of_unit.items():
        counts = Counter(images[i].label for i in units[number])
        linking = len(units[number]) > max(largest[number], *(len(joined[position]) for position in positions))
        if linking and any(count >= MAX_FRACTION * totals[label] for label, count in counts.items()):
            dropped |= dict.fromkeys(positions, "links groups that together are a tenth of a class")
    if dropped:
        return dropped
    count = Counter(label for unit in units for label in {images[i].label for i in unit})
    for label in sorted(totals):
        own = [p for p, cluster in enumerate(joined) if any(images[i].label == label for i in cluster)]
        if count[label] < splits and own:
            dropped[max(own, key=lambda p: len(joined[p]))] = f"would leave {count[label]} units of {label!r}"
    return dropped


def _unjoined(images: Sequence[LabelledImage], cluster: Indices, why: str) -> UnjoinedCluster:
    return UnjoinedCluster(tuple(images[i].sha256 for i in cluster), why)


def _groups(images: Sequence[LabelledImage], copies: Sequence[tuple[LabelledImage, LabelledImage]]) -> list[Indices]:
    """Indices of each group's images; two groups that have copies of one image count as one."""
    numbers = {group: number for number, group in enumerate(sorted({p.group for p in images if p.group}))}
    for pair in copies:
        for image in pair:
            numbers.setdefault(image.group, len(numbers))
    ids: dict[int, int] = {}
    for number, linked in enumerate(
        _join(len(numbers), [[numbers[one.group], numbers[two.group]] for one, two in copies])
    ):
        ids |= dict.fromkeys(linked, number)
    groups: dict[int, Indices] = {}
    alone: list[Indices] = []
    for index, image in enumerate(images):
        if image.group:
            groups.setdefault(ids[numbers[image.group]], []).append(index)
        else:
            alone.append([index])
    return [*groups.values(), *alone]


def _join(count: int, links: Sequence[Indices]) -> list[Indices]:
    """Sets of `count` indices that `links` connect, in the order of their first index."""
    pairs = [(link[0], other) for link in links for other in link[1:]]
    if not pairs:
        return [[index] for index in range(count)]
    one, two = np.array(pairs, dtype=np.int64).T
    sets: dict[int, Indices] = {}
    for index, number in enumerate(components(count, one, two).tolist()):
        sets.setdefault(number, []).append(index)
    return list(sets.values())
