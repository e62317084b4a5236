"""What the last status of a device says about its connection, for people."""

from __future__ import annotations

import time

from eyas_device.support.clock import is_plausible
from eyas_device.telemetry.messages import Status


def is_connected(status: Status) -> bool:
    """Whether the device is connected as far as the broker knows; a state of a later version counts as connected."""
    return status.state not in ("offline", "lost")


def since(status: Status) -> str:
    """Since when a device is not connected; a last will has the time at which its connection began."""
    if not is_plausible(status.time):
        return "since a time that is not known"
    at = utc(status.time)
    if status.state == "offline":
        return f"since {at}, when it was shut down"
    return f"the broker lost its connection, which began at {at}"


def utc(seconds: float) -> str:
    """A time for people; seconds since 1970."""
    return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(seconds))
