"""A fleet through a change of season: drift, labels, retraining, proof, rollout (`make fleet-demo`).

    python benchmarks/fleet_demo.py [--quick] [--devices N] [--folder DIR] [--json FILE]

Real: photographs, training, compiled models and their predictions, mosquitto, collector, store, drift monitor,
`eyas retrain`, the signed repository, each device's updater, slots, golden check and judge of the probation, rollout
and proof. Simulated: the cameras' view (pieces of photographs; light, season and dirt are image operations), the time
(a day takes seconds), and people, who label what is asked and are wrong in 3 of 100.

A first model is trained where DIR has none (minutes). Report: DIR/report.md and DIR/accuracy.svg.

`--quick` goes the same way in a folder of its own with fewer devices, days, scenes and epochs, and one version instead
of two: what depends on its models has no bounds.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import matplotlib
import msgspec
import paho.mqtt.client as mqtt
from sqlalchemy import func, select

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from common import Figure, finish, shortened  # noqa: E402
from eyas_device.updates.release import Bounds  # noqa: E402
from eyas_device.updates.slots import Slots  # noqa: E402
from eyas_host.fleet.drift.alarms import Alarm  # noqa: E402
from eyas_host.fleet.drift.fleet_state import Tuning  # noqa: E402
from eyas_host.fleet.drift.monitor import Monitor  # noqa: E402
from eyas_host.fleet.drift.report import describe  # noqa: E402
from eyas_host.fleet.rollout.disagreements import is_disagreement  # noqa: E402
from eyas_host.fleet.rollout.plan import ControlSection, Plan, QualitySection, Wave  # noqa: E402
from eyas_host.fleet.rollout.records import Records  # noqa: E402
from eyas_host.fleet.rollout.runner import Runner  # noqa: E402
from eyas_host.fleet.rollout.show import details  # noqa: E402
from eyas_host.fleet.rollout.start import start  # noqa: E402
from eyas_host.fleet.samples.choose import choose  # noqa: E402
from eyas_host.fleet.samples.exchange import write_folders  # noqa: E402
from eyas_host.fleet.samples.records import Said, Sample, samples, say  # noqa: E402
from eyas_host.fleet.samples.rules import verdicts  # noqa: E402
from eyas_host.fleet.store.database import Store  # noqa: E402
from eyas_host.fleet.store.tables import messages  # noqa: E402
from eyas_host.report.drawing import STYLE, WIDE  # noqa: E402
from eyas_host.support.files import write_bytes  # noqa: E402
from eyas_host.support.machine import cpu_pressure  # noqa: E402
from sides.demo_devices import WINDOW_S, Camera, Versions  # noqa: E402
from sides.demo_forms import FULL, QUICK, Form, eyas, first_model  # noqa: E402
from sides.demo_scenes import LABELS, STEPS, scenes  # noqa: E402
from tests.support.brokers import free_port  # noqa: E402
from tests.support.fleet_parts import Processes, wait_until  # noqa: E402
from tests.support.repositories import make_repository, served  # noqa: E402

DAY_S, HOUR_S = 86_400.0, 3600.0
TUNING = Tuning(profile_days=2, calibration_days=1)
WATCHED = 3.0
"""Day from which devices are watched."""
CHANGE_S = 12 * HOUR_S
SITES = ("north", "south")
NOISE = 0.03
AN_HOUR = 8
"""Disagreements that people label in an hour."""
BOUNDS = Bounds(frames=200, seconds=21_600.0, min_agreement=0.3)
PLAN = Plan(
    wave=(Wave(share=0.25, wait_s=0, min_count=1, then="proven"), Wave(wait_s=0, min_count=1)),
    control=ControlSection(share=0.1),
    quality=QualitySection(look_s=2 * HOUR_S, min_frames=50, baseline_s=6 * HOUR_S),
)


class Hour(msgspec.Struct, frozen=True):
    """What an hour was like, for the report; nobody at the host knows it."""

    day: float
    accuracy: float
    without: float
    """Accuracy of the first version on the same frames."""


class Demo:
    """The fleet and its host, in a folder of its own; `close` ends the processes."""

    def __init__(self, place: Path, scratch: Path, form: Form, url: str) -> None:
        self.place, self.scratch, self.form = place, scratch, form
        self.now = (time.time() // DAY_S - form.days - 1) * DAY_S
        self.begin = self.now
        self.hours: list[Hour] = []
        self.events: list[str] = []
        """What happened, for the report."""
        self.sent: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()
        self.alarms: dict[str, Alarm] = {}
        self.retrained = self.begin + form.season * DAY_S
        """Samples from here on are for the next version."""
        self.served: list[tuple[str, float]] = []
        """Versions that reached everybody, and the day."""
        self.shown: list[str] = []
        """The rollout, when it had ended."""
        self.said = 0
        self._dice = random.Random(0)
        self.processes = Processes(scratch)
        port = free_port()
        self.processes.broker(port)
        self._store_url = f"sqlite:///{scratch / 'fleet.db'}"
        self.processes.collector(port, self._store_url)
        self.processes.connected()
        self.store = Store(self._store_url)
        self.monitor = Monitor(self.store, TUNING)
        self._client = mqtt.Client(mqtt.CallbackAPIVersion.VERSION2, "cameras")
        self._client.max_inflight_messages_set(200)
        self._client.connect("127.0.0.1", port)
        self._client.loop_start()
        self.repository = make_repository(scratch / "fleet")
        (scratch / "root.json").write_bytes(self.repository.root())
        bundle = place / "runs/surfaces/bundle"
        self.repository.publish(bundle, channel="stable", probation=BOUNDS)
        Slots(scratch / "first").install(bundle)
        versions, seen = Versions(), scenes(form.scenes)
        (scratch / "devices").mkdir()
        self.cameras = [
            Camera(
                scratch / "devices",
                f"cam-{number:02}",
                SITES[number % len(SITES)],
                url,
                scratch / "root.json",
                scratch / "first",
                versions,
                seen,
                lambda: self.now,
                self._send,
            )
            for number in range(form.devices)
        ]
        for camera in self.cameras:
            camera.look()
        self.runner = Runner(self.store, self.repository, clock=lambda: self.now)
        self.rollout = ""

    @property
    def day(self) -> float:
        """Days since the begin."""
        return (self.now - self.begin) / DAY_S

    @property
    def drifted(self) -> list[str]:
        """Devices with an alarm that is open."""
        return sorted(alarm.device for alarm in self.alarms.values() if alarm.open)

    def close(self) -> None:
        """End everything that was started."""
        self._client.disconnect()
        self._client.loop_stop()
        self.store.close()
        self.processes.close()

    def hour(self) -> None:
        """An hour of all cameras, then what the host does in it."""
        before = [msgspec.structs.replace(camera.counted) for camera in self.cameras]
        for _ in range(round(HOUR_S / WINDOW_S)):
            self.now += WINDOW_S
            for number, camera in enumerate(self.cameras):
                camera.season = self._strength(self.form.season, CHANGE_S)
                dirty = number == len(self.cameras) // 2
                camera.dirt = self._strength(self.form.dirty, HOUR_S) if dirty else 0
                camera.window()
        self._stored()
        frames = sum(camera.counted.frames - one.frames for camera, one in zip(self.cameras, before, strict=True))
        right = sum(camera.counted.right - one.right for camera, one in zip(self.cameras, before, strict=True))
        without = sum(
            camera.counted.right_without - one.right_without for camera, one in zip(self.cameras, before, strict=True)
        )
        self.hours.append(Hour(round(self.day, 3), right / frames, without / frames))
        changed = self.monitor.turn(settle_s=0).changed
        new = [alarm for alarm in changed if alarm.id not in self.alarms]
        self.alarms |= {alarm.id: alarm for alarm in changed}
        for what in dict.fromkeys((alarm.cause, alarm.scope) for alarm in new):
            those = [alarm for alarm in new if (alarm.cause, alarm.scope) == what]
            more = f" and {len(those) - 1} more" if len(those) > 1 else ""
            self.report(f"alarm: {describe(those[0])[0]}{more}")
        if self.rollout:
            self._roll()
        if len(self.hours) % 6 == 0:
            self._show()

    def label(self, wanted: list[Sample], person: str) -> None:
        """Let people say what samples show; one in some is wrong."""
        truth = {key: label for camera in self.cameras for key, label in camera.truth.items()}
        words = []
        for sample in wanted:
            label = truth[sample.key]
            if self._dice.random() < NOISE:
                label = self._dice.choice([other for other in LABELS if other != label])
            words.append((sample.key, Said(label=label, person=person, at=self.now, source="oracle")))
        self.said += say(self.store, words, allowed=LABELS)

    def retrain(self, number: str) -> bool:
        """Ask for labels, train a version from all of them, and roll it out; False if it is worse and was kept out."""
        since, self.retrained = self.retrained, self.now
        fresh = self._open(since)
        chosen = choose(fresh, self.form.labelled, random_share=0.5)
        self.label(chosen, "anna")
        self.report(f"{len(chosen)} samples labelled of {len(fresh)}")
        images = self.scratch / f"new-images-{number}"
        write_folders(samples(self.store, since=since), images, now=self.now)
        begun = time.monotonic()
        words = ["retrain", str(images), "--cooldown", "0", "--epochs", str(self.form.epochs), "--max-loss", "0.02"]
        done = eyas(self.place, *words, "--version", number, fails=True)
        line = next((line for line in reversed(done.stdout.splitlines()) if line.strip()), "")
        self.report(f"eyas retrain, {time.monotonic() - begun:.0f} s: {line}")
        if done.returncode:
            return False
        bundle = self.place / f"runs/surfaces-{number}/bundle"
        self.repository.publish(bundle, probation=BOUNDS)
        one = start(self.store, self.repository, number, PLAN, model="surfaces", clock=lambda: self.now)
        self.rollout = one.id
        self.report(
            f"rollout of {number} to {len(self.cameras)} devices: {len(PLAN.wave)} waves, the second one if proven"
        )
        return True

    def report(self, what: str) -> None:
        """Note what happened, and show it."""
        line = f"day {self.day:5.2f}  {what}"
        self.events.append(line)
        print(line, flush=True)

    def _roll(self) -> None:
        """An hour of a rollout: what disagrees is labelled, devices look, the runner decides."""
        disagreements = [one for one in self._open(self.now - 2 * DAY_S) if is_disagreement(one)]
        self.label(disagreements[:AN_HOUR], "bert")
        for _ in range(2):
            for name, step in self.runner.turn().steps:
                self.report(f"rollout {name}: {step.what}{': ' if step.why else ''}{step.why}")
            for camera in self.cameras:
                camera.look()
            self._stored()
        if Records(self.store).get(self.rollout).state.status in ("finished", "aborted"):
            found = Records(self.store)
            one = found.get(self.rollout)
            self.shown += ["", *details(one, [], found.steps(self.rollout), self.now)]
            if one.state.status == "finished":
                self.served.append((one.version, self.day))
                eyas(self.place, "models", "alias", "champion", f"surfaces@{one.version}")
            self.rollout = ""

    def _open(self, since: float) -> list[Sample]:
        """Samples that nobody has labelled."""
        found = samples(self.store, since=since)
        states = verdicts(found)
        return [one for one in found if states[one.key].state == "open"]

    def _strength(self, begin: float, lasts_s: float) -> int:
        """How far a change is that begins on a day, 0..`STEPS`."""
        passed = (self.day - begin) * DAY_S
        return 0 if passed <= 0 else min(STEPS, 1 + int(STEPS * passed / lasts_s))

    def _send(self, topic: str, kind: str, payload: bytes) -> None:
        self.sent[kind] += 1
        self.bytes[kind] += len(payload)
        self._client.publish(topic, payload, qos=1, retain=kind == "status")

    def _stored(self) -> None:
        """Wait until the store has all windows and events."""
        wanted = self.sent["window"] + self.sent["event"]

        def is_there() -> bool:
            query = select(func.count()).select_from(messages).where(messages.c.kind.in_(("window", "event")))
            with self.store.reading() as connection:
                return int(connection.execute(query).scalar_one()) >= wanted

        wait_until(is_there, 120, f"{wanted} messages in the store")

    def _show(self) -> None:
        last = self.hours[-6:]
        runs = ", ".join(
            f"{count} run {version}" for version, count in Counter(c.runs for c in self.cameras).most_common()
        )
        print(
            f"day {self.day:5.2f}  accuracy {sum(hour.accuracy for hour in last) / 6:.3f}  without the loop "
            f"{sum(hour.without for hour in last) / 6:.3f}  alarms {len(self.drifted)}  labels {self.said}  {runs}",
            flush=True,
        )


def play(demo: Demo) -> None:
    """Let the days pass."""
    form = demo.form
    while demo.day < form.season or (demo.day < form.last and len(demo.drifted) < len(demo.cameras) / 3):
        demo.hour()
    for number in form.versions:
        for _ in range(form.wait_hours):  # what comes in until people have time
            demo.hour()
        if demo.retrain(number):
            while demo.rollout and demo.day < form.days:
                demo.hour()
    while demo.day < form.days:
        demo.hour()
    if demo.rollout:
        demo.report("the days are over before the rollout has ended")


def figures_of(demo: Demo, trained_s: float, total_s: float) -> dict[str, Figure]:
    """What the demonstration showed."""

    def mean(first: float, last: float, field: str = "accuracy") -> float:
        found: list[float] = [getattr(hour, field) for hour in demo.hours if first < hour.day <= last]
        return sum(found) / len(found)

    form = demo.form
    dirty_day, season_day, days = form.dirty, form.season, form.days
    usual, after = mean(0, dirty_day), mean(days - form.at_the_end, days)
    without = mean(days - form.at_the_end, days, "without")
    dirty = demo.cameras[len(demo.cameras) // 2].name
    start_of = {alarm.id: (alarm.opened - demo.begin) / DAY_S for alarm in demo.alarms.values()}
    false = [
        one for one in demo.alarms.values() if start_of[one.id] <= (dirty_day if one.device == dirty else season_day)
    ]
    season = {one.device for one in demo.alarms.values() if start_of[one.id] > season_day}
    seen = sorted(day for day in start_of.values() if day > season_day)
    lens = [day - dirty_day for one, day in ((a, start_of[a.id]) for a in demo.alarms.values()) if one.device == dirty]
    third = seen[max(0, -(-len(demo.cameras) // 3) - 1)] if len(seen) >= len(demo.cameras) / 3 else None
    ends = [*(day for _, day in demo.served[1:]), days]
    back = {}
    for (number, begun), end in zip(demo.served, ends, strict=True):
        if not any(begun < hour.day <= end for hour in demo.hours):
            continue  # it reached all devices in the last hour
        now, still = mean(begun, end), mean(begun, end, "without")
        back[f"share of the loss that came back with {number}"] = Figure(
            value=(now - still) / (usual - still) if usual > still else None,
            unit="",
            bound=0.8,
            note=f"all devices, day {begun:.1f} to {end:.1f}; one retraining each",
        )
    figures = {
        "devices": Figure(value=float(len(demo.cameras)), unit="", note=f"{days:g} days, {len(SITES)} sites"),
        "accuracy before the change": Figure(value=usual, unit=""),
        "accuracy at the end, with the loop": Figure(value=after, unit=""),
        "accuracy at the end, without": Figure(value=without, unit="", note="the first version on the same frames"),
        **back,
        "devices with an alarm after the change": Figure(value=float(len(season)), unit=""),
        "hours until a third of the devices had one": Figure(
            value=None if third is None else (third - season_day) * 24, unit="h"
        ),
        "hours until the dirty lens had one": Figure(value=min(lens) * 24 if lens else None, unit="h"),
        "false alarms": Figure(
            value=float(len(false)),
            unit="",
            note=f"in {len(demo.cameras) * (season_day - WATCHED):.0f} stable days of watched devices",
        ),
        "labels": Figure(value=float(demo.said), unit="", note=f"{NOISE:.0%} of them wrong"),
        "messages": Figure(
            value=sum(demo.bytes.values()) / len(demo.cameras) / days / 1000,
            unit="kB a device a day",
            spread=", ".join(f"{kind} {count:,}" for kind, count in sorted(demo.sent.items())),
            note=f"images of events {demo.bytes['event'] / sum(demo.bytes.values()):.0%} of it",
        ),
        "versions that reached all devices": Figure(
            value=float(len(demo.served)), unit="", note=f"of {len(form.versions)}"
        ),
    }
    minutes = Figure(
        value=total_s / 60,
        unit="min",
        bound=form.minutes,
        better="lower",
        note=f"{trained_s / 60:.1f} of them for the first model",
    )
    return (shortened(figures, form.shortened) if form.shortened else figures) | {"minutes": minutes}


def write_report(demo: Demo, figures: dict[str, Figure]) -> None:
    """The report and its plot."""
    with matplotlib.rc_context(STYLE):
        from matplotlib.figure import Figure as Plot

        plot = Plot(figsize=WIDE, layout="constrained")
        axes = plot.add_subplot()
        days = [hour.day for hour in demo.hours]
        for field, name, style in (("accuracy", "with the loop", "-"), ("without", "without", ":")):
            values = [getattr(hour, field) for hour in demo.hours]
            smooth = [sum(values[max(0, n - 5) : n + 1]) / min(n + 1, 6) for n in range(len(values))]
            axes.plot(days, smooth, style, label=name)
        axes.axvspan(demo.form.season, demo.form.season + CHANGE_S / DAY_S, alpha=0.15)
        axes.set_xlabel("day")
        axes.set_ylabel("accuracy of all devices")
        axes.legend(loc="lower left")
        plot.savefig(demo.place / "accuracy.svg")
    lines = ["# A fleet through a change of season", "", "![](accuracy.svg)", "", "| what | value |", "|---|---|"]
    lines += [
        f"| {name} | {'none' if one.value is None else f'{one.value:.3g} {one.unit}'.strip()} |"
        for name, one in figures.items()
    ]
    lines += ["", "```text", *demo.events, *demo.shown, "```", ""]
    write_bytes(demo.place / "report.md", "\n".join(lines).encode())


def main() -> None:
    """Run the demonstration."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer devices, days, scenes and epochs (minutes)")
    parser.add_argument(
        "--devices", type=int, metavar="N", help=f"default {FULL.devices}; with --quick {QUICK.devices}"
    )
    parser.add_argument(
        "--folder", type=Path, metavar="DIR", help="default runs/fleet-demo; with --quick runs/quick-fleet-demo"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to FILE")
    chosen = parser.parse_args()
    before, begun = cpu_pressure(), time.monotonic()
    form = QUICK if chosen.quick else FULL
    if chosen.devices is not None:
        form = msgspec.structs.replace(form, devices=chosen.devices)
    place = (chosen.folder or ROOT / "runs" / ("quick-fleet-demo" if chosen.quick else "fleet-demo")).resolve()
    trained_s = first_model(place, form)
    with tempfile.TemporaryDirectory(prefix="eyas-demo-") as name:
        scratch = Path(name)
        (scratch / "fleet").mkdir()
        demo = None
        with served(scratch / "fleet" / "repository") as (url, _):
            try:
                demo = Demo(place, scratch, form, url)
                play(demo)
                figures: dict[str, Any] = figures_of(demo, trained_s, time.monotonic() - begun)
                write_report(demo, figures)
            finally:
                if demo is not None:
                    demo.close()
    finish(figures, before, chosen.json)
    print(f"report: {place / 'report.md'}")


if __name__ == "__main__":
    main()
