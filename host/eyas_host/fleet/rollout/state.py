"""What is known of a rollout and of the devices that it is for: plain values, stored as JSON."""

from __future__ import annotations

from typing import Literal

import msgspec

from eyas_device.updates.release import Channel, takes_target
from eyas_host.fleet.rollout.plan import Plan
from eyas_host.fleet.rollout.proof import Evidence

Status = Literal["running", "waiting", "paused", "aborting", "aborted", "finished"]
"""`waiting`: between two waves, for `resume` or `approve`; `paused`: no device begins, and nothing is judged."""
ACTIVE: tuple[Status, ...] = ("running", "waiting", "paused", "aborting")
Progress = Literal["done", "failed", "silent", "retrying", "under way", "waiting", "back", "offline"]
"""How far a device of a wave is. `silent`: began, and was lost; `back`: does not have the new version, or not any more,
after an abort; `offline`: not connected, and has not begun."""
UNDER_WAY = ("downloading", "installing", "probation")
"""States of an update, as a device reports it, that are neither its beginning nor its end."""


class Seen(msgspec.Struct, frozen=True, kw_only=True):
    """A device as its last status and the store show it."""

    device: str
    site: str = ""
    group: str = "default"
    connected: bool = True
    lost: bool = False
    """Whether the broker lost it; a regular shutdown is not."""
    last_seen: float = 0.0
    """Arrival of its last message, seconds since 1970."""
    digest: str = ""
    """First 12 hex digits of the identity of the bundle that runs."""
    model: str = ""
    """`name version` of that bundle."""
    update: str = "idle"
    """State of its update."""
    update_digest: str = ""
    """First 12 hex digits of the identity of what the update is to."""
    rollout: str = ""
    """Id of the rollout that asked for the update."""
    reason: str = ""
    attempts: int = 0
    checked: float = 0.0
    """When it last reached the repository, seconds since 1970 by its clock."""


class Figure(msgspec.Struct, frozen=True, kw_only=True):
    """Result of comparing one figure between the devices with the new version and the control group."""

    name: str
    treated: float | None = None
    """Mean change since before the wave, positive where worse; of latency, its logarithm."""
    control: float | None = None
    devices: tuple[int, int] = (0, 0)
    """Devices with the new version and of the control group that were compared."""
    worse: bool = False


class Cohort(msgspec.Struct, frozen=True, kw_only=True):
    """The devices of one wave and the control group that they are compared with; fixed when its figures begin."""

    wave: int
    treated: tuple[str, ...]
    control: tuple[str, ...]
    groups: dict[str, str] = {}
    """Device -> group: only devices of one group are exchangeable."""
    started: float = 0.0
    """Begin of the wave: figures before it are the baseline; seconds since 1970."""
    since: float = 0.0
    """Figures from here on are compared."""
    next_look: float = 0.0
    looks: int = 0
    stopped: dict[str, str] = {}
    """Figure -> assignments that would have stopped at an earlier look, bits as hexadecimal digits."""
    figures: tuple[Figure, ...] = ()
    """Of the last look."""
    short: str = ""
    """Why there is not enough to judge; empty if there is."""
    accepted: bool = False
    """Whether people went on although its figures were worse; it is not looked at any more."""


class Reminder(msgspec.Struct, frozen=True, kw_only=True):
    """When a device that failed is reminded, and how often it was."""

    at: float
    count: int = 0


class RolloutState(msgspec.Struct, frozen=True, kw_only=True):
    """How far a rollout is."""

    status: Status = "running"
    wave: int = -1
    """Index of the wave; -1 before the first."""
    since: float = 0.0
    """Begin of the wave, seconds since 1970."""
    timer: float = 0.0
    """From when the wave's time limit counts: its begin, or when it was resumed."""
    reached: float = 0.0
    """Since when enough devices have committed; 0 if not."""
    bounds: tuple[dict[str, float], ...] = ()
    """For each wave so far: group -> bound of the buckets that take part."""
    control: tuple[str, ...] = ()
    cohorts: tuple[Cohort, ...] = ()
    evidence: Evidence | None = None
    """What labelled disagreements say; None where the plan asks for no proof."""
    worse_accepted: bool = False
    """Whether people went on although the evidence says that the new version is worse."""
    reminders: dict[str, Reminder] = {}
    forgiven: tuple[str, ...] = ()
    """Devices whose failures people went on in spite of: they are not counted any more."""
    rolled_back: bool = False
    """Whether devices go back to the previous version."""
    wants: Literal["", "resume", "approve"] = ""
    """What a person has to do now."""
    reason: str = ""
    """Why it is where it is."""
    only_installed: str = ""
    """What a rollout that knows installations alone would have made of the wave that was stopped."""

    @property
    def shares(self) -> dict[str, float]:
        """Group -> bound of the buckets that take part now."""
        return self.bounds[-1] if self.bounds else {}


class Rollout(msgspec.Struct, frozen=True, kw_only=True):
    """A rollout: what goes where, by which plan, and how far it is."""

    id: str
    model: str
    version: str
    target: str
    """Path of the release's target in the repository."""
    digest: str
    """First 12 hex digits of the release's identity."""
    previous: str = ""
    """Target that devices outside of the waves have; empty: they keep what they have."""
    previous_version: str = ""
    channel: str = "stable"
    site: str = ""
    """The only site that it is for; empty: all."""
    without_sites: tuple[str, ...] = ()
    """Sites whose devices it is not for, because they follow a channel of their own."""
    plan: Plan = Plan()
    created: float = 0.0
    by: str = ""
    note: str = ""
    state: RolloutState = RolloutState()
    revision: int = 0
    """Counts the changes; who changes an older revision than the stored one is refused."""


class Step(msgspec.Struct, frozen=True, kw_only=True):
    """One entry of a rollout's log."""

    what: str
    why: str = ""
    at: float = 0.0
    by: str = ""


def channel_of(rollout: Rollout) -> Channel:
    """The channel that devices should see now, without the time of its signature."""
    state = rollout.state
    if state.rolled_back:  # at once, also outside of the maintenance hours
        return Channel(model=rollout.model, previous=rollout.previous, rollout=rollout.id, rolled_back=True)
    channel = Channel(model=rollout.model, target=rollout.target, hours=rollout.plan.rollout.hours)
    if state.status == "finished":
        return channel
    begins = state.status in ("running", "waiting")
    return msgspec.structs.replace(
        channel,
        previous=rollout.previous,
        rollout=rollout.id,
        shares=dict(state.shares) if begins else {},
        refresh=state.control,
    )


def takes_part(rollout: Rollout, shares: dict[str, float], seen: Seen) -> bool:
    """Whether a device takes the new version with these shares."""
    channel = Channel(target=rollout.target, rollout=rollout.id, shares=shares, refresh=rollout.state.control)
    return takes_target(channel, seen.group, seen.device)
