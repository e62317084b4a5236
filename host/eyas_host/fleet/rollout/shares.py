"""Which devices take part in a wave, and which are the control group: both by the hash of their names.

A share of a wave counts the devices that are known: the bound between two buckets is placed so that exactly so many are
below it. A device that joins later takes part if its bucket is below the bound, too. Bounds only grow, so who is in a
wave is in every later one. Assignment by a hash is random, which the comparison of both arms relies on.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence

from eyas_device.updates.release import ALL_GROUPS, bucket
from eyas_host.fleet.rollout.plan import Wave
from eyas_host.fleet.rollout.quality import MAX_DEVICES
from eyas_host.fleet.rollout.state import Seen

_EPSILON = 1e-9
"""0.1 x 30 is 3.0000000000000004, and still means three devices."""


def count_of(share: float, devices: int) -> int:
    """Devices that a share of so many is, rounded up."""
    return min(devices, math.ceil(share * devices - _EPSILON))


def control_group(rollout: str, devices: Collection[Seen], share: float) -> tuple[str, ...]:
    """Choose the control group: of each group with two devices and more, those with the highest buckets.

    About `MAX_DEVICES` at most, spread over the groups: more would not be compared.
    """
    groups: dict[str, list[str]] = defaultdict(list)
    for seen in devices:
        groups[seen.group].append(seen.device)
    chosen = []
    for names in groups.values():
        by_bucket = sorted(names, key=lambda name: bucket(rollout, name))
        enough = math.ceil(MAX_DEVICES * len(names) / len(devices))
        count = min(count_of(share, len(names)), len(names) // 2, enough)
        chosen += by_bucket[len(names) - count :]
    return tuple(sorted(chosen))


def shares_of(
    rollout: str, wave: Wave, devices: Sequence[Seen], control: Sequence[str], before: Mapping[str, float]
) -> dict[str, float]:
    """Group -> bound of the buckets that take part in a wave, as `Channel.shares` holds it.

    Args:
        rollout: Id of the rollout, part of each bucket.
        wave: The wave.
        devices: All devices that the rollout is for.
        control: Names of the control group, who take no part.
        before: The bounds of the wave before.

    """
    after = dict(before)
    named = {*before, wave.group} - {ALL_GROUPS}
    for group in {*before, ALL_GROUPS} if wave.group == ALL_GROUPS else {wave.group}:
        members = [s.device for s in devices if s.group == group or (group == ALL_GROUPS and s.group not in named)]
        buckets = sorted(bucket(rollout, name) for name in set(members) - set(control))
        bound = _bound(buckets, count_of(wave.share, len(members)), wave.share)
        after[group] = max(bound, before.get(group, before.get(ALL_GROUPS, 0.0)))
    return after


def _bound(buckets: Sequence[float], count: int, share: float) -> float:
    """A bound that `count` of the sorted buckets are below, or all of them; without devices, the share itself."""
    if share >= 1 or not buckets:
        return share
    if count >= len(buckets):
        return (buckets[-1] + 1) / 2
    return (buckets[count - 1] + buckets[count]) / 2
