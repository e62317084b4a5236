"""Real agents in processes of their own, at a broker of the kit."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

from eyas_host.fleet.broker.enroll import enroll
from eyas_host.fleet.broker.kit import Kit, prepare
from tests.support.brokers import free_port
from tests.support.fleet_parts import Processes, listens, needs_mosquitto, wait_until

ALL_COMMANDS = '["pause", "resume", "set-thresholds", "snapshot", "bench", "doctor"]'


def start_kit(folder: Path, processes: Processes) -> Kit:
    """A running mosquitto with the kit's certificates and access list."""
    kit = prepare(folder / "fleet", port=free_port())
    start_broker(kit, processes)
    return kit


def start_broker(kit: Kit, processes: Processes) -> subprocess.Popen[bytes]:
    """Start the mosquitto of a kit."""
    folder = processes.folder
    process = processes.start(needs_mosquitto(), "-c", str(kit.config), log="mosquitto.log")
    wait_until(lambda: listens(kit.port) or process.poll() is not None, 15, "a listening broker")
    assert process.poll() is None, (folder / "mosquitto.log").read_text()
    return process


class AgentProcess:
    """`eyas-device run` as an enrolled device."""

    def __init__(
        self,
        kit: Kit,
        bundle: Path,
        folder: Path,
        name: str,
        *,
        site: str = "hall-2",
        commands: str = ALL_COMMANDS,
        privacy: str = "",
        camera: str = "fake:",
        telemetry: str = "window_s = 1.0",
    ) -> None:
        credentials = enroll(kit.folder, name, site=site, broker=f"localhost:{kit.port}").credentials
        (state := folder / f"{name}-state").mkdir(exist_ok=True)
        self.config, self.log = folder / f"{name}.toml", folder / f"{name}.log"
        self.config.write_text(
            f'[device]\nname = "{name}"\nsite = "{site}"\nstate = "{state}"\n'
            f'[camera]\nsource = "{camera}"\n[model]\nbundle = "{bundle}"\n[loop]\nfps = 10\n'
            f'[telemetry]\nbroker = "localhost:{kit.port}"\n{telemetry}\ncommands = {commands}\n'
            f'ca = "{credentials.ca}"\ncertificate = "{credentials.cert}"\nkey = "{credentials.key}"\n'
            f"[privacy]\n{privacy}\n"
        )
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> AgentProcess:
        command = [sys.executable, "-m", "eyas_device", "run", "--loop", "--config", str(self.config)]
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, "EYAS_LOG": "info"})
        return self

    def signal(self, number: signal.Signals) -> None:
        assert self._process is not None
        self._process.send_signal(number)

    def stop(self, *, kill: bool = False) -> None:
        if self._process is not None:
            self._process.send_signal(signal.SIGKILL if kill else signal.SIGTERM)
            self._process.wait(20)
            self._process = None
