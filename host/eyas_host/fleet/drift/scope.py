"""Where drift is: one device, a site, or the fleet. Alarms of about the same time are taken together."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence

from msgspec.structs import replace

from eyas_host.fleet.drift.alarms import Alarm
from eyas_host.fleet.drift.causes import advise

TOGETHER_S = 3 * 86_400.0
"""Alarms that began within this time may have one cause."""
MIN_DEVICES, MIN_SHARE = 3, 0.3
"""Devices of a site, and share of its devices, that make an alarm one of the site."""
MIN_SITES = 2


def place(alarms: Mapping[str, Alarm], sites: Mapping[str, str]) -> dict[str, Alarm]:
    """Say of each open alarm whether it is the device's own, its site's or the fleet's, and what that means.

    Args:
        alarms: Device -> open alarm.
        sites: Device -> site, of all devices that are followed.

    """
    devices_of = Counter(sites.values())
    placed: dict[str, Alarm] = {}
    drifting = [site for site in devices_of if _is_of_site(_around(alarms.values(), site), devices_of[site])]
    whole_fleet = [alarm for alarm in alarms.values() if alarm.site in drifting]
    for device, alarm in alarms.items():
        near = [other for other in _around(alarms.values(), alarm.site) if _together(other, alarm)]
        of_fleet = [other for other in whole_fleet if _together(other, alarm)]
        spread = {other.site for other in of_fleet}
        if alarm.site in spread and len(spread) >= MIN_SITES and len(of_fleet) >= MIN_SHARE * len(sites):
            scope, group = "fleet", of_fleet
        elif _is_of_site(near, devices_of[alarm.site]) and devices_of[alarm.site] > 1:
            scope, group = "site", near
        else:
            scope, group = "device", [alarm]
        placed[device] = advise(replace(alarm, scope=scope, others=len(group) - 1), group)
    return placed


def _around(alarms: Iterable[Alarm], site: str) -> list[Alarm]:
    return [alarm for alarm in alarms if alarm.site == site]


def _together(a: Alarm, b: Alarm) -> bool:
    return abs(a.since - b.since) <= TOGETHER_S


def _is_of_site(alarms: Sequence[Alarm], devices: int) -> bool:
    """Whether as many devices of a site drift at about one time as a single cause would need."""
    if len(alarms) < MIN_DEVICES:
        return False
    groups: dict[str, int] = defaultdict(int)
    for alarm in alarms:
        groups[alarm.id] = sum(_together(alarm, other) for other in alarms)
    return max(groups.values()) >= max(MIN_DEVICES, MIN_SHARE * devices)
