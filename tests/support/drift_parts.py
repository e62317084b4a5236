"""Shared by the tests of drift: windows of simulated devices, in a store."""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.drift_streams import LABELS, Scripts, days
from eyas_device.telemetry.messages import Sketch, Window, encode
from eyas_host.fleet.drift.fleet_state import Tuning
from eyas_host.fleet.drift.measures import BINS, DIRECTIONS, MAX_LABELS, STEP_S, Floats
from eyas_host.fleet.drift.profile import STEPS_OF_DAY
from eyas_host.fleet.store.database import Batch, Store
from eyas_host.fleet.store.validate import MessageId, ValidMessage

BEGIN = 1_767_916_800.0
"""A midnight, seconds since 1970."""
DAY = 86_400.0
TUNING = Tuning(profile_days=1, calibration_days=1)
NAMES = [f"cam-{number + 1}" for number in range(20)]
DIRTY, START, DAYS = 6, 2.6, 3
"""The camera of the shared fleet that becomes dirty, when, and how long it is followed, days."""


def dirty_camera() -> Scripts:
    """Twenty cameras, one of which becomes dirty."""
    scripts = Scripts.stable(len(NAMES))
    scripts.kind[DIRTY], scripts.strength[DIRTY], scripts.start[DIRTY] = "dirt", 5.0, START * STEPS_OF_DAY
    return scripts


def copy_of(url: str, folder: Path) -> str:
    """URL of a copy of an SQLite store."""
    shutil.copyfile(url.removeprefix("sqlite:///"), folder / "copy.db")
    return f"sqlite:///{folder / 'copy.db'}"


def spool_of(device: str) -> str:
    return str(uuid.uuid5(uuid.NAMESPACE_DNS, device))


def window_of(device: str, step: int, sums: Floats, **more: Any) -> Window:
    """A window that says what the sums of a step say."""
    at = 10 + 2 * DIRECTIONS
    counts = sums[at : at + len(LABELS)].astype(int)
    bins = sums[at + 2 * MAX_LABELS :].reshape(MAX_LABELS + 1, BINS)[: len(LABELS)].astype(int)
    n = int(sums[9])
    mean = sums[10 : 10 + DIRECTIONS] / n
    m2 = np.maximum(sums[10 + DIRECTIONS : at] - n * np.square(mean), 0)
    total = sums[at + MAX_LABELS : at + MAX_LABELS + len(LABELS)]
    fields: dict[str, Any] = {
        "time": BEGIN + (step + 0.97) * STEP_S,
        "model": "parts 1.0.0",
        "digest": "0123456789ab",
        "seconds": float(STEP_S),
        "frames": int(sums[0]),
        "counts": {label: int(count) for label, count in zip(LABELS, counts, strict=True)},
        "confidence_bins": {label: tuple(row.tolist()) for label, row in zip(LABELS, bins, strict=True)},
        "confidence_sum": {
            label: min(round(float(value), 2), float(count))
            for label, value, count in zip(LABELS, total, counts, strict=True)
        },
        "margin": tenths(sums[3] / sums[0], int(sums[0])),
        "entropy": tenths(sums[4] / sums[0], int(sums[0])),
        "sketch": Sketch(n=n, mean=tuple(mean.tolist()), m2=tuple(m2.tolist())),
        "ood_quantile": float(sums[5] / sums[6]),
    }
    return Window(device=device, spool=spool_of(device), sequence=step, **{**fields, **more})


def tenths(mean: float, frames: int) -> tuple[int, ...]:
    """Counts by tenths with about this mean."""
    position = min(max(mean * 10 - 0.5, 0.0), 8.999)
    upper = round(frames * (position % 1))
    found = [0] * 10
    found[int(position)], found[int(position) + 1] = frames - upper, upper
    return tuple(found)


def message(window: Window, site: str = "s") -> ValidMessage:
    id_ = MessageId(site, window.device, window.spool, window.sequence)
    return ValidMessage("window", id_, window, encode(window).decode())


def fill(
    store: Store, names: Sequence[str], scripts: Scripts, count: int, *, seed: int = 0, sites: Sequence[str] = ()
) -> None:
    """Store the windows of `count` days, one for each step, as they would have arrived."""
    for first, batch in batches(names, scripts, count, seed=seed, sites=sites):
        store.add(Batch(BEGIN + first, batch))


def batches(
    names: Sequence[str], scripts: Scripts, count: int, *, seed: int = 0, sites: Sequence[str] = ()
) -> Iterator[tuple[float, list[ValidMessage]]]:
    """Arrival, seconds since `BEGIN`, and the windows that arrive then: those of an hour."""
    where = sites or ["s"] * len(names)
    for number, day in enumerate(days(scripts, count, seed)):
        for hour in range(24):
            batch = [
                message(
                    window_of(name, number * STEPS_OF_DAY + hour * 12 + step, day.sums[hour * 12 + step, row]), site
                )
                for step in range(12)
                for row, (name, site) in enumerate(zip(names, where, strict=True))
            ]
            yield (number * 24 + hour + 1) * 3600.0, batch
