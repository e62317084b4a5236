"""Eviction from a full spool: in which order messages are merged, stripped and dropped, and how that is counted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec

from eyas_device.telemetry.messages import KINDS, Event, Window, decode, encode, merge
from eyas_device.telemetry.spool.rows import Held, Rows

IN_FLIGHT = 20
"""Messages of a kind that may be sent and not acknowledged yet. The oldest ones of each kind, up to this number, are
never changed: merging a window that was received would count it twice."""
_BATCHES = 16
"""Batches merged from one level before the levels are counted again."""


class Eviction:
    """Eviction policy of the spool; see `eyas_device.telemetry.spool.spool` for its order.

    `count(what, number)` is called inside the evicting transaction.
    """

    def __init__(self, count: Callable[[str, int], None]) -> None:
        self._count = count
        self._level, self._after, self._batches = 0, -1, 0
        """Level to merge next, the sequence to continue after, and the batches left for this level."""
        self._stripped = -1
        """Events up to this sequence have no image any more."""

    def make_room(self, rows: Rows, max_bytes: int) -> None:
        """Evict until the messages take at most `max_bytes`."""
        while rows.used() > max_bytes:
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
        guard = rows.nth("window", IN_FLIGHT - 1)
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
        with rows.transaction():
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
            self._count("merged", merged)
        return merged

    def _strip(self, rows: Rows) -> bool:
        """Remove the images of the oldest events; False if none has one."""
        guard = rows.nth("event", IN_FLIGHT - 1)
        while guard is not None:
            found = rows.of("event", after=max(self._stripped, guard), limit=16)
            if not found:
                break
            self._stripped = found[-1].sequence
            with_images = [held for held in found if held.level]
            if with_images:
                with rows.transaction():
                    for held in with_images:
                        rows.put(_stripped(held))
                    self._count("images", len(with_images))
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
        with rows.transaction():
            rows.delete([sequence])
            self._count(kind, 1)


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
