"""What a flash installs, the same for every device."""

from __future__ import annotations

import re
from pathlib import Path

import msgspec

from eyas_device.config import read_config
from eyas_host.fleet.connect.preflight import DeviceFacts, Layout
from eyas_host.fleet.connect.ssh import FleetError
from eyas_host.fleet.connect.wheels import environment_name


class InstallPlan(msgspec.Struct, frozen=True, kw_only=True):
    """What to install on every device."""

    bundle: Path
    model: str
    """`name version` of the bundle."""
    manifest_sha256: str
    bundle_bytes: int
    whole_sha256: str = ""
    """sha256 of the manifest of the whole bundle, where `bundle` is reduced to what the device runs."""
    extras: tuple[str, ...] = ()
    """Extras of eyas-device to install."""
    layout: Layout = Layout()
    config: Path | None = None
    credentials: Path | None = None
    """Folder of certificate, key and the authority's certificate."""
    needed: tuple[str, ...] = ()
    """Files that the configuration names and that have to be on the device."""
    wheel: Path | None = None
    """Wheel of eyas-device; None with `python`."""
    wheel_dir: Path | None = None
    offline: bool = False
    python: str | None = None
    """Interpreter on the device that has eyas; no environment is built then."""
    unit: Path | None = None
    service: bool | None = None
    """Whether to install the service; None: where systemd runs and the root is `/`."""
    settle_s: float = 5.0
    """How long a started service has to stay up, seconds."""

    @property
    def accepted(self) -> tuple[str, ...]:
        """sha256 of the manifests that the device may have: the whole bundle holds all that the reduced one does."""
        return (self.manifest_sha256, self.whole_sha256 or self.manifest_sha256)

    def serves(self, facts: DeviceFacts) -> bool:
        """Whether the service is installed on this device."""
        return facts.has_systemd and self.layout.root == "/" if self.service is None else self.service

    def exchanges_agent(self, facts: DeviceFacts) -> bool:
        """Whether root's units for releases of the agent are installed: where they are asked for, or there already."""
        if not self.serves(facts) or self.wheel is None or self.unit is None:
            return False
        asked = facts.agent_updates == "yes" if self.config is None else read_config(self.config).update.agent
        return asked or any(fact[3] in self.layout.agent_units for fact in facts.file_facts)

    def environment(self, facts: DeviceFacts) -> str:
        """Name of the environment that this device needs; empty with `python`."""
        return "" if self.wheel is None else environment_name(self.wheel, facts, self.wheel_dir, self.extras)

    def unit_user(self) -> str:
        """User that the service runs as. Raises `FleetError` if the unit names none."""
        text = self.unit.read_text(encoding="utf-8") if self.unit is not None else ""
        match = re.search(r"^User=([A-Za-z_][A-Za-z0-9_-]*)$", text, re.MULTILINE)
        if match is None:
            raise FleetError(f"{self.unit}: no User= line; the service must not run as root by accident")
        return match[1]
