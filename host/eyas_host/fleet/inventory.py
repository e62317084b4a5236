"""Which device runs which version, who is behind, and why: from the store alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import msgspec

from eyas_device.support.logs import clean
from eyas_device.support.versions import version_numbers
from eyas_device.telemetry.messages import Update
from eyas_host.fleet.status import is_connected
from eyas_host.fleet.store.database import DeviceRecord

_MAX_WHY = 300
_POLLS_S = 3 * 86_400.0
"""A device that has not reached the repository for so long is behind for that reason, seconds."""


class Running(msgspec.Struct, frozen=True, kw_only=True):
    """What a device runs, and what keeps it from the newest version that others of its channel run."""

    device: str
    site: str
    state: str
    model: str
    version: str
    digest: str
    agent: str
    """Version of the agent."""
    agent_update: str = ""
    """State of the agent's own last update by a signed release; empty without one."""
    channel: str = ""
    group: str = ""
    update: str = ""
    rollout: str = ""
    last_seen: float = 0.0
    behind: bool = False
    why: str = ""
    """Why it is behind, or what its last update ended with; empty if it is up to date."""


def inventory(records: Sequence[DeviceRecord], now: float, *, site: str = "", model: str = "") -> list[Running]:
    """List devices, those that are behind first.

    A device is behind if another one of its model and channel runs a newer version.

    Args:
        records: All devices of the store.
        now: Seconds since 1970.
        site: Only devices of this site.
        model: Only devices that run this model.

    """
    found = [_running(record) for record in records]
    newest: dict[tuple[str, str], str] = {}
    for one in found:
        key = (one.model, one.channel)
        if one.model and version_numbers(one.version) >= version_numbers(newest.get(key, "0")):
            newest[key] = one.version
    statuses = {record.device: record for record in records}
    judged = [_judge(one, newest.get((one.model, one.channel), ""), statuses[one.device], now) for one in found]
    chosen = [one for one in judged if site in ("", one.site) and model in ("", one.model)]
    return sorted(chosen, key=lambda one: (not one.behind, not one.why, one.site, one.device))


def summary(devices: Sequence[Running]) -> list[str]:
    """How many devices run each version, the most frequent first."""
    counts = Counter(f"{one.model} {one.version} {one.digest[:7]}".strip() or "no model" for one in devices)
    lines = [f"{count:6}  {clean(name)}" for name, count in counts.most_common()]
    behind = sum(one.behind for one in devices)
    return [*lines, f"{len(devices)} device{'' if len(devices) == 1 else 's'}, {behind} behind"]


def rows(devices: Sequence[Running]) -> list[tuple[str, ...]]:
    """Heading and cells of the table; the reason is the last column."""
    head = ("device", "site", "state", "version", "update", "agent", "why")
    cells = ((d.device, d.site, d.state, d.version or "-", d.update or "-", d.agent or "-", d.why) for d in devices)
    return [head, *cells]


def lines(devices: Sequence[Running], width: int) -> list[str]:
    """The table in `width` columns: long names are cut, and long reasons go on below, indented."""
    cells = [[clean(cell, _MAX_WHY) for cell in row] for row in rows(devices)]
    limits = (20, 10, 8, 12, 11, 7)
    sizes = [min(limit, max(len(row[i]) for row in cells)) for i, limit in enumerate(limits)]
    shown = []
    for row in cells:
        head = "  ".join(_cut(cell, size).ljust(size) for cell, size in zip(row, sizes, strict=False))
        room = width - len(head) - 2
        if len(row[-1]) <= room:
            shown.append(f"{head}  {row[-1]}".rstrip())
        else:
            shown += [head.rstrip(), f"    {_cut(row[-1], width - 4)}"]
    return shown


def _running(record: DeviceRecord) -> Running:
    status, update = record.status, record.status.update or Update()
    model, _, version = status.model.partition(" ")
    return Running(
        device=record.device,
        site=record.site,
        state=status.state,
        model=model,
        version=version,
        digest=status.digest,
        agent=status.agent,
        agent_update="" if status.agent_update is None else status.agent_update.state,
        channel=update.channel,
        group=update.group,
        update="" if status.update is None else update.state,
        rollout=update.rollout,
        last_seen=max(record.last_seen, record.status_received),
    )


def _judge(one: Running, newest: str, record: DeviceRecord, now: float) -> Running:
    """Whether a device is behind the newest version of its channel, and why."""
    status, update = record.status, record.status.update
    behind = bool(newest) and version_numbers(one.version) < version_numbers(newest)
    why = ""
    if not one.model:
        behind, why = True, f"no model runs: {status.refused_reason}" if status.refused_reason else "no model runs"
    elif update is not None and update.state in ("refused", "failed", "rolled back"):
        why = f"{update.model} {update.state}: {update.reason}"
    elif status.refused_model:
        why = f"{status.refused_model} was refused: {status.refused_reason}"
    elif behind and not is_connected(status):
        why = "not connected"
    elif behind and update is None:
        why = "no updates over the air: [update] url is not set; `eyas flash` brings it"
    elif behind and update is not None and update.state in ("downloading", "installing", "probation"):
        why = f"{update.model}: {update.state}"
    elif behind and update is not None and now - update.checked > _POLLS_S:
        why = "has not reached the repository" + (
            f" for {(now - update.checked) / 86_400:.0f} days" * bool(update.checked)
        )
    elif behind:
        why = f"{newest} is there; not in a wave of it yet"
    if update is not None and update.clock and behind:
        why += f"; clock: {update.clock}"
    if (agent := status.agent_update) is not None and agent.state not in ("committed", "idle"):
        text = f"{agent.model}: {agent.state}" + (f": {agent.reason}" if agent.reason else "")
        why = f"{why}; {text}" if why else text
    return msgspec.structs.replace(one, behind=behind, why=why)


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else f"{text[: max(1, width - 1)]}…"
