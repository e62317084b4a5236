"""Hints: retained MQTT messages by which the devices of a group look at the repository at once, not at the next poll.

A hint is `eyas/SITE/group/GROUP/desired` with the channel's document. Devices trust nothing in it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from eyas_device.support.names import check_name
from eyas_device.telemetry.messages import encode, hint_topic
from eyas_device.updates.release import Channel
from eyas_host.fleet.broker.client import BrokerAccess
from eyas_host.fleet.broker.publish import publish_retained

Place = tuple[str, str]
"""Site and group."""


def publish_hints(access: BrokerAccess, hints: Mapping[Place, Channel]) -> None:
    """Publish a retained hint for each site and group, over one connection.

    Raises:
        BrokerUnreachable: The broker cannot be reached, or refuses.
        LinkError: An impossible address or credentials.

    """
    publish_retained(access, dict(_messages(hints.items())), name="eyas-rollout")


def _messages(hints: Iterable[tuple[Place, Channel]]) -> Iterable[tuple[str, bytes]]:
    """Topics and payloads; groups that devices reported under impossible names have no hint."""
    for (site, group), channel in hints:
        try:
            yield hint_topic(check_name(site), check_name(group)), encode(channel)
        except ValueError:
            continue
