"""What a device does next, from what the repository says and what it has: pure decisions, each with its reason.

Whatever a channel says, no release is installed that is revoked, below the policy's oldest version, older than what
runs (but by a signed roll-back), for another site, board or newer agent, or that was refused here before.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from eyas_device.support.hours import parse_hours
from eyas_device.support.versions import version_numbers
from eyas_device.updates.progress import UpdateRecord
from eyas_device.updates.release import Channel, Policy, Release, Variant, takes_target

MAX_INTERRUPTED = 3
"""Installations of a release that may end without a word (a crash, a kill, a power cut) before it is refused."""


class Held(msgspec.Struct, frozen=True, kw_only=True):
    """The bundle in a slot."""

    slot: str
    name: str
    version: str
    identity: str
    manifest_sha256: str = ""
    current: bool = False
    good: bool = True

    def __str__(self) -> str:
        return f"{self.name} {self.version}"


class Device(msgspec.Struct, frozen=True, kw_only=True):
    """What a decision needs to know of the device."""

    name: str
    site: str
    group: str
    model: str
    """Name of the model that it follows."""
    board: str
    """Its kind: see `eyas_device.board.board_kind`."""
    agent: str
    """Version of its agent."""
    runtimes: tuple[str, ...]
    """Runtimes of artefacts that it can load, the preferred one first; of an agent's release, its platform."""
    minute: int = 0
    """Minute of the day, local time."""
    hours: str = ""
    """Its maintenance hours."""
    clock: str = ""
    """Why its clock is not trusted; empty if it is."""


class Keep(msgspec.Struct, frozen=True):
    """Nothing is done now."""

    reason: str
    wait_min: int = 0
    """Minutes until the maintenance hours that it waits for."""
    current: bool = False
    """Whether the wanted release runs."""


class Refuse(msgspec.Struct, frozen=True):
    """The wanted release is not for this device."""

    reason: str
    rolled_back: bool = False
    """Whether it was installed here and rolled back."""


class Switch(msgspec.Struct, frozen=True):
    """The other slot becomes the current one."""

    held: Held
    reason: str
    revoked: bool = False
    """Whether it is because what runs was revoked, and not because the other slot has the wanted release."""


class Install(msgspec.Struct, frozen=True):
    """The release is fetched and installed."""

    release: Release
    variant: Variant
    refresh: bool = False
    """Whether it runs already, and is installed again as a member of the control group."""


Plan = Keep | Refuse | Switch | Install


def escape_revoked(policy: Policy, held: Sequence[Held]) -> Switch | Keep | None:
    """What to do about a revoked bundle that runs: go to the other slot, or keep it and say so; None if it is not."""
    running = next((one for one in held if one.current), None)
    if running is None or running.identity not in policy.revoked:
        return None
    why = f"{running} was revoked: {policy.revoked[running.identity]}"
    for other in held:
        if not other.current and other.good and other.identity not in policy.revoked:
            return Switch(other, why, revoked=True)
    return Keep(f"{why}; it stays, because the other slot has no good bundle that is not revoked")


def wanted_target(channel: Channel | None, device: Device) -> str | Keep:
    """Target of the release that this device should have now, or why there is none."""
    if channel is None:
        return Keep(f"the channel has no release of {device.model}")
    if channel.model not in ("", device.model):
        return Keep(f"the channel's document is about {channel.model}, not about {device.model}")
    if takes_target(channel, device.group, device.name):
        return channel.target
    if channel.previous:
        return channel.previous
    if channel.rolled_back:
        return Keep("the release was rolled back, and no earlier one is named")
    return Keep("no release is wanted" if not channel.target else f"not in a wave of {channel.rollout or 'it'} yet")


def decide(
    release: Release,
    channel: Channel,
    policy: Policy,
    held: Sequence[Held],
    device: Device,
    record: UpdateRecord,
    *,
    key: str = "",
    now: bool = False,
) -> Plan:
    """Decide about the release that `wanted_target` named.

    Args:
        release: The wanted release.
        channel: What the channel says.
        policy: What no device installs.
        held: The bundles in the slots.
        device: The device.
        record: The last update.
        key: What a refusal depends on besides the release: settings, library versions, the rollout.
        now: Whether somebody asks for it at this moment: outside of maintenance hours, and although it was refused.

    """
    running = next((one for one in held if one.current), None)
    wanted = takes_target(channel, device.group, device.name)
    refresh = False
    if running is not None and running.identity == release.identity:
        refresh = not wanted and device.name in channel.refresh and record.refreshed != channel.rollout
        if not refresh:
            return Keep(f"{running} is up to date", current=True)
    if reason := not_for(release, policy, device):
        return Refuse(reason)
    if running is not None and _is_older(release, running) and not (channel.rolled_back and not wanted):
        if not wanted:
            return Keep(f"{running} is newer than {release.version}, which is for devices outside of the wave")
        return Refuse(
            f"{_title(release)} is older than {running.version}, which runs here; going back takes a signed roll-back"
        )
    other = next((one for one in held if not one.current and one.identity == release.identity and one.good), None)
    if other is not None and record.installed == release.identity and not now:
        return Keep(f"{other} was rolled back by hand; `eyas-device update --now` installs it again")
    if not now and (refusal := _barred(release, record, key)) is not None:
        return refusal
    variant = choose_variant(release, device.runtimes)
    if variant is None:
        kinds = {kind for one in release.variants for kind in (*one.runtimes, one.platform) if kind}
        has = ", ".join(sorted(kinds)) or "none"
        return Refuse(f"{_title(release)} is for {has}; here it is {', '.join(device.runtimes) or 'none'}")
    if not now and (waiting := outside_hours((device.hours, channel.hours), device)) is not None:
        return waiting
    if other is not None:
        return Switch(other, f"{other} is in the other slot already")
    return Install(release, variant, refresh)


def not_for(release: Release, policy: Policy, device: Device) -> str:
    """Why a release may never be installed on this device as it is; empty if it may."""
    title = _title(release)
    if release.model != device.model:
        return f"{title} is another model than {device.model}, which this device follows"
    if release.site not in ("", device.site):
        return f"{title} is for site {release.site} alone; this device belongs to {device.site}"
    if release.identity in policy.revoked:
        return f"{title} was revoked: {policy.revoked[release.identity]}"
    oldest = policy.min_versions.get(release.model, "")
    if oldest and version_numbers(release.version) < version_numbers(oldest):
        return f"{title} is older than {oldest}, the oldest version that may be installed"
    if release.boards and device.board not in release.boards:
        return f"{title} is for {', '.join(release.boards)}; this board is {device.board or 'unknown'}"
    if release.min_agent and version_numbers(release.min_agent) > version_numbers(device.agent):
        return f"{title} needs eyas-device {release.min_agent} or newer; this is {device.agent}: update the agent first"
    return ""


def choose_variant(release: Release, runtimes: Sequence[str]) -> Variant | None:
    """The first variant with an artefact for the most preferred runtime that any variant has; None without one."""
    for runtime in runtimes:
        for variant in release.variants:
            if runtime in (*variant.runtimes, variant.platform):
                return variant
    return None


def outside_hours(hours: Sequence[str], device: Device) -> Keep | None:
    """Why it has to wait for maintenance hours, all of `hours` at once; None within them."""
    waits = []
    for text in filter(None, hours):
        try:
            waits.append((parse_hours(text).wait(device.minute), text))
        except ValueError as error:
            return Keep(f"waits: maintenance hours {error}")
    if not waits:
        return None
    if device.clock:
        return Keep(f"waits for maintenance hours ({waits[0][1]}), which a wrong clock cannot tell: {device.clock}")
    wait, text = max(waits)
    return Keep(f"waits for the maintenance hours {text}", wait_min=wait) if wait else None


def _barred(release: Release, record: UpdateRecord, key: str) -> Refuse | None:
    found = record.barred.get(release.identity)
    if found is not None and found.key == key:
        reason = found.reason or f"{_title(release)} was {found.state} here before"
        return Refuse(reason, rolled_back=found.state == "rolled back")
    if record.identity == release.identity and record.key == key and record.interrupted >= MAX_INTERRUPTED:
        return Refuse(
            f"{record.interrupted} installations of {_title(release)} ended without a word: it is not tried again"
        )
    return None


def _is_older(release: Release, running: Held) -> bool:
    same = release.model == running.name
    return same and version_numbers(release.version) < version_numbers(running.version)


def _title(release: Release) -> str:
    return f"{release.model} {release.version}"
