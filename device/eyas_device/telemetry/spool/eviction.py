"""Eviction from a full spool: in which order messages are merged, stripped and dropped, and how that is counted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import msgspec

from eyas_device.telemetry.messages import KINDS, Event, Window, decode, encode, merge
from eyas_device.telemetry.spool.rows import Held, Rows

IN_FLIGHT = 20
"""Messages of a kind that may be sent and not acknowledged yet."""
MAX_UNDELETED = 16
"""Acknowledged messages that may still be on disk, to be deleted with the next commit."""
GUARD = IN_FLIGHT + MAX_UNDELETED
"""Messages of a kind, the oldest ones, that are never changed: after a kill any of them may have been received, and
merging a window that was received would count it twice."""
_NONE: Mapping[str, int] = {}
_BATCHES = 16
"""Batches merged from one level before the levels are counted again."""


class Losses:
    """Counts of what was evicted, for the next window: in memory, and in the file that they concern."""

    def __init__(self) -> None:
        self.counts: dict[str, int] = {}
        """Kind of loss, as in `Window.lost` -> number that no window reported yet."""
        self.since_start: dict[str, int] = {}
        """The same, reported or not."""

    @contextmanager
    def counted(self, rows: Rows, carried: Mapping[str, int] = _NONE) -> Iterator[Counter[str]]:
        """Commit the block and what it adds to the counter as a whole, or neither.

        `carried` are losses that were counted before, and that the block takes from the window that would report them.
        """
        added: Counter[str] = Counter()
        with rows.transaction:
            yield added
            counts = _sum(_sum(self.counts, added), carried)
            if counts != self.counts:
                self.write(rows, counts)
        self.counts, self.since_start = counts, _sum(self.since_start, added)

    def add(self, added: Mapping[str, int]) -> None:
        """Count losses in memory."""
        self.counts, self.since_start = _sum(self.counts, added), _sum(self.since_start, added)

    def take_over(self, rows: Rows) -> None:
        """Add the counts of an earlier process."""
        self.counts = _sum(self.counts, self._read(rows))

    @staticmethod
    def write(rows: Rows, counts: Mapping[str, int]) -> None:
        """Store counts."""
        rows.set_meta("lost", msgspec.json.encode(counts).decode())

    @staticmethod
    def _read(rows: Rows) -> dict[str, int]:
        """Return the stored counts."""
        try:
            return msgspec.json.decode(str(rows.meta("lost", "{}")), type=dict[str, int])
        except msgspec.DecodeError:
            return {}


class Eviction:
    """Eviction policy of one database; see `eyas_device.telemetry.spool.spool` for its order."""

    def __init__(self, losses: Losses) -> None:
        self._losses = losses
        self._level, self._after, self._batches = 0, -1, 0
        """Level to merge next, the sequence to continue after, and the batches left for this level."""
        self._stripped = -1
        """Events up to this sequence have no image any more."""

    def make_room(self, rows: Rows, max_bytes: int) -> None:
        """Evict until the messages take at most `max_bytes`."""
        while rows.uses_more_than(max_bytes):
            if not (self._merge(rows) or self._strip(rows) or self._drop(rows, "event") or self._drop_oldest(rows)):
                return

    def expire(self, rows: Rows, before: float) -> None:
        """Drop what was appended before a time of the spool's clock."""
        while (oldest := rows.oldest()) is not None and oldest[2] < before:
            self._delete(rows, oldest[0], oldest[1])

    def _merge(self, rows: Rows) -> bool:
        """Merge neighbouring windows of the most frequent level, oldest first; False if none is left.

        Each merge raises the level by one, so that older records become coarser.
        """
        guard = rows.nth("window", GUARD - 1)
        if guard is None:
            return False
        if self._batches and self._merge_level(rows, guard):
            return True
        for level, _ in sorted(rows.levels("window", after=guard).items(), key=lambda item: (-item[1], item[0])):
            self._level, self._after, self._batches = level, -1, _BATCHES
            if self._merge_level(rows, guard):
                return True
        self._batches = 0
        return False

    def _merge_level(self, rows: Rows, guard: int) -> bool:
        windows = rows.of("window", after=max(self._after, guard), limit=128, level=self._level)
        self._after, self._batches = (windows[-1].sequence, self._batches - 1) if windows else (-1, 0)
        return self._merge_pairs(rows, windows) > 0

    def _merge_pairs(self, rows: Rows, windows: list[Held]) -> int:
        merged = 0
        with self._losses.counted(rows) as lost:
            left: Held | None = None
            for right in windows:
                both = None if left is None else _merged(left, right)
                if left is None or both is None:
                    left = right
                    continue
                rows.delete([left.sequence])
                rows.put(both)
                merged += 1
                left = None
            lost["merged"] += merged
        return merged

    def _strip(self, rows: Rows) -> bool:
        """Remove the images of the oldest events; False if none has one."""
        guard = rows.nth("event", GUARD - 1)
        while guard is not None:
            found = rows.of("event", after=max(self._stripped, guard), limit=16)
            if not found:
                break
            self._stripped = found[-1].sequence
            with_images = [held for held in found if held.level]
            if with_images:
                with self._losses.counted(rows) as lost:
                    for held in with_images:
                        rows.put(_stripped(held))
                    lost["images"] += len(with_images)
                return True
        return False

    def _drop_oldest(self, rows: Rows) -> bool:
        """Drop the oldest message other than a status; False if there is none."""
        kinds = [kind for kind in KINDS if kind != "status"]
        firsts = [(first, kind) for kind in kinds if (first := rows.nth(kind, 0)) is not None]
        return bool(firsts) and self._drop(rows, min(firsts)[1])

    def _drop(self, rows: Rows, kind: str) -> bool:
        first = rows.nth(kind, 0)
        if first is not None:
            self._delete(rows, first, kind)
        return first is not None

    def _delete(self, rows: Rows, sequence: int, kind: str) -> None:
        held = rows.get(sequence) if kind == "window" else None
        with self._losses.counted(rows, carried=_NONE if held is None else _carried(held)) as lost:
            rows.delete([sequence])
            lost[kind] += 1


def _sum(a: Mapping[str, int], b: Mapping[str, int]) -> dict[str, int]:
    sums = {what: a.get(what, 0) + b.get(what, 0) for what in [*a, *b]}
    return {what: number for what, number in sums.items() if number}


def _carried(held: Held) -> dict[str, int]:
    """Losses that a window would have reported."""
    try:
        return decode(held.payload, Window).lost
    except msgspec.DecodeError:
        return {}


def _merged(left: Held, right: Held) -> Held | None:
    """Merge two windows under the newer one's identity; None if they cannot be merged."""
    try:
        both = merge(decode(left.payload, Window), decode(right.payload, Window))
    except (ValueError, msgspec.DecodeError):
        return None
    return Held(right.sequence, right.kind, both.merged.bit_length(), encode(both), right.at)


def _stripped(held: Held) -> Held:
    try:
        event = decode(held.payload, Event)
    except msgspec.DecodeError:
        return msgspec.structs.replace(held, level=0)
    policy: dict[str, Any] = {**event.image_policy, "image": "removed: the spool was full"}
    payload = encode(msgspec.structs.replace(event, image="", image_policy=policy))
    return msgspec.structs.replace(held, level=0, payload=payload)
