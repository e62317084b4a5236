"""The settings of a collector, and what it reports of itself."""

from __future__ import annotations

import msgspec

from eyas_device.support.names import host_name


class CollectorReport(msgspec.Struct, frozen=True, kw_only=True):
    """Progress of a collector; also one line of `eyas collect --json`."""

    time: float
    state: str
    """Name of a `LinkState` in lower case, e.g. `connected`."""
    detail: str
    """Why it is not connected."""
    store_error: str
    """Why the store cannot write; empty if it can."""
    warning: str
    """Collectors of the group that store elsewhere, so that each store gets only a share; empty if there are none."""
    messages: int
    """Stored since the start."""
    duplicates: int
    """Received and acknowledged again since the start."""
    quarantined: int
    per_second: float
    """Stored messages a second since the previous report."""
    waiting: int
    """Received but not yet committed."""
    lag_s: float
    """Longest time from arrival to commit since the previous report, seconds."""


class CollectorSettings(msgspec.Struct, frozen=True, kw_only=True):
    """Settings of a collector."""

    name: str = msgspec.field(default_factory=host_name)
    """Unique within the group: the broker keeps the session under it. A name as of a device."""
    group: str = "eyas"
    """Collectors of one group share the messages. A name as of a device."""
    receive_maximum: int = 500
    """Max. messages received but not yet committed."""
    batch: int = 500
    """Max. messages in one commit; more is faster where a commit is slow."""
    report_s: float = 5.0
    """Interval of the reports, seconds."""
    drift_s: float = 0.0
    """Interval of the looks for drift, seconds; 0: none."""
    webhook: str = ""
    """Address that alarms are posted to; empty: none."""
    page: str = ""
    """File that the page of drift is written to; empty: none."""
    page_url: str = ""
    """Address at which a web server shows that page; alarms carry it. Empty: none."""
