"""Start a rollout: find the release, what the devices have now, and whom it is for."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from eyas_device.bundle import MANIFEST
from eyas_device.support.versions import version_numbers
from eyas_device.updates.release import AGENT, Channel, Release, release_target
from eyas_host.fleet.commands.send import issuer
from eyas_host.fleet.rollout.observe import follows
from eyas_host.fleet.rollout.plan import Plan, RolloutError
from eyas_host.fleet.rollout.quality import devices_text
from eyas_host.fleet.rollout.records import Records
from eyas_host.fleet.rollout.state import Rollout, Step
from eyas_host.fleet.store.database import DeviceRecord, Store

_DIGITS = 12


class Publisher(Protocol):
    """What the start of a rollout needs of a signed repository."""

    def channel(self, name: str, model: str, site: str = "") -> Channel | None:
        """The channel's document; None if there is none."""

    def releases(self, model: str = "", site: str | None = None) -> Sequence[Release]:
        """The published releases, oldest first."""

    def publish(self, bundle: Path, *, site: str = "", note: str = "") -> Release:
        """Publish a bundle; the same one again changes nothing."""


def start(
    store: Store,
    repository: Publisher,
    source: str,
    plan: Plan,
    *,
    model: str = "",
    channel: str = "stable",
    site: str = "",
    note: str = "",
    clock: Callable[[], float] = time.time,
) -> Rollout:
    """Start a rollout; `eyas rollout run` carries it out.

    Args:
        store: The store that the collectors fill.
        repository: The repository that the devices look at.
        source: Folder of a bundle, which is published first where it is not yet, or the version of a release.
        plan: The plan.
        model: Model of the version; needed where several models have it.
        channel: Channel whose devices it is for.
        site: The only site that it is for; empty: all.
        note: For people: why.
        clock: Seconds since 1970.

    Raises:
        RolloutError: There is no such release, nobody to take it, or no version to go back to.

    """
    records = store.devices()
    release = _release(repository, source, model, site, note)
    shown = repository.channel(channel, release.model, site)
    sites = {record.site for record in records}
    own = {one for one in sites if not site and repository.channel(channel, release.model, one) is not None}
    devices = [r for r in records if follows(r, model=release.model, channel=channel, site=site, without_sites=own)]
    if not devices:
        raise RolloutError(
            f"no device follows channel {channel} of {release.model}{f' at {site}' if site else ''}; "
            "`eyas fleet` lists what each one runs, and --json what it follows"
        )
    target = release_target(release.model, release.version, release.site)
    before = _previous(repository.releases(release.model), shown, devices, release)
    if before is None and plan.rollout.abort == "roll_back":
        raise RolloutError(
            f"no published release of {release.model} is what the devices run now, so none could go back to it: "
            '`eyas publish BUNDLE` it first, or set `abort = "finish"` in the plan'
        )
    _check_newer(release, before, channel)
    now = clock()
    rollout = Rollout(
        id=f"{release.model}-{release.version}",
        model=release.model,
        version=release.version,
        target=target,
        digest=release.identity[:_DIGITS],
        previous=release_target(before.model, before.version, before.site) if before else "",
        previous_version=before.version if before else "",
        channel=channel,
        site=site,
        without_sites=tuple(sorted(own)),
        plan=plan,
        created=now,
        by=issuer(),
        note=note,
    )
    what = f"{release.model} {rollout.previous_version or '?'} -> {release.version} for {devices_text(len(devices))}"
    return Records(store).add(rollout, Step(what=what, why=note, at=now, by=rollout.by))


def _release(repository: Publisher, source: str, model: str, site: str, note: str) -> Release:
    """The release that a folder or a version names."""
    if (Path(source) / MANIFEST).is_file():
        return repository.publish(Path(source), site=site, note=note)
    found = [
        one
        for one in repository.releases(model)
        if one.version == source and one.site in ("", site) and one.model != AGENT
    ]
    models = sorted({one.model for one in found})
    if not found:
        known = ", ".join(f"{one.model} {one.version}" for one in repository.releases(model)[-8:])
        raise RolloutError(
            f"{source}: neither a bundle nor a published version{f' of {model}' if model else ''}; "
            f"published are: {known or 'none'}"
        )
    if len(models) > 1:
        raise RolloutError(f"{source}: a version of {', '.join(models)}; choose one with --model")
    return max(found, key=lambda one: one.site)  # the site's own one, where there are both


def _previous(
    releases: Sequence[Release], shown: Channel | None, devices: Sequence[DeviceRecord], release: Release
) -> Release | None:
    """What devices go back to: what the channel wants of everybody now, else the release that most of them run."""
    others = [one for one in releases if one.identity != release.identity]
    if shown is not None:
        wanted = shown.previous if shown.rollout or shown.rolled_back else shown.target
        if wanted == release_target(release.model, release.version, release.site):
            raise RolloutError(f"{release.model} {release.version} is what the channel wants of all devices already")
        for one in others:
            if release_target(one.model, one.version, one.site) == wanted:
                return one
    runs = Counter(record.status.digest for record in devices if record.status.digest)
    for digest, _ in runs.most_common():
        for one in others:
            if one.identity.startswith(digest):
                return one
    return None


def _check_newer(release: Release, before: Release | None, channel: str) -> None:
    if before is not None and version_numbers(release.version) <= version_numbers(before.version):
        raise RolloutError(
            f"{release.model} {release.version} is not newer than {before.version}, which channel {channel} has: "
            "devices go back by an abort or `eyas revoke` only; pack the bundle with a higher version"
        )
