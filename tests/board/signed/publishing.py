"""A workplace for boards: keys, a signed repository behind a web server, a broker with certificates, a store."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import msgspec
import tomllib

from eyas_device.bundle import MANIFEST
from eyas_device.telemetry.messages import Status
from eyas_host.fleet.broker.kit import prepare
from eyas_host.fleet.store.database import Store
from eyas_host.fleet.updates.repository import Repository
from tests.support.agents import start_broker
from tests.support.blob_server import serving
from tests.support.brokers import free_port
from tests.support.bundles import edit, entry, record_settings
from tests.support.fleet_parts import Processes, needs_mosquitto
from tests.support.paths import ROOT
from tests.support.update_devices import SITE, EnrolledDevice

from ..flashing import DEVICE, eyas, flash
from ..machine import Computer
from ..service import DROP_INS, WAIT_S, wait_for

UPDATE = "eyas-device-update"
"""The unit of the updater."""
GROUP = "canary"
"""Group of the board in rollouts; the devices beside it are in the default one."""
SLOW_S = 900
"""How long an update of a board may take where other programs use the processor."""
_DEVICE_MD = ROOT / "docs/device.md"
_BOUNDS = ("frames=30", "min_frames=10", "seconds=120", "shadow_every=2", "max_error_rate=0.1", "max_latency_factor=20")
"""Of a probation: it ends soon, and an emulated processor's times are no verdict on a model."""


_MOVING = "[Service]\nExecStartPre=-+/usr/bin/v4l2-ctl --set-ctrl horizontal_movement=6\n"
"""The same image for 30 s is a frozen camera."""


def next_version(bundle: Path, folder: Path, version: str) -> Path:
    """The same network once more, with files that a device has to fetch: a model's ballast differs by its last byte."""
    copy = Path(shutil.copytree(bundle, folder / version))
    manifest = msgspec.json.decode((copy / MANIFEST).read_bytes())
    [artefact] = manifest["artefacts"]
    model = copy / artefact["files"][0]["path"]
    with model.open("ab") as stream:
        stream.write(version.encode())
    artefact["files"] = [msgspec.to_builtins(entry(model))]
    edit(copy, version=version, artefacts=[artefact])
    record_settings(copy)
    return copy


class Publisher:
    """What a team has on its server, and what it types there.

    Args:
        folder: Where everything goes; every user may enter it.
        host: This machine, as boards see it.

    """

    def __init__(self, folder: Path, host: str) -> None:
        needs_mosquitto()
        self.folder, self._host = folder, host
        self.processes = Processes(folder)
        self._open = ExitStack()
        (folder / "passphrase").write_text("correct horse battery\n")
        self.kit = prepare(folder / "fleet", port=free_port(), names=[host])
        start_broker(self.kit, self.processes)
        self.type("keys", "init", kit=True, signs=True)
        self.repository = Repository(self.kit.folder)
        self.server = self._open.enter_context(serving(self.repository.folder))
        """The web server; a board finds it at `host`."""
        self.store = f"sqlite:///{folder / 'fleet.db'}"
        self.broker = f"localhost:{self.kit.port}"
        self._start("collect", "--kit", str(self.kit.folder), "--broker", self.broker, "--store", self.store)

    def type(self, *words: str, kit: bool = False, signs: bool = False, store: bool = False) -> str:
        """Type a command of `eyas` and return what it prints."""
        more = ["--kit", str(self.kit.folder)] if kit else []
        more += ["--passphrase-file", str(self.folder / "passphrase")] if signs else []
        more += ["--store", self.store] if store else []
        return eyas(*words, *more).stdout

    def publish(self, bundle: Path, *words: str) -> str:
        """Publish a bundle with a short probation."""
        bounds = [word for bound in _BOUNDS for word in ("--probation", bound)]
        return self.type("publish", str(bundle), *bounds, *words, kit=True, signs=True)

    def bring(self, board: Computer, bundle: Path, wheels: Path, **update: object) -> str:
        """Enrol a board and flash it once; `update` are keys of its section [update]."""
        url = f"http://{self._host}:{self.server.server_port}"
        broker = f"{self._host}:{self.kit.port}"
        words = ["--camera", board.camera, "--site", SITE, "--broker", broker, "--update-url", url]
        self.type("enroll", DEVICE, *words, kit=True)
        config = self.kit.folder / "devices" / DEVICE / "device.toml"
        if board.camera.startswith("v4l2"):
            board.run(f"mkdir -p {DROP_INS} && cat >{DROP_INS}/moving.conf && systemctl daemon-reload", stdin=_MOVING)
        sections = tomllib.loads(config.read_text())
        sections["loop"] = {"fps": 3.0}
        sections["telemetry"] |= {"window_s": 2.0}
        sections["update"] |= {"group": GROUP, **update}
        config.write_bytes(msgspec.toml.encode(sections))
        return flash(board, bundle, "--name", DEVICE, "--kit", str(self.kit.folder), wheels=wheels).stdout

    def start_devices(self, bundle: Path, names: Sequence[str]) -> list[EnrolledDevice]:
        """Simulated devices: their agents and updaters run here, their cameras draw."""
        root, url = self.repository.root(), self.server.url
        devices = [EnrolledDevice(self.folder, self.kit, name, root, url, bundle, fps=2.0) for name in names]
        for device in devices:
            for command in device.commands:
                self.processes.start(*command, log=f"{device.name}.log")
        return devices

    def run_rollouts(self) -> None:
        """Carry rollouts out from now on."""
        where = ["--kit", str(self.kit.folder), "--broker", self.broker, "--store", self.store]
        self._start("rollout", "run", "--every", "2", *where)

    def rolled_out(self, until: str) -> None:
        """Wait until the newest rollout is `finished`, or `aborted`."""

        def ended() -> bool:
            state = json.loads(self.type("rollout", "status", "--json", store=True))["state"]
            return bool(state["status"] == until)

        wait_for(f"the rollout is {until}", ended, 2 * SLOW_S)

    def statuses(self) -> dict[str, Status]:
        """The last stored status of each device."""
        with Store(self.store, create=False) as store:
            return {record.device: record.status for record in store.devices()}

    def reported(self, device: str, model: str, state: str) -> None:
        """Wait until the store says that a device runs a model, and how its last update stands."""

        def there() -> bool:
            status = self.statuses().get(device)
            return (
                status is not None
                and status.model.endswith(model)
                and status.update is not None
                and status.update.state == state
            )

        wait_for(f"the store says {device} {model} {state}", there, SLOW_S)

    def close(self) -> None:
        """End everything."""
        self.processes.close()
        self._open.close()

    def _start(self, *words: str) -> None:
        self.processes.start(sys.executable, "-m", "eyas_host", *words, log=f"{words[0]}.log")


def look(board: Computer) -> None:
    """Let the updater look at the repository soon, as after a start of the board."""
    board.run(f"systemctl restart {UPDATE}", timeout=WAIT_S)


def committed(board: Computer, version: str) -> None:
    """Wait until a version is the current one, and the updater has committed it."""

    def done() -> bool:
        record = record_of(board)
        return (record.get("state"), record.get("model", "").partition(" ")[2]) == ("committed", version)

    wait_for(f"{version} is committed: {record_of(board)}", done, SLOW_S)
    assert manifest_of(board)["version"] == version


def next_number(board: Computer, later: int = 1) -> str:
    """The version that follows the board's present one."""
    return f"{int(manifest_of(board)['version'].partition('.')[0]) + later}.0.0"


def manifest_of(board: Computer) -> dict[str, Any]:
    """The manifest in the current slot."""
    found: dict[str, Any] = json.loads(board.run(f"cat /var/lib/eyas/slots/current/{MANIFEST}").stdout)
    return found


def record_of(board: Computer) -> dict[str, Any]:
    """How far the update of the board's model is; empty where none was ever looked for."""
    done = board.run("cat /var/lib/eyas/updates/update.json", check=False)
    return json.loads(done.stdout) if done.returncode == 0 else {}


def wrong_files(board: Computer, repository: Repository) -> str:
    """Which release the current slot's files are not, hash by hash; empty if they are those of a signed one."""
    lines = board.run("cd /var/lib/eyas/slots/current && find . -type f -exec sha256sum {} +").stdout.splitlines()
    found = {path.removeprefix("./"): digest for digest, path in (line.split(maxsplit=1) for line in lines)}
    for release in repository.releases():
        for variant in release.variants:
            if {file.path: file.sha256 for file in variant.files} == found:
                return ""
    return f"of no release: {found}"


def update_log(board: Computer, unit: str = UPDATE) -> str:
    """What a unit has written since the start of the board."""
    return board.run(f"journalctl --unit '{unit}' --output cat --no-pager --boot").stdout


def stick_files() -> dict[str, str]:
    """The files of docs/device.md for a stick, by their paths there."""
    text = _DEVICE_MD.read_text(encoding="utf-8")
    found = re.findall(r"`(/etc/[^`]*eyas-stick[^`]*)`:\n\n```\w+\n(.*?)```", text, re.DOTALL)
    assert len(found) == 2, "a rule and a unit"
    return dict(found)
