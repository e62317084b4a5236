"""The page of drift: one self-contained HTML file with the fleet at a glance and a section with a plot for each alarm.

It reads nothing but what the store keeps of devices with alarms and of some others of their sites, hour by hour.
The template engine escapes all text from the network; only the SVG of `plot` is inserted as it is.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import msgspec
from markupsafe import Markup

from eyas_device.support.logs import clean
from eyas_host.fleet.drift.alarms import Alarm, anchor_of
from eyas_host.fleet.drift.errors import DriftError
from eyas_host.fleet.drift.history import of_alarm, of_device
from eyas_host.fleet.drift.monitor import Monitor
from eyas_host.fleet.drift.plot import PACKAGE, draw
from eyas_host.fleet.drift.records import DriftRecords
from eyas_host.fleet.drift.report import DeviceDrift, devices, states
from eyas_host.fleet.status import utc
from eyas_host.fleet.store.database import Store
from eyas_host.report.page import environment
from eyas_host.support.errors import StageError
from eyas_host.support.files import write_bytes

CLOSED_S = 7 * 86_400.0
"""How long a closed alarm stays on the page, seconds."""
MAX_SECTIONS, MAX_CLOSED, MAX_SITES, MAX_ROWS = 60, 20, 40, 500
"""Alarms with a plot, closed ones, sites by name, and further alarms in a table."""
STATES = ("confirmed", "suspected", "learning", "stable")
_MAX_BAR_SD = 8.0
"""Deviation whose bar is full."""


class Site(msgspec.Struct, frozen=True):
    """Devices of a site by their state."""

    name: str
    devices: int
    counts: Mapping[str, int]

    @property
    def alarms(self) -> int:
        """Devices with an open alarm."""
        return self.counts["confirmed"] + self.counts["suspected"]


class Section(msgspec.Struct, frozen=True, kw_only=True):
    """An alarm on the page."""

    anchor: str
    alarm: Alarm
    plot: Markup | None
    device: DeviceDrift | None = None
    """How the device stands, if its alarm is open."""


def write_page(store: Store, monitor: Monitor, path: Path, now: float, *, site: str = "") -> None:
    """Write the page atomically.

    Args:
        store: The store that `monitor` follows.
        monitor: What is known of the devices.
        path: The file.
        now: Seconds since 1970.
        site: Only devices of this site.

    Raises:
        DriftError: The file cannot be written.

    """
    _write(path, render(store, monitor, now, site=site))


def render(store: Store, monitor: Monitor, now: float, *, site: str = "") -> str:
    """The page; see `write_page`."""
    records = DriftRecords(store)
    stands = {name: state for name, state in states(monitor).items() if not site or monitor.sites.get(name) == site}
    alarms = [alarm for alarm in monitor.alarms.values() if not site or alarm.site == site]
    alarms.sort(key=lambda one: (STATES.index(one.state), -one.e_value, -one.ratio, one.device))
    closed = [
        alarm
        for alarm in records.alarms(closed_since=now - CLOSED_S)
        if not alarm.open and (not site or alarm.site == site)
    ]
    closed.sort(key=lambda one: -one.closed)
    shown = alarms[:MAX_SECTIONS]
    details = {one.device: one for one in devices(monitor, names=[a.device for a in shown])} if shown else {}
    sites = _sites(stands, monitor.sites)
    return (
        environment(PACKAGE)
        .get_template("page.html.j2")
        .render(
            at=now,
            site=site,
            counts={state: sum(value == state for value in stands.values()) for state in STATES},
            devices=len(stands),
            watched=sum(state != "learning" for state in stands.values()),
            verdict="confirmed" if any(a.state == "confirmed" for a in alarms) else "suspected" if alarms else "",
            sites=sites[:MAX_SITES],
            further_sites=len(sites[MAX_SITES:]),
            largest=max((one.devices for one in sites), default=1),
            states=STATES,
            open=[_section(monitor, records, one, now, details.get(one.device)) for one in shown],
            further=alarms[MAX_SECTIONS : MAX_SECTIONS + MAX_ROWS],
            left_out=len(alarms[MAX_SECTIONS + MAX_ROWS :]),
            closed=[_section(monitor, records, one, now, None) for one in closed[:MAX_CLOSED]],
            closed_days=round(CLOSED_S / 86_400),
            utc=utc,
            clean=clean,
            where=where,
            rarity=rarity,
            bar=lambda deviations: round(min(abs(deviations) / _MAX_BAR_SD, 1.0) * 50, 1),
        )
    )


def write_plot(store: Store, monitor: Monitor, device: str, path: Path, now: float) -> None:
    """Write the plot of one device as SVG, atomically.

    Raises:
        DriftError: The store has no hours of it yet, or the file cannot be written.

    """
    series = of_device(monitor, DriftRecords(store), device, now)
    if series is None:
        raise DriftError(
            f"{device}: the store has nothing to draw of it yet; there is something after its next windows"
        )
    _write(path, draw(series, alone=True))


def _write(path: Path, text: str) -> None:
    try:
        write_bytes(path, text.encode())
    except StageError as error:
        raise DriftError(str(error)) from None
    except OSError as error:
        raise DriftError(f"{path}: cannot be written ({error.strerror})") from None


def where(alarm: Alarm) -> str:
    """Which devices drift together."""
    if alarm.scope == "device":
        return "this device alone"
    more = f"this device and {alarm.others} more of "
    return more + (f"site {clean(alarm.site, 64)}" if alarm.scope == "site" else "the fleet")


def rarity(per_month: float) -> str:
    """How often something happens: `once in 12 years`; from alarms in 30 days."""
    months = 1 / max(per_month, 1e-9)
    if months < 1.5:
        return f"{per_month:.2g} times in 30 days"
    years = months * 30 / 365.25
    if years < 2:
        return f"once in {months:.0f} months"
    return f"once in {float(f'{years:.2g}'):,.0f} years" if years < 1e6 else "less than once in a million years"


def _section(monitor: Monitor, records: DriftRecords, alarm: Alarm, now: float, device: DeviceDrift | None) -> Section:
    series = of_alarm(monitor, records, alarm, now)
    anchor = anchor_of(alarm)
    plot = None if series is None else draw(series, id_=anchor + "-plot")
    return Section(anchor=anchor, alarm=alarm, plot=plot, device=device)


def _sites(stands: Mapping[str, str], sites: Mapping[str, str]) -> list[Site]:
    """Sites, those with most alarms first, then by name."""
    counts: dict[str, Counter[str]] = {}
    for device, state in stands.items():
        counts.setdefault(sites.get(device, ""), Counter())[state] += 1
    found = [
        Site(name, of_site.total(), {state: of_site[state] for state in STATES}) for name, of_site in counts.items()
    ]
    return sorted(found, key=lambda one: (-one.counts["confirmed"], -one.alarms, one.name))
