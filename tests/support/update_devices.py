"""Enrolled devices whose agents and updaters run here, in processes of their own."""

from __future__ import annotations

import sys
from pathlib import Path

from eyas_device.updates.slots import Slots
from eyas_host.fleet.broker.enroll import enroll
from eyas_host.fleet.broker.kit import Kit

SITE = "hall"


class EnrolledDevice:
    """A device with a model in its slots. It polls once an hour: hints have to wake its updater.

    Args:
        folder: Where its configuration, its root of trust and its state go.
        kit: The broker's kit, in which it is enrolled.
        name: Its name.
        root: The root of trust.
        url: The repository.
        bundle: What it runs at first.
        fps: Images a second of its fake camera.

    """

    def __init__(
        self, folder: Path, kit: Kit, name: str, root: bytes, url: str, bundle: Path, *, fps: float = 5.0
    ) -> None:
        credentials = enroll(kit.folder, name, site=SITE, broker=f"localhost:{kit.port}").credentials
        self.name, self.state = name, folder / f"{name}-state"
        self.slots = Slots(self.state)
        self.slots.install(bundle)
        (pinned := folder / f"{name}-root.json").write_bytes(root)
        camera = f"fake:?live=1&fps={fps:g}&frames=1000000&size=64x48"
        self._config = folder / f"{name}.toml"
        self._config.write_text(
            f'[device]\nname = "{name}"\nsite = "{SITE}"\nstate = "{self.state}"\n[camera]\nsource = "{camera}"\n'
            f'[telemetry]\nbroker = "localhost:{kit.port}"\nwindow_s = 5.0\n'
            f'ca = "{credentials.ca}"\ncertificate = "{credentials.cert}"\nkey = "{credentials.key}"\n'
            f'[update]\nurl = "{url}"\nroot = "{pinned}"\npoll_s = 3600\n'
        )

    @property
    def commands(self) -> tuple[list[str], list[str]]:
        """What runs its agent, and its updater."""
        words = [sys.executable, "-m", "eyas_device"], ["--config", str(self._config)]
        return [*words[0], "run", *words[1]], [*words[0], "update", "--watch", *words[1]]

    @property
    def versions(self) -> dict[str, bool]:
        """Versions in the slots, and whether each is the current one."""
        return {state.version: state.current for state in self.slots.states() if state.version}

    @property
    def version(self) -> str:
        """The version in the current slot."""
        return next((version for version, current in self.versions.items() if current), "")
