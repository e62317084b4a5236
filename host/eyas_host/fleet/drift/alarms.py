"""An alarm: what moved, where, since when, how sure, and what to do."""

from __future__ import annotations

from typing import Annotated, Literal, get_args

import msgspec

from eyas_device.support.logs import clean

State = Literal["suspected", "confirmed", "closed"]
STATES: tuple[str, ...] = get_args(State)


class Change(msgspec.Struct, frozen=True, kw_only=True):
    """One measure that moved."""

    measure: str
    """Name of the measure."""
    deviations: float
    """How far it is from the device's profile at present, in standard deviations of a step."""
    usual: float | None = None
    """Mean of the profile."""
    now: float | None = None
    """Mean of about the last day."""


class Alarm(msgspec.Struct, frozen=True, kw_only=True):
    """Drift of one device."""

    id: str = ""
    """UUID."""
    device: str = ""
    """Name of the device."""
    site: str = ""
    """Its site."""
    model: str = ""
    """`name version` that it ran."""
    digest: str = ""
    """First digits of the digest of its manifest."""
    state: Annotated[str, msgspec.Meta(examples=list(STATES))] = "suspected"
    """`suspected`: a chart of the device is above its threshold; `confirmed`: it stands out among all devices, too."""
    opened: float = 0.0
    """When the alarm opened, seconds since 1970."""
    since: float = 0.0
    """When the drift began, as far as the chart tells; seconds since 1970."""
    closed: float = 0.0
    """When the alarm closed; 0 while it is open."""
    why_closed: str = ""
    """Why it closed."""
    leading: str = ""
    """Measure whose chart opened it."""
    ratio: float = 0.0
    """Highest chart as a multiple of its threshold, by now."""
    by_chance: float = 0.0
    """How often such a chart is expected without drift, alarms of one device in 30 days."""
    e_value: float = 0.0
    """Evidence against "no drift": chance reaches it with probability 1 / `e_value` at most."""
    changes: tuple[Change, ...] = ()
    """What moved, most deviations first."""
    families: tuple[str, ...] = ()
    """Which kinds of measures moved: `images`, `spread`, `certainty`, `classes`."""
    ood_reason: str = ""
    """What the device itself says of its images."""
    scope: str = "device"
    """`device`, `site` or `fleet`."""
    others: int = 0
    """Further devices of the same scope with an alarm of about the same time."""
    course: str = ""
    """`lasting`, `periodic` or `new`: too early to say."""
    cause: str = ""
    """Likely cause, for people."""
    advice: str = ""
    """What to do, for people."""
    page: str = ""
    """Address of its section on the page of drift, in messages; empty if no address is known."""

    @property
    def open(self) -> bool:
        """Whether it is not closed."""
        return self.state != "closed"


def anchor_of(alarm: Alarm) -> str:
    """The id of an alarm's section on the page of drift."""
    return f"alarm-{clean(alarm.id, 64)}"
