"""How images are divided into parts: at random within each class, whole groups together, or along time.

Images that are bound together (of one group, near-duplicates) form a unit and go to one part. Units are placed first,
the largest one first, each where it brings all parts nearest to their shares of every class; single images then fill
what is left, class by class.
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
Places = list[int]
"""Images by their number."""

DAY = 86_400.0


def divide(
    images: Sequence[LabelledImage],
    units: Sequence[Places],
    parts: tuple[float, float, float],
    seed: int,
    fold: tuple[int, int] = (0, 0),
) -> tuple[Places, Places, Places]:
    """Training, validation and test, stratified by label x stratum; `units` of two or more images stay whole.

    Within a stratum the order is a seeded permutation and the cut follows largest remainders, so that without units
    every part gets its share to within one image a stratum. With `fold` = (k, n) the test part is the k-th of n
    disjoint folds that cover everything, and the rest is divided as training is to validation.
    """
    rng = np.random.default_rng(seed)
    cells: dict[Cell, Places] = {}
    for place, image in enumerate(images):
        cells.setdefault((image.label, image.stratum), []).append(place)
    orders = {cell: [cells[cell][i] for i in rng.permutation(len(cells[cell]))] for cell in sorted(cells)}
    if not fold[1]:
        chosen = _Places(images, orders, units, parts, seed).cut()
        return chosen[0], chosen[1], chosen[2]
    folds = _Places(images, orders, units, [1 / fold[1]] * fold[1], seed).deal()
    test = set(folds[fold[0]])
    rest = {cell: [place for place in order if place not in test] for cell, order in orders.items()}
    others = [unit for unit in units if unit[0] not in test]
    both = parts[0] + parts[1]
    train, validation = _Places(images, rest, others, [parts[0] / both, parts[1] / both], seed).cut()
    return train, validation, folds[fold[0]]


class _Places:
    """Images in seeded order by cell, some of them bound into units, to be placed into parts of given shares."""

    def __init__(
        self,
        images: Sequence[LabelledImage],
        orders: dict[Cell, Places],
        units: Sequence[Places],
        shares: Sequence[float],
        seed: int,
    ) -> None:
        bound = {place for unit in units for place in unit}
        self.shares = shares
        self.totals = {cell: len(order) for cell, order in orders.items()}
        self.single = {cell: [place for place in order if place not in bound] for cell, order in orders.items()}
        self.parts: list[Places] = [[] for _ in shares]
        self.placed = {cell: [0] * len(shares) for cell in orders}
        loose = Counter[str]()
        for (label, _), single in self.single.items():
            loose[label] += len(single)
        self.scarce = {label for label, count in loose.items() if count < len(shares)}
        self.present: set[tuple[str, int]] = set()
        counts = [Counter((images[place].label, images[place].stratum) for place in unit) for unit in units]
        ties = np.random.default_rng((seed, 1)).permutation(len(units))
        for number in sorted(range(len(units)), key=lambda n: (-len(units[n]), ties[n])):
            part = self._nearest(counts[number])
            self.parts[part] += units[number]
            for cell, count in counts[number].items():
                self.placed[cell][part] += count
                self.present.add((cell[0], part))

    def cut(self) -> list[Places]:
        """Single images fill each part in turn."""
        for cell, single in self.single.items():
            start = 0
            wanted = largest_remainders(self.totals[cell], self.shares)
            for part, size in enumerate(self._left(cell, wanted)):
                self.parts[part] += single[start : start + size]
                start += size
        return self.parts

    def deal(self) -> list[Places]:
        """Single images go to the parts in turn, one each."""
        for cell, single in self.single.items():
            wanted = [len(range(part, self.totals[cell], len(self.parts))) for part in range(len(self.parts))]
            left, part = self._left(cell, wanted), 0
            for place in single:
                while not left[part % len(left)]:
                    part += 1
                left[part % len(left)] -= 1
                self.parts[part % len(left)].append(place)
                part += 1
        return self.parts

    def _nearest(self, unit: Counter[Cell]) -> int:
        """The part to which a unit brings the smallest sum of (have - want)^2 / want.

        A part comes first that lacks a class of the unit, where single images cannot bring that class to all parts.
        """
        scarce = {label for label, _ in unit} & self.scarce
        costs = []
        for part, share in enumerate(self.shares):
            cost = 0.0
            for cell, count in unit.items():
                want = share * self.totals[cell]
                cost += count * (2 * (self.placed[cell][part] - want) + count) / want
            costs.append((-sum((label, part) not in self.present for label in scarce), cost))
        return min(range(len(costs)), key=costs.__getitem__)

    def _left(self, cell: Cell, wanted: Sequence[int]) -> list[int]:
        """How many single images of a cell each part takes."""
        left = [max(0, want - have) for want, have in zip(wanted, self.placed[cell], strict=True)]
        total, single = sum(left), len(self.single[cell])
        return left if total == single else largest_remainders(single, [size / total for size in left])


def divide_by_time(
    images: Sequence[LabelledImage], clusters: Sequence[Places], parts: tuple[float, float, float], gap_days: float
) -> tuple[tuple[Places, Places, Places], dict[str, Places]]:
    """Training, validation and test one after the other in time, and what was set aside, by reason.

    A cut lies between two different moments, nearest to the parts' shares. Images less than the gap behind a cut are
    set aside, and so are near-duplicates (`clusters`) of an image in an earlier part. Every image needs a time.
    """
    times = np.array([image.time for image in images], dtype=np.float64)
    order = np.argsort(times, kind="stable")
    moments, first = np.unique(times[order], return_index=True)
    train_end = moments[_nearest_cut(first, parts[0] * len(order))]
    validation_start = train_end + gap_days * DAY
    validation_end = max(
        moments[_nearest_cut(first, (parts[0] + parts[1]) * len(order))],
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
        for place in cluster:
            if numbers[place] not in (earliest, 3):
                numbers[place] = 4
    train, validation, test, gap, twins = ([int(i) for i in order[numbers[order] == n]] for n in range(5))
    return (train, validation, test), {"gap": gap, "near-duplicate of an earlier part": twins}


def _nearest_cut(first: npt.NDArray[np.int64], wanted: float) -> int:
    """Number of the moment, not the very first, before which lie nearest to `wanted` images."""
    return 1 + int(np.abs(first[1:] - wanted).argmin()) if len(first) > 1 else 0


def largest_remainders(total: int, shares: Sequence[float]) -> list[int]:
    """Whole numbers that add up to `total`, nearest to its `shares`, the largest remainders rounded up."""
    exact = [total * share for share in shares]
    sizes = [int(value) for value in exact]
    for place in sorted(range(len(shares)), key=lambda i: exact[i] - sizes[i], reverse=True)[: total - sum(sizes)]:
        sizes[place] += 1
    return sizes
