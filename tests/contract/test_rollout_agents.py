"""Three whole devices take waves: agents and updaters in processes of their own, a broker with certificates.

The bad version has the labels of its classes exchanged: its golden check passes, because it was recorded from itself,
and only real frames, beside the model before it, show that it is wrong.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from eyas_device.updates.release import Bounds
from eyas_host.fleet.broker.client import BrokerAccess
from eyas_host.fleet.rollout.observe import devices_of
from eyas_host.fleet.rollout.plan import Plan, Wave
from eyas_host.fleet.rollout.records import Records
from eyas_host.fleet.rollout.runner import Runner
from eyas_host.fleet.rollout.show import details
from eyas_host.fleet.rollout.start import start
from eyas_host.fleet.rollout.state import Rollout
from eyas_host.fleet.store.database import Store
from eyas_host.fleet.updates.repository import Repository
from tests.support.agents import start_kit
from tests.support.brokers import free_port
from tests.support.fleet_parts import Processes, listens, wait_until
from tests.support.fleet_parts import open_folder as open_folder
from tests.support.repositories import make_repository
from tests.support.tiny_updates import write_update
from tests.support.update_devices import EnrolledDevice

BOUNDS = Bounds(frames=30, seconds=60.0, min_frames=10, shadow_every=2, max_error_rate=0.1)
"""To tell 1 % of errors from 2 % takes 300 predictions, 10 % from 20 % 26; here it is about the answers."""
PLAN = Plan(wave=(Wave(share=0.3, wait_s=1), Wave(wait_s=1)))
NAMES = ("cam-1", "cam-2", "cam-3")


class Fleet:
    """Everything that runs, and the rollouts of the test."""

    def __init__(self, folder: Path, processes: Processes) -> None:
        self.processes = processes
        self._running: list[subprocess.Popen[bytes]] = []
        self.kit = start_kit(folder, self.processes)
        self.repository: Repository = make_repository(self.kit.folder)
        self.bundles = {
            version: write_update(folder / version, version, kind)
            for version, kind in (("1.0.0", "right"), ("2.0.0", "wrong"), ("3.0.0", "right"))
        }
        for bundle in self.bundles.values():
            self.repository.publish(bundle, probation=BOUNDS)
        port = free_port()
        url = f"http://127.0.0.1:{port}"
        self._start("http.server", str(port), "--bind", "127.0.0.1", "--directory", str(self.repository.folder))
        wait_until(lambda: listens(port), 60, "a listening server")
        host, broker = self.kit.host, f"localhost:{self.kit.port}"
        self.access = BrokerAccess(broker=broker, ca=host.ca, certificate=host.cert, key=host.key)
        url_of_store = f"sqlite:///{folder / 'fleet.db'}"
        self.store = Store(url_of_store)
        self._start("eyas_host", "collect", "--kit", str(self.kit.folder), "--broker", broker, "--store", url_of_store)
        root = self.repository.root()
        self.devices = [
            EnrolledDevice(folder, self.kit, name, root, url, self.bundles["1.0.0"], fps=20) for name in NAMES
        ]
        for device in self.devices:
            for command in device.commands:
                self._running.append(self.processes.start(*command, log=f"{device.name}.log"))
        wait_until(lambda: len(self.known()) == len(NAMES), 300, "three devices that report their channel")

    def _start(self, module: str, *words: str) -> None:
        self._running.append(self.processes.start(sys.executable, "-m", module, *words, log=f"{module}.log"))

    def known(self) -> list[str]:
        return [r.device for r in self.store.devices() if r.status.update is not None and r.status.model]

    def roll_out(self, version: str, until: str) -> Rollout:
        """Start a rollout and carry it out to its end."""
        one = start(self.store, self.repository, version, PLAN)
        runner, records = Runner(self.store, self.repository, self.access), Records(self.store)
        deadline = time.monotonic() + 600
        while (found := records.get(one.id)).state.status not in ("finished", "aborted"):
            assert time.monotonic() < deadline, "\n".join(self.status(found))
            assert runner.turn().problems == ()
            time.sleep(1)
        runner.turn()
        runner.close()
        assert found.state.status == until, "\n".join(self.status(found))
        return found

    def status(self, one: Rollout) -> list[str]:
        devices = devices_of(one, self.store.devices())
        return details(one, devices, Records(self.store).steps(one.id), time.time())

    def close(self) -> None:
        for process in self._running:
            process.send_signal(signal.SIGTERM)
        for process in self._running:
            process.wait(60)
        self.store.close()


@pytest.fixture
def fleet(open_folder: Path) -> Iterator[Fleet]:
    processes = Processes(open_folder)
    try:
        made = Fleet(open_folder, processes)
        yield made
        made.close()
    finally:
        processes.close()


def test_a_bad_version_stops_in_its_wave_and_the_next_good_one_reaches_everybody(fleet: Fleet) -> None:
    bad = fleet.roll_out("2.0.0", "aborted")
    assert "the previous model's label on 0 of" in bad.state.reason
    assert sum("2.0.0" in device.versions for device in fleet.devices) == 1, "one device, that of the first wave"
    assert [device.version for device in fleet.devices] == ["1.0.0"] * 3
    assert '"install succeeded" as the only gate: 1 of 1, it would have gone on' in "\n".join(fleet.status(bad))
    fleet.roll_out("3.0.0", "finished")
    wait_until(lambda: [device.version for device in fleet.devices] == ["3.0.0"] * 3, 400, "3.0.0 everywhere")
