"""Sets of sequence numbers as sorted, disjoint, inclusive ranges."""

from __future__ import annotations

from collections.abc import Iterable

Range = tuple[int, int]


def as_ranges(numbers: Iterable[int]) -> list[Range]:
    """Convert numbers to ranges."""
    return union((number, number) for number in numbers)


def union(ranges: Iterable[Range]) -> list[Range]:
    """Merge overlapping and adjacent ranges."""
    merged: list[Range] = []
    for first, last in sorted(ranges):
        if merged and first <= merged[-1][1] + 1:
            merged[-1] = (merged[-1][0], max(merged[-1][1], last))
        else:
            merged.append((first, last))
    return merged
