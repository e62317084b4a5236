"""Room in a spool that is full: what is given up first, and how it is counted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec

from eyas_device.telemetry.messages import KINDS, Event, Window, decode, encode, merge
from eyas_device.telemetry.spool.rows import Held, Rows

IN_FLIGHT = 20
"""How many messages of a kind may have been sent without having been acknowledged: the oldest so many of each kind are
never changed, because merging a window that has arrived would count it twice."""
_STEPS = 16


class Room:
    """Eviction policy of the spool, in the order that `eyas_device.telemetry.spool.spool` promises.

    `count(what, number)` is called inside the evicting transaction.
    """

    def __init__(self, count: Callable[[str, int], None]) -> None:
        self._count = count
        self._level, self._after, self._steps = 0, -1, 0
        """The level whose windows after a sequence are merged next, and how often until levels are counted."""
        self._stripped = -1
        """Events up to this sequence have lost their images."""

    def make(self, rows: Rows, most_bytes: int) -> None:
        """Give up what is needed for the messages to take `most_bytes` at most."""
        while rows.used() > most_bytes:
            if not (self._merge(rows) or self._strip(rows) or self._drop(rows, "event") or self._drop_oldest(rows)):
                return

    def expire(self, rows: Rows, before: float) -> None:
        """Give up what was appended before that time of the spool's clock."""
        while (oldest := rows.oldest()) is not None and oldest[2] < before:
            self._give_up(rows, oldest[0], oldest[1])

    def _merge(self, rows: Rows) -> bool:
        """Merge neighbouring windows of the level that has the most of them, oldest first; False if none are left.

        A window's level doubles with each merge, so that the farther back, the coarser the record becomes.
        """
        guard = rows.nth("window", IN_FLIGHT - 1)
        if guard is None:
            return False
        if self._steps and self._merge_level(rows, guard):
            return True
        for level, _ in sorted(rows.levels("window", after=guard).items(), key=lambda item: (-item[1], item[0])):
            self._level, self._after, self._steps = level, -1, _STEPS
            if self._merge_level(rows, guard):
                return True
        self._steps = 0
        return False

    def _merge_level(self, rows: Rows, guard: int) -> bool:
        found = rows.of("window", after=max(self._after, guard), limit=128, level=self._level)
        self._after, self._steps = (found[-1].sequence, self._steps - 1) if found else (-1, 0)
        return self._merge_pairs(rows, found) > 0

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
        """Take the images out of the oldest events; False if none has one."""
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
        """Give up whatever is oldest, but for the status; False if there is nothing."""
        kinds = [kind for kind in KINDS if kind != "status"]
        firsts = [(first, kind) for kind in kinds if (first := rows.nth(kind, 0)) is not None]
        return bool(firsts) and self._drop(rows, min(firsts)[1])

    def _drop(self, rows: Rows, kind: str) -> bool:
        first = rows.nth(kind, 0)
        if first is not None:
            self._give_up(rows, first, kind)
        return first is not None

    def _give_up(self, rows: Rows, sequence: int, kind: str) -> None:
        with rows.transaction():
            rows.delete([sequence])
            self._count(kind, 1)


def _merged(left: Held, right: Held) -> Held | None:
    """The window that stands for both, under the identity of the newer one; None if they do not belong together."""
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
    policy: dict[str, Any] = {**event.image_policy, "image": "given up: the spool was full"}
    payload = encode(msgspec.structs.replace(event, image="", image_policy=policy))
    return msgspec.structs.replace(held, level=0, payload=payload)
