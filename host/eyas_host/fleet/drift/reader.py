"""Windows of a store in the order of their arrival, summed up by device and step.

A step of a device closes when one of its windows of a later step is there, or when its end is a minute ago. What
arrives for a closed step is late: it is counted and left out. What a reader has of open steps is in memory alone; one
that starts again reads it once more.
"""

from __future__ import annotations

from collections import defaultdict

import msgspec
import numpy as np
from sqlalchemy import func, select

from eyas_device.support.clock import is_plausible
from eyas_host.fleet.drift.measures import MAX_WINDOW_S, STEP_S, Floats, SmallWindow, sums_of
from eyas_host.fleet.store.database import Store
from eyas_host.fleet.store.tables import messages

CHUNK = 20_000
"""Windows read at a time."""
GRACE_S = 60.0
MAX_WINDOWS = 60
"""Windows of one device in one step that count; a device that floods is not read further."""
_AHEAD_S = 300.0
"""A window that is newer than its arrival by more has a wrong time."""
_decoder = msgspec.json.Decoder(SmallWindow)


class Row(msgspec.Struct, frozen=True):
    """A window as stored."""

    device: str
    site: str
    time: float
    received: float
    payload: str


class Read(msgspec.Struct, frozen=True):
    """One window that counts."""

    device: str
    site: str
    step: int
    received: float
    window: SmallWindow
    digest: str


class Counts(msgspec.Struct):
    """What was read, and what was left out."""

    windows: int = 0
    late: int = 0
    """For a step that was closed."""
    refused: int = 0
    """Contradicting themselves, merged over hours, or without predictions."""
    flooded: int = 0
    """Beyond `MAX_WINDOWS` of a device in a step."""
    arms: int = 0
    """Of a model on probation: that is compared elsewhere."""


class OpenStep(msgspec.Struct):
    """A step that is not closed."""

    sums: Floats
    received: float
    """Arrival of its first window."""
    windows: int = 1


def read_rows(store: Store, since: float, until: float) -> list[Row]:
    """The next windows that arrived from `since` on, exclusively, and before `until`; at most about `CHUNK`."""
    c = messages.c
    query = (
        select(c.device, c.site, c.time, c.received, c.payload)
        .where(c.kind == "window", c.problem == "", c.received > since, c.received < until)
        .order_by(c.received)
    )
    with store.reading() as connection:
        rows = [Row(*row) for row in connection.execute(query.limit(CHUNK))]
        if len(rows) == CHUNK:
            last = rows[-1].received
            whole = [row for row in rows if row.received < last]
            if whole:
                return whole
            rows = [Row(*row) for row in connection.execute(query.where(c.received == last))]
    return rows


def newest(store: Store) -> float:
    """Arrival of the newest window, seconds since 1970; 0 without one."""
    query = select(func.max(messages.c.received)).where(messages.c.kind == "window")
    with store.reading() as connection:
        return float(connection.execute(query).scalar_one() or 0.0)


def step_of(row: Row) -> int:
    """Number of the step of a window: by its time, or by its arrival if that is impossible."""
    moment = row.time
    if not is_plausible(moment) or moment > row.received + _AHEAD_S:
        moment = row.received
    return int(moment // STEP_S)


class Steps:
    """Open steps of all devices."""

    def __init__(self) -> None:
        self.open: dict[str, dict[int, OpenStep]] = defaultdict(dict)

    def forget(self, device: str) -> None:
        """Drop what is open of a device."""
        self.open.pop(device, None)

    def is_full(self, device: str, step: int) -> bool:
        """Whether no more windows of a step count."""
        found = self.open.get(device, {}).get(step)
        return found is not None and found.windows >= MAX_WINDOWS

    def add(self, device: str, step: int, received: float, sums: list[float]) -> None:
        """Add one window."""
        of_device = self.open[device]
        found = of_device.get(step)
        if found is None:
            of_device[step] = OpenStep(np.array(sums), received)
        else:
            found.sums += sums
            found.windows += 1
            found.received = min(found.received, received)

    def close(self, now: float) -> list[tuple[str, int, Floats]]:
        """Remove the steps that are closed: device, step, sums; the steps of a device in order."""
        last = int((now - GRACE_S) // STEP_S)
        closed: list[tuple[str, int, Floats]] = []
        for device, steps in self.open.items():
            newest = max(steps, default=-1)
            for step in sorted(steps):
                if step < newest or step < last:
                    closed.append((device, step, steps.pop(step).sums))
        for device in [device for device, steps in self.open.items() if not steps]:
            del self.open[device]
        return closed

    def position(self, read: float) -> float:
        """From where one that starts again has to read, if everything until `read` was read."""
        waiting = [one.received for steps in self.open.values() for one in steps.values()]
        return min([read, *(received - 1e-3 for received in waiting)])


def decode(row: Row) -> SmallWindow | None:
    """The window, None for one that does not count."""
    try:
        window = _decoder.decode(row.payload)
    except msgspec.MsgspecError:
        return None
    return None if window.seconds > MAX_WINDOW_S else window


def digest_of(window: SmallWindow) -> str:
    """What tells the model of a window apart: its digest; agents 0.1.0 send none, then its name."""
    return window.digest[:64] or f"={window.model[:60]}"


def sums(window: SmallWindow, labels: tuple[str, ...]) -> list[float] | None:
    """As `sums_of`."""
    return sums_of(window, labels)
