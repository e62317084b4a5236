"""Correct the times of boards without a clock: a Raspberry Pi starts in the past until it reaches a time server.

A message carries the seconds since its board started, by a clock that never jumps, and the id of that start. So

    time = start of the board + uptime of the message,

where the start is, in this order,

1. that of a message of the same start whose clock was synchronised: its time - its uptime;
2. else the earliest that the arrivals allow: min(arrival - uptime) of its messages, because none arrives before it is
   made. It is late by the shortest delay; a device that is connected sends its status at once;
3. at most the next start of the board - the longest uptime before it: what was made before a power cut and arrived days
   later is dated as if the power had returned at once.

Corrected are messages whose clock was not synchronised, and of boards that cannot tell those with an impossible time.
As better starts become known, stored messages are corrected again.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import msgspec
from sqlalchemy import Connection, case, delete, select, update

from eyas_device.support.clock import is_plausible
from eyas_host.fleet.store.engine import insert_into
from eyas_host.fleet.store.tables import boots, messages

_SAME_S = 1.0
"""Starts that differ by less are the same."""
_REWRITE_S = 10.0
"""Min. time between two corrections of one start's stored messages: each delayed message may improve it a little."""
_AHEAD_S = 86_400.0
"""A clock that is ahead of the collector's by more is wrong."""

Row = dict[str, Any]
"""A row of `messages`, with `synchronised` beside its columns."""
_Key = tuple[str, str]
"""Device and boot id."""


class _Start(msgspec.Struct, kw_only=True):
    """What is known of one start of a board; the columns of `boots`."""

    device: str
    boot: str
    spool: str
    first: int
    uptime: float
    start: float
    exact: int
    written: float
    received: float


class Clocks:
    """Corrects the times of messages before they are stored, and of stored ones. One for each store."""

    def __init__(self, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._monotonic = monotonic
        self._settled: dict[str, str] = {}
        """Device -> boot id of a start that is exact."""
        self._due: dict[_Key, float] = {}
        """When the stored messages of a start may be corrected again."""
        self._waiting: set[_Key] = set()
        """Starts whose stored messages have to be corrected again."""

    def correct(self, connection: Connection, rows: Sequence[Row], received: float) -> None:
        """Set `time` and `corrected` of messages that are about to be stored; they lose `synchronised`."""
        groups: dict[str, dict[str, list[Row]]] = defaultdict(lambda: defaultdict(list))
        for row in rows:
            synchronised, boot = row.pop("synchronised"), row["boot"]
            wrong = synchronised is False or (synchronised is None and not _is_possible(row["time"], received))
            row["corrected"] = int(wrong and boot != "")
            if boot and (wrong or (synchronised and self._settled.get(row["device"]) != boot)):
                groups[row["device"]][boot].append(row)
        if groups:
            known = _known(connection, groups)
            for device in sorted(groups):
                self._correct_device(connection, known[device], groups[device], received)
        self._rewrite_due(connection)

    def _correct_device(
        self, connection: Connection, known: dict[str, _Start], groups: dict[str, list[Row]], received: float
    ) -> None:
        before = {boot: msgspec.structs.replace(start) for boot, start in known.items()}
        for boot, rows in groups.items():
            _observe(known, boot, rows, received)
        _limit(known.values())
        for boot, start in sorted(known.items()):
            old = before.get(boot)
            if old is None:
                start.written = start.start
                insert = insert_into(connection.engine, boots).on_conflict_do_nothing()
                connection.execute(insert, msgspec.structs.asdict(start))
            elif _differs(old, start):
                _save(connection, start)
            key = (start.device, boot)
            if abs(start.start - start.written) > _SAME_S:
                self._waiting.add(key)
                if start.exact:  # it will not become better
                    self._due.pop(key, None)
            if start.exact and key not in self._waiting:
                self._settled[start.device] = boot if boot in groups else self._settled.get(start.device, "")
        for boot, rows in groups.items():
            for row in rows:
                if row["corrected"]:
                    row["time"] = known[boot].start + row["uptime"]

    def _rewrite_due(self, connection: Connection) -> None:
        now = self._monotonic()
        for key in sorted(key for key in self._waiting if self._due.get(key, 0.0) <= now):
            self._due[key] = now + _REWRITE_S
            self._waiting.discard(key)
            rewrite_corrected(connection, key)


def rewrite_corrected(connection: Connection, key: _Key | None = None) -> None:
    """Correct stored messages whose start is better known by now, of all boards or of one start."""
    c = boots.c
    query = select(c.device, c.boot, c.start).where(c.start != c.written).order_by(c.device, c.boot)
    if key is not None:
        query = query.where(c.device == key[0], c.boot == key[1])
    m = messages.c
    for device, boot, start in connection.execute(query).all():
        same = (m.device == device, m.boot == boot, m.corrected == 1)
        connection.execute(update(messages).where(*same).values(time=start + m.uptime))
        connection.execute(update(boots).where(c.device == device, c.boot == boot).values(written=start))


def forget_starts(connection: Connection, before: float) -> None:
    """Delete what is known of starts from which nothing arrived since `before`."""
    connection.execute(delete(boots).where(boots.c.received < before))


def _is_possible(moment: float, received: float) -> bool:
    return is_plausible(moment) and moment <= received + _AHEAD_S


def _known(connection: Connection, devices: Iterable[str]) -> dict[str, dict[str, _Start]]:
    found: dict[str, dict[str, _Start]] = defaultdict(dict)
    for row in connection.execute(select(boots).where(boots.c.device.in_(sorted(devices)))).mappings():
        found[row["device"]][row["boot"]] = _Start(**row)
    return found


def _observe(known: dict[str, _Start], boot: str, rows: Sequence[Row], received: float) -> None:
    """Add what the messages of one start say about it."""
    spool, first = rows[0]["spool"], min(int(row["sequence"]) for row in rows)
    uptime = max(float(row["uptime"]) for row in rows)
    exact = [row["time"] - row["uptime"] for row in rows if not row["corrected"]]
    estimate = exact[-1] if exact else min(received - row["uptime"] for row in rows)
    start = known.get(boot)
    if start is None:
        fields = {"device": rows[0]["device"], "boot": boot, "spool": spool, "first": first, "uptime": uptime}
        fields |= {"start": estimate, "exact": int(bool(exact)), "written": estimate, "received": received}
        known[boot] = msgspec.convert(fields, _Start)
        return
    start.first = min(start.first, first) if start.spool == spool else start.first
    start.uptime, start.received = max(start.uptime, uptime), received
    if exact and not start.exact:
        start.start, start.exact = estimate, 1
    elif not start.exact:
        start.start = min(start.start, estimate)


def _limit(starts: Iterable[_Start]) -> None:
    """Let no estimated start be later than the next one of the same spool allows."""
    by_spool: dict[str, list[_Start]] = defaultdict(list)
    for start in starts:
        by_spool[start.spool].append(start)
    for own in by_spool.values():
        following: _Start | None = None
        for start in sorted(own, key=lambda one: one.first, reverse=True):
            if following is not None and not start.exact:
                start.start = min(start.start, following.start - start.uptime)
            following = start


def _differs(old: _Start, new: _Start) -> bool:
    """Whether it is worth a write: a start by a second, an uptime by ten."""
    return (
        abs(new.start - old.start) > _SAME_S
        or new.exact != old.exact
        or new.first != old.first
        or new.uptime > old.uptime + 10 * _SAME_S
    )


def _save(connection: Connection, start: _Start) -> None:
    c = boots.c
    values = {name: getattr(start, name) for name in ("first", "uptime", "exact", "received")}
    better = case((c.exact > start.exact, c.start), else_=start.start)  # another collector may know better
    same = (c.device == start.device, c.boot == start.boot)
    connection.execute(update(boots).where(*same).values(**values, start=better))
