"""A fleet takes waves: real mosquitto, collector, store and signed repository; cameras speak the real messages."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from eyas_device.updates.release import Release
from eyas_host.fleet.broker.client import BrokerAccess
from eyas_host.fleet.rollout.observe import devices_of
from eyas_host.fleet.rollout.plan import ControlSection, Plan, QualitySection, Wave
from eyas_host.fleet.rollout.records import Records
from eyas_host.fleet.rollout.runner import Runner
from eyas_host.fleet.rollout.show import details
from eyas_host.fleet.rollout.start import start
from eyas_host.fleet.rollout.state import Rollout
from eyas_host.fleet.store.database import Store
from eyas_host.fleet.updates.repository import Repository
from tests.support.brokers import free_port
from tests.support.fleet_parts import Processes, needs_mosquitto
from tests.support.repositories import make_repository, served, versioned
from tests.support.rollout_cameras import Behaviour, RolloutCamera


def good(release: Release) -> tuple[str, str, float]:
    return "committed", "", 0.9


def bad_on_the_device(release: Release) -> tuple[str, str, float]:
    """The probation notices it, as it would wrong answers on real frames behind a passing golden check."""
    if release.version == "1.2.3":
        return good(release)
    return "rolled back", "agreement with 1.2.3 is 31 %, below 70 %", 0.9


def bad_in_telemetry(release: Release) -> tuple[str, str, float]:
    """It passes every check on the device, and is less sure of what it sees."""
    return ("committed", "", 0.9) if release.version == "1.2.3" else ("committed", "", 0.7)


class Fleet:
    """Everything that a rollout needs, and cameras that run 1.2.3."""

    def __init__(self, folder: Path, bundle: Path, cameras: int, behaviour: Behaviour) -> None:
        self.folder, self.bundle = folder, bundle
        self.processes = Processes(folder)
        port = free_port()
        self.processes.broker(port)
        self.url = f"sqlite:///{folder / 'fleet.db'}"
        self.repository: Repository = make_repository(folder / "fleet")
        self.repository.publish(bundle, channel="stable")
        self.processes.collector(port, self.url)
        self.processes.connected()
        self._server = served(self.repository.folder)
        http, _ = self._server.__enter__()
        self.cameras = [
            RolloutCamera(folder, f"cam-{n}", self.repository.root(), http, port, behaviour) for n in range(cameras)
        ]
        self.store = Store(self.url, create=False)
        self.access = BrokerAccess(broker=f"127.0.0.1:{port}")
        for camera in self.cameras:
            camera.start()
        self.wait(
            lambda: self.versions() == ["1.2.3"] * cameras and len(self.committed()) == cameras, "1.2.3 everywhere"
        )

    def versions(self) -> list[str]:
        return [camera.version for camera in self.cameras]

    def committed(self) -> list[str]:
        """Devices whose stored status says that they committed."""
        return [r.device for r in self.store.devices() if r.status.update and r.status.update.state == "committed"]

    def start(self, plan: Plan) -> Rollout:
        new = versioned(self.bundle, self.folder / "new", "1.3.0")
        return start(self.store, self.repository, str(new), plan)

    def run(self, one: Rollout, until: Sequence[str], timeout: float = 120) -> Rollout:
        """Take turns until the rollout is where it should be; each turn is a runner of its own, as after a restart."""
        records = Records(self.store)
        deadline = time.monotonic() + timeout
        while (found := records.get(one.id)).state.status not in until:
            assert time.monotonic() < deadline, "\n".join(self.status(found))
            runner = Runner(self.store, self.repository, self.access)
            report = runner.turn()
            assert report.acting and report.problems == ()
            runner.close()
            time.sleep(0.2)
        return found

    def status(self, one: Rollout) -> list[str]:
        devices = devices_of(one, self.store.devices())
        return details(one, devices, Records(self.store).steps(one.id), time.time())

    def wait(self, true: Callable[[], Any], what: str, timeout: float = 60) -> None:
        deadline = time.monotonic() + timeout
        while not true():
            assert time.monotonic() < deadline, f"{what}: {self.versions()}"
            time.sleep(0.05)

    def close(self) -> None:
        for camera in self.cameras:
            camera.stop()
        self.store.close()
        self._server.__exit__(None, None, None)
        self.processes.close()


@pytest.fixture
def make_fleet(tmp_path: Path, pristine_bundle: Path) -> Iterator[Callable[[int, Behaviour], Fleet]]:
    needs_mosquitto()
    fleets: list[Fleet] = []

    def make(cameras: int, behaviour: Behaviour) -> Fleet:
        fleets.append(Fleet(tmp_path, pristine_bundle, cameras, behaviour))
        return fleets[-1]

    yield make
    for fleet in fleets:
        fleet.close()


WAVES = (Wave(share=0.1, wait_s=0.5), Wave(wait_s=0.5))


def test_three_cameras_and_a_version_that_is_wrong_on_real_frames(make_fleet: Callable[..., Fleet]) -> None:
    fleet = make_fleet(3, bad_on_the_device)
    one = fleet.run(fleet.start(Plan(wave=WAVES)), ["aborted"])
    assert sum("1.3.0" in camera.installed for camera in fleet.cameras) == 1
    assert fleet.versions() == ["1.2.3"] * 3
    assert "agreement with 1.2.3 is 31 %" in one.state.reason
    assert '  "install succeeded" as the only gate: 1 of 1, it would have gone on' in fleet.status(one)


def test_a_good_version_reaches_everybody_the_control_group_last(make_fleet: Callable[..., Fleet]) -> None:
    fleet = make_fleet(4, good)
    one = fleet.run(fleet.start(Plan(wave=WAVES, control=ControlSection(share=0.25))), ["finished"])
    fleet.wait(lambda: fleet.versions() == ["1.3.0"] * 4, "1.3.0 everywhere")
    assert len(one.state.control) == 1
    assert "not enough to judge quality" in "\n".join(fleet.status(one))


def test_a_version_that_is_less_sure_stops_in_its_wave_by_telemetry_alone(make_fleet: Callable[..., Fleet]) -> None:
    fleet = make_fleet(12, bad_in_telemetry)
    plan = Plan(
        wave=(Wave(share=0.4, wait_s=600), Wave()),
        control=ControlSection(share=0.5),
        quality=QualitySection(look_s=2, alpha=0.2),
    )
    one = fleet.run(fleet.start(plan), ["aborted"])
    assert sum("1.3.0" in camera.installed for camera in fleet.cameras) == 5
    fleet.wait(lambda: fleet.versions() == ["1.2.3"] * 12, "1.2.3 again everywhere")
    assert re.match(r"worse than the control group in wave 1: confidence -0\.[12]\d* \(worse\)", one.state.reason)
    assert '  "install succeeded" as the only gate: 5 of 5, it would have gone on' in fleet.status(one)
