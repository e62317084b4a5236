"""A rollout for people: where it is, its waves, what the figures say, and what happened."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import msgspec

from eyas_device.support.logs import clean
from eyas_device.updates.release import ALL_GROUPS
from eyas_host.fleet.rollout.cohorts import verdict
from eyas_host.fleet.rollout.engine import WaveCount, count_wave
from eyas_host.fleet.rollout.quality import devices_text
from eyas_host.fleet.rollout.state import Rollout, Seen, Step
from eyas_host.fleet.status import utc

_COLUMNS = ("done", "failed", "silent", "retrying", "under way", "waiting", "back", "offline")
_STEPS = 12


def overview(rollouts: Sequence[Rollout]) -> list[str]:
    """A line for each rollout, in at most 80 columns where names allow."""
    if not rollouts:
        return ["no rollouts yet; `eyas rollout start BUNDLE --waves 1%,10%,100%` starts one"]
    rows = [("rollout", "state", "wave", "channel", "started")]
    rows += [
        (one.id, one.state.status, f"{one.state.wave + 1}/{len(one.plan.wave)}", one.channel, utc(one.created))
        for one in rollouts
    ]
    return list(table(rows))


def details(
    rollout: Rollout, devices: Sequence[Seen], steps: Sequence[Step], now: float, *, engine: str = ""
) -> list[str]:
    """Everything about one rollout.

    Args:
        rollout: The rollout.
        devices: The devices that it is for.
        steps: Its log, oldest first.
        now: Seconds since 1970.
        engine: Who carries it out; empty: nobody.

    """
    state = rollout.state
    where = f", site {rollout.site}" if rollout.site else ""
    lines = [
        f"{rollout.id}: {state.status}, wave {state.wave + 1} of {len(rollout.plan.wave)}",
        f"  {rollout.previous_version or '?'} -> {rollout.version} on channel {rollout.channel}{where}, "
        f"started {utc(rollout.created)} by {rollout.by}",
    ]
    lines += [f"  note: {rollout.note}"] if rollout.note else []
    lines += [f"  {state.reason}"] if state.reason else []
    if state.wants:
        lines.append(f"  next: eyas rollout {state.wants} {rollout.id}")
    if state.status in ("running", "waiting", "aborting") and not engine:
        lines.append("  nobody carries it out: start `eyas rollout run`")
    lines += ["", *_waves(rollout, devices, now), ""]
    lines += [f"  wave {cohort.wave + 1}: {verdict(cohort)}" for cohort in state.cohorts]
    lines += [f"  {state.evidence}"] if state.evidence is not None else []
    lines += [f"  {line}" for line in _log(steps[-_STEPS:])]
    return [clean(line) for line in lines]


def as_json(rollout: Rollout, devices: Sequence[Seen], steps: Sequence[Step], now: float) -> dict[str, Any]:
    """The same for programs."""
    waves = [_count_json(count_wave(rollout, devices, now, number)) for number in range(rollout.state.wave + 1)]
    found: dict[str, Any] = msgspec.to_builtins(rollout)
    return found | {"waves": waves, "steps": msgspec.to_builtins(list(steps))}


def table(rows: Iterable[Sequence[str]], indent: str = "") -> Iterator[str]:
    """Rows with columns as wide as they need to be; text from devices is made printable."""
    cells = [[clean(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for row in cells:
        yield indent + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()


def _waves(rollout: Rollout, devices: Sequence[Seen], now: float) -> Iterator[str]:
    counts = [count_wave(rollout, devices, now, number) for number in range(rollout.state.wave + 1)]
    shown = [name for name in _COLUMNS if name == "done" or any(count.counts.get(name) for count in counts)]
    rows = [("wave", "of", "devices", "installed", *shown)]
    for number, wave in enumerate(rollout.plan.wave):
        share = f"{100 * wave.share:.6g} %" + (f" {wave.group}" if wave.group != ALL_GROUPS else "")
        if number < len(counts):
            count = counts[number]
            figures = [count.members, count.installed, *(count.counts.get(name, 0) for name in shown)]
            rows.append((str(number + 1), share, *map(str, figures)))
        else:
            rows.append((str(number + 1), share, *[""] * (2 + len(shown))))
    yield from table(rows, "  ")
    if rollout.state.control:
        kept = rollout.previous_version or "what they had"
        until = "had until the end" if rollout.state.status == "finished" else "have"
        yield f"  control group, which {until} {kept}: {devices_text(len(rollout.state.control))}"
    if rollout.state.only_installed:
        yield f"  {rollout.state.only_installed}"


def _count_json(count: WaveCount) -> Mapping[str, object]:
    return {"devices": count.members, "installed": count.installed, **count.counts}


def _log(steps: Sequence[Step]) -> Iterator[str]:
    for step in steps:
        why = f": {step.why}" if step.why else ""
        yield f"{utc(step.at)}  {step.by}  {step.what}{why}"
