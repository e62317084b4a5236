"""Assignment of images to splits: stratified at random, by group, or by time.

Linked images (of one group, near-duplicates) form a unit and go to one split. Units are assigned first, in descending
size, each to the split where it brings all splits closest to their fractions of every class; single images then fill
the rest, class by class.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from eyas_host.data.sources import LabelledImage

Floats = npt.NDArray[np.float64]
Cell = tuple[str, str]
"""Label and stratum."""
Indices = list[int]
"""Indices of images."""

DAY = 86_400.0


def assign_stratified(
    images: Sequence[LabelledImage],
    units: Sequence[Indices],
    fractions: tuple[float, float, float],
    seed: int,
    fold: tuple[int, int] = (0, 0),
) -> tuple[Indices, Indices, Indices]:
    """Indices of training, validation and test, stratified by label x stratum; `units` are never divided.

    Within a stratum the order is a seeded permutation and sizes follow largest remainders, so that without units every
    split has its fraction to within one image per stratum. With `fold` = (k, n) the test set is the k-th of n disjoint
    folds that cover all images, and the rest is divided between training and validation by their fractions.
    """
    rng = np.random.default_rng(seed)
    cells: dict[Cell, Indices] = {}
    for index, image in enumerate(images):
        cells.setdefault((image.label, image.stratum), []).append(index)
    orders = {cell: [cells[cell][i] for i in rng.permutation(len(cells[cell]))] for cell in sorted(cells)}
    if not fold[1]:
        chosen = _Assigner(images, orders, units, fractions, seed).fill()
        return chosen[0], chosen[1], chosen[2]
    folds = _Assigner(images, orders, units, [1 / fold[1]] * fold[1], seed).deal()
    test = set(folds[fold[0]])
    rest = {cell: [index for index in order if index not in test] for cell, order in orders.items()}
    others = [unit for unit in units if unit[0] not in test]
    both = fractions[0] + fractions[1]
    train, validation = _Assigner(images, rest, others, [fractions[0] / both, fractions[1] / both], seed).fill()
    return train, validation, folds[fold[0]]


class _Assigner:
    """Assigns images, in seeded order per cell and some linked into units, to splits of requested fractions."""

    def __init__(
        self,
        images: Sequence[LabelledImage],
        orders: dict[Cell, Indices],
        units: Sequence[Indices],
        fractions: Sequence[float],
        seed: int,
    ) -> None:
        linked = {index for unit in units for index in unit}
        self.fractions = fractions
        self.totals = {cell: len(order) for cell, order in orders.items()}
        self.single = {cell: [index for index in order if index not in linked] for cell, order in orders.items()}
        self.splits: list[Indices] = [[] for _ in fractions]
        self.assigned = {cell: [0] * len(fractions) for cell in orders}
        singles = Counter[str]()
        for (label, _), single in self.single.items():
            singles[label] += len(single)
        self.scarce = {label for label, count in singles.items() if count < len(fractions)}
        self.present: set[tuple[str, int]] = set()
        counts = [Counter((images[index].label, images[index].stratum) for index in unit) for unit in units]
        ties = np.random.default_rng((seed, 1)).permutation(len(units))
        for number in sorted(range(len(units)), key=lambda n: (-len(units[n]), ties[n])):
            split = self._closest(counts[number])
            self.splits[split] += units[number]
            for cell, count in counts[number].items():
                self.assigned[cell][split] += count
                self.present.add((cell[0], split))

    def fill(self) -> list[Indices]:
        """Fill the splits one after the other with single images."""
        for cell, single in self.single.items():
            start = 0
            wanted = largest_remainders(self.totals[cell], self.fractions)
            for split, size in enumerate(self._missing(cell, wanted)):
                self.splits[split] += single[start : start + size]
                start += size
        return self.splits

    def deal(self) -> list[Indices]:
        """Deal single images to the splits in turn, one each."""
        for cell, single in self.single.items():
            wanted = [len(range(split, self.totals[cell], len(self.splits))) for split in range(len(self.splits))]
            missing, split = self._missing(cell, wanted), 0
            for index in single:
                while not missing[split % len(missing)]:
                    split += 1
                missing[split % len(missing)] -= 1
                self.splits[split % len(missing)].append(index)
                split += 1
        return self.splits

    def _closest(self, unit: Counter[Cell]) -> int:
        """The split in which a unit leads to the smallest sum of (assigned - wanted)^2 / wanted.

        Splits that lack a class of the unit go first where too few single images have that class.
        """
        scarce = {label for label, _ in unit} & self.scarce
        costs = []
        for split, fraction in enumerate(self.fractions):
            cost = 0.0
            for cell, count in unit.items():
                wanted = fraction * self.totals[cell]
                cost += count * (2 * (self.assigned[cell][split] - wanted) + count) / wanted
            costs.append((-sum((label, split) not in self.present for label in scarce), cost))
        return min(range(len(costs)), key=costs.__getitem__)

    def _missing(self, cell: Cell, wanted: Sequence[int]) -> list[int]:
        """Number of single images of a cell that each split takes."""
        missing = [max(0, size - assigned) for size, assigned in zip(wanted, self.assigned[cell], strict=True)]
        total, single = sum(missing), len(self.single[cell])
        return missing if total == single else largest_remainders(single, [size / total for size in missing])


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


def largest_remainders(total: int, fractions: Sequence[float]) -> list[int]:
    """Integers that add up to `total`, closest to `fractions` of it (largest-remainder method)."""
    exact = [total * fraction for fraction in fractions]
    sizes = [int(value) for value in exact]
    for index in sorted(range(len(exact)), key=lambda i: exact[i] - sizes[i], reverse=True)[: total - sum(sizes)]:
        sizes[index] += 1
    return sizes
