"""What the store knows of the devices of a rollout."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from eyas_device.telemetry.messages import Update
from eyas_host.fleet.rollout.quality import DeviceFigures, device_figures
from eyas_host.fleet.rollout.state import Rollout, Seen
from eyas_host.fleet.status import is_connected
from eyas_host.fleet.store.database import DeviceRecord, Store

_DIGITS = 12


def seen_of(record: DeviceRecord) -> Seen:
    """A device as the engine sees it."""
    status = record.status
    update = status.update or Update()
    return Seen(
        device=record.device,
        site=record.site,
        group=update.group or "default",
        connected=is_connected(status),
        lost=status.state == "lost",
        last_seen=max(record.last_seen, record.status_received),
        digest=status.digest[:_DIGITS],
        model=status.model,
        update=update.state,
        update_digest=update.digest[:_DIGITS],
        rollout=update.rollout,
        reason=update.reason,
        attempts=update.attempts,
        checked=update.checked,
    )


def follows(record: DeviceRecord, *, model: str, channel: str, site: str, without_sites: Collection[str] = ()) -> bool:
    """Whether a device takes its updates of a model from a channel, common or of a site.

    `without_sites` have a channel of their own, which their devices follow instead of the common one.
    """
    update = record.status.update
    if update is None or update.channel != channel or (site and record.site != site):
        return False
    if not site and record.site in without_sites:
        return False
    runs = record.status.model or update.model
    return runs.partition(" ")[0] == model


def devices_of(rollout: Rollout, records: Sequence[DeviceRecord]) -> list[Seen]:
    """The devices that a rollout is for."""
    return [
        seen_of(record)
        for record in records
        if follows(
            record,
            model=rollout.model,
            channel=rollout.channel,
            site=rollout.site,
            without_sites=rollout.without_sites,
        )
    ]


def read_figures(store: Store, rollout: Rollout, index: int) -> Mapping[str, DeviceFigures]:
    """Figures of the devices of a cohort, from their windows."""
    cohort, baseline_s = rollout.state.cohorts[index], rollout.plan.quality.baseline_s
    treated = set(cohort.treated)
    since = cohort.started - baseline_s
    return {
        name: device_figures(
            store.windows(name, since=since), cohort, baseline_s, rollout.digest if name in treated else ""
        )
        for name in (*cohort.treated, *cohort.control)
    }
