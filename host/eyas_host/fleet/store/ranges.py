"""Sets of sequence numbers as sorted, disjoint, inclusive ranges."""

from __future__ import annotations

from collections.abc import Iterable

Range = tuple[int, int]


def as_ranges(numbers: Iterable[int]) -> list[Range]:
    """The ranges that hold exactly these numbers."""
    return union((number, number) for number in numbers)


def union(ranges: Iterable[Range]) -> list[Range]:
    """The same numbers in as few ranges as possible."""
    joined: list[Range] = []
    for first, last in sorted(ranges):
        if joined and first <= joined[-1][1] + 1:
            joined[-1] = (joined[-1][0], max(joined[-1][1], last))
        else:
            joined.append((first, last))
    return joined
