"""The virtual environment of a device: with what the script of `eyas_device.updates.environment` builds it."""

from __future__ import annotations

from eyas_host.fleet.connect.preflight import DeviceFacts
from eyas_host.fleet.deploy.plan import InstallPlan


def build_arguments(plan: InstallPlan, facts: DeviceFacts, incoming: str) -> list[str]:
    """Arguments of `BUILD`."""
    site = "--system-site-packages" if facts.picamera2 == "yes" else ""
    extras = f"[{','.join(plan.extras)}]" if plan.extras else ""
    how = "unpack" if plan.offline else "index"
    return [f"{plan.layout.opt}/{plan.environment(facts)}", facts.python, f"{incoming}/files", site, extras, how]
