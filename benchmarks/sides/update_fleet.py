"""A simulated fleet takes a good version and a bad one: what stops the bad one, and how many devices have had it.

Real: the signed repository behind an HTTP server, each device's updater and slots, the golden check, both models'
predictions on drawn images and the judge of the probation, mosquitto, a collector in its own process, the store, and
the rollouts' runner. Simulated: cameras (images are drawn), the agents around the judge, and one connection to the
broker for all devices. Each device looks at the repository once a round.
"""

from __future__ import annotations

import random
import shutil
import time
import uuid
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

import msgspec
import paho.mqtt.client as mqtt

from common import Figure
from eyas_device.bundle import Bundle
from eyas_device.config import Config, DeviceSection, ModelSection, UpdateSection
from eyas_device.predict import Classifier
from eyas_device.telemetry.messages import Status, Update, Window, encode
from eyas_device.updates.machine import Updater
from eyas_device.updates.probation import assess, begin, ended, write_verdict
from eyas_device.updates.progress import UpdateRecord
from eyas_device.updates.records import Tally
from eyas_device.updates.release import Bounds
from eyas_device.updates.slots import Slots, SlotState, other_slot
from eyas_host.fleet.rollout.plan import ControlSection, Plan, QualitySection, plan_of_waves
from eyas_host.fleet.rollout.records import Records
from eyas_host.fleet.rollout.runner import Runner
from eyas_host.fleet.rollout.start import start
from eyas_host.fleet.rollout.state import Rollout
from eyas_host.fleet.store.database import Store
from eyas_host.fleet.updates.repository import Repository
from tests.support import tiny
from tests.support.brokers import free_port
from tests.support.fleet_parts import Processes, wait_until
from tests.support.publishing import rewrite
from tests.support.repositories import make_repository, served
from tests.support.tiny_bundle import write_tiny_bundle

WAVES = "1%,10%,50%,100%"
_SITE = "hall-2"
_IMAGES = 300
_WINDOW = 200
"""Predictions that a device reports in a round."""
_BLIND = Bounds(frames=1, seconds=1.0, min_agreement=0.0, max_error_rate=1.0, shadow_every=0)
"""Bounds that any model keeps to: what a fleet has that only sees that an installation succeeded."""
_MAX_ROUNDS = 40


@cache
def predictions(bundle: Path, _digest: str) -> tuple[tuple[str, float], ...]:
    """Label and confidence that a bundle's model gives the drawn images; computed once for all devices that have it."""
    with Classifier.load(Bundle.open(bundle), "litert") as classifier:
        frames = (tiny.draw_shape(tiny.LABELS[n % len(tiny.LABELS)], 5000 + n) for n in range(_IMAGES))
        return tuple((found.label, found.confidence) for found in map(classifier.predict, frames))


class Camera:
    """One device."""

    def __init__(self, folder: Path, name: str, url: str, root: Path, first: Path) -> None:
        self.name, self.state = name, Path(shutil.copytree(first, folder / name, symlinks=True))
        self._config = Config(
            device=DeviceSection(name=name, site=_SITE, state=str(self.state)),
            model=ModelSection(runtime="litert"),
            update=UpdateSection(url=url, root=str(root)),
        )
        self._slots, self._spool, self._sequence = Slots(self.state), str(uuid.uuid4()), 0
        self._random = random.Random(name)
        self.record = UpdateRecord()
        self.had: set[str] = set()
        """Versions that it ever ran."""

    @property
    def current(self) -> SlotState:
        return next(state for state in self._slots.states() if state.current)

    def look(self) -> None:
        """Look at the repository, and run the probation of what was installed."""
        updater = Updater(self._config)
        self.record = updater.run_once()
        self.had.add(self.current.version)
        if self.record.state == "probation":
            self._prove()
            self.record = updater.run_once()

    def _prove(self) -> None:
        """What the agent does on real frames."""
        slots, name = self._slots, self.current.slot
        found = begin(slots, name, now=time.time())
        if found is None:
            return
        release, verdict = found
        bounds = release.probation
        tally = Tally(frames=bounds.frames, seconds=bounds.seconds)
        if bounds.shadow_every:
            new, previous = (_predictions_of(slots, one) for one in (name, other_slot(name)))
            seen = [self._random.randrange(_IMAGES) for _ in range(bounds.frames // bounds.shadow_every)]
            tally.shadowed, tally.different = len(seen), sum(new[n][0] != previous[n][0] for n in seen)
        assessment = assess(tally, bounds, compared=bounds.shadow_every > 0)
        write_verdict(slots, name, ended(verdict, assessment, tally, now=time.time()))
        if assessment.state == "failed":
            slots.refuse(name, assessment.reason)
            slots.roll_back()

    def messages(self) -> dict[str, bytes]:
        """What it sends in a round: an aggregate of its predictions, then its status."""
        current = self.current
        model, digest = f"{current.name} {current.version}", current.identity[:12]
        known = _predictions_of(self._slots, current.slot)
        seen = [known[self._random.randrange(_IMAGES)] for _ in range(_WINDOW)]
        counts = Counter(label for label, _ in seen)
        sums = {label: sum(value for other, value in seen if other == label) for label in counts}
        window = Window(
            **self._header(), model=model, digest=digest, frames=_WINDOW, counts=dict(counts), confidence_sum=sums
        )
        update = Update(**{field: getattr(self.record, field) for field in Update.__struct_fields__})
        status = Status(**self._header(), state="online", model=model, digest=digest, update=update)
        return {"window": encode(window), "status": encode(status)}

    def _header(self) -> dict[str, Any]:
        self._sequence += 1
        return {"device": self.name, "spool": self._spool, "sequence": self._sequence, "time": time.time()}


def _predictions_of(slots: Slots, name: str) -> tuple[tuple[str, float], ...]:
    state = next(state for state in slots.states() if state.slot == name)
    return predictions(slots.folder / name, state.manifest_sha256)


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """How a rollout ended."""

    status: str
    wave: int
    """The last wave, from 1."""
    reason: str
    touched: int
    """Devices that ever ran the version."""
    left: int
    """Devices that run it at the end."""
    rounds: int
    """Looks of each device until the end."""
    seconds: float


class Fleet:
    """The devices, and the host that rolls out to them."""

    def __init__(self, scratch: Path, devices: int, processes: Processes) -> None:
        self._scratch = scratch
        self.repository: Repository = make_repository(scratch / "fleet")
        (scratch / "root.json").write_bytes(self.repository.root())
        port = free_port()
        processes.broker(port)
        self._url = f"sqlite:///{scratch / 'fleet.db'}"
        processes.collector(port, self._url)
        processes.connected()
        self._client = mqtt.Client(mqtt.CallbackAPIVersion.VERSION2, "fleet")
        self._client.connect("127.0.0.1", port)
        self._client.loop_start()
        self._first = scratch / "first"
        bundle = rewrite(write_tiny_bundle(scratch / "1.0.0"), "1.0.0")
        self.repository.publish(bundle, channel="stable")
        Slots(self._first).install(bundle)
        self.cameras: list[Camera] = []
        self._devices = devices

    def connect(self, url: str) -> None:
        """Switch the devices on."""
        (folder := self._scratch / "devices").mkdir()
        root = self._scratch / "root.json"
        self.cameras = [Camera(folder, f"cam-{n:03}", url, root, self._first) for n in range(self._devices)]
        self._look()

    def roll_out(
        self, version: str, weights: tuple[tiny.Floats, tiny.Floats], bounds: Bounds, *, compared: bool = False
    ) -> Outcome:
        """Publish a version and roll it out until that ends; `compared` with a control group by its telemetry."""
        bundle = rewrite(write_tiny_bundle(self._scratch / version, weights), version)
        self.repository.publish(bundle, probation=bounds)
        with Store(self._url) as store:
            begun, rounds = time.monotonic(), 0
            one: Rollout = start(store, self.repository, version, _plan(compared), model="tiny-shapes")
            records, runner = Records(store), Runner(store, self.repository)
            while one.state.status not in ("finished", "aborted", "paused") and rounds < _MAX_ROUNDS:
                report = runner.turn()
                assert not report.problems, report.problems
                one = records.get(one.id)
                if one.state.status in ("finished", "aborted"):
                    break
                rounds += 1
                self._look()
            runner.close()
            return Outcome(
                status=one.state.status,
                wave=one.state.wave + 1,
                reason=one.state.reason,
                touched=sum(version in camera.had for camera in self.cameras),
                left=sum(camera.current.version == version for camera in self.cameras),
                rounds=rounds,
                seconds=time.monotonic() - begun,
            )

    def close(self) -> None:
        """Disconnect."""
        self._client.disconnect()
        self._client.loop_stop()

    def _look(self) -> None:
        """One round: each device looks and reports; then the store has the reports."""
        since = time.time()
        for camera in self.cameras:
            camera.look()
            for kind, payload in camera.messages().items():
                self._client.publish(f"eyas/{_SITE}/{camera.name}/{kind}", payload, qos=1, retain=kind == "status")
        with Store(self._url) as store:
            wait_until(
                lambda: sum(one.status.time >= since for one in store.devices()) == len(self.cameras),
                120,
                "all reports in the store",
            )


def _plan(compared: bool) -> Plan:
    base = Plan(
        control=ControlSection(share=0.1 if compared else 0.0), quality=QualitySection(enabled=compared, look_s=1.0)
    )
    return plan_of_waves(WAVES, base, wait_s=0.0)


def simulated_fleet(scratch: Path, devices: int) -> dict[str, Figure]:
    """A good version reaches all, a bad one stops in its wave; beside it, a fleet that only sees installations."""
    processes = Processes(scratch)
    weights, bias = tiny.fit()
    fleet = Fleet(scratch, devices, processes)
    try:
        with served(fleet.repository.folder) as (url, _):
            fleet.connect(url)
            good = fleet.roll_out("1.1.0", (weights * 1.02, bias), Bounds())
            print(f"good version, probation:                {good}", flush=True)
            bad = fleet.roll_out("1.2.0", (-weights, -bias), Bounds())
            print(f"bad version, probation:                 {bad}", flush=True)
            later = fleet.roll_out("1.3.0", (-weights, -bias), _BLIND, compared=True)
            print(f"bad version, telemetry against control: {later}", flush=True)
            blind = fleet.roll_out("1.4.0", (-weights, -bias), _BLIND)
            print(f"bad version, only installations seen:   {blind}", flush=True)
    finally:
        fleet.close()
        processes.close()
    golden = "its golden check passes: it was packed with its own predictions"
    return {
        "fleet_devices": Figure(value=float(devices), unit="", bound=200, note=f"waves of {WAVES}"),
        "good_version_reached": Figure(
            value=float(good.left), unit="devices", bound=devices, spread=f"{good.rounds} looks of each device"
        ),
        "bad_version_touched": Figure(
            value=float(bad.touched),
            unit="devices",
            bound=max(1, round(devices / 100)),
            better="lower",
            spread=bad.reason,
            note=f"a model that is wrong on real frames; {golden}. The bound is the first wave",
        ),
        "bad_version_left": Figure(
            value=float(bad.left), unit="devices", bound=0, better="lower", note="that run it at the end"
        ),
        "bad_version_looks": Figure(
            value=float(bad.rounds), unit="", note=f"looks of a device until the rollout was {bad.status}"
        ),
        "bad_version_touched_telemetry_only": Figure(
            value=float(later.touched),
            unit="devices",
            spread=later.reason,
            note=f"the same model where no device compares: the control group shows it; {later.left} are left "
            f"after {later.rounds} looks",
        ),
        "bad_version_touched_installed_only": Figure(
            value=float(blind.touched),
            unit="devices",
            note="the same model where `install succeeded` is the only gate",
            spread=f"{blind.left} run it at the end; the rollout is {blind.status} after {blind.rounds} looks",
        ),
    }
