"""From two models that disagree on a camera to a verdict: a real agent on probation, mosquitto, collector and store."""

from __future__ import annotations

import signal
import sys
from pathlib import Path

from eyas_device.updates.release import Bounds
from eyas_device.updates.slots import Slots
from eyas_host.fleet.rollout.disagreements import is_disagreement, weigh
from eyas_host.fleet.rollout.plan import ProofSection
from eyas_host.fleet.samples.choose import choose
from eyas_host.fleet.samples.exchange import label_studio
from eyas_host.fleet.samples.records import Said, Sample, samples, say
from eyas_host.fleet.samples.rules import labels_of
from eyas_host.fleet.store.database import Store
from tests.support.brokers import free_port
from tests.support.fleet_parts import Processes, wait_until
from tests.support.inside import eyas
from tests.support.tiny_updates import signed, write_update

BOUNDS = Bounds(frames=100_000, min_frames=20, seconds=600.0, min_agreement=0.0, shadow_every=2)
EACH = ProofSection(spacing_s=0.0)
"""Frames of the drawn camera are no scenes."""


def test_disagreements_reach_the_store_with_both_labels_and_decide_when_they_are_labelled(tmp_path: Path) -> None:
    """The new version gives every shape another name: whoever labels by the previous one's answers rolls it back."""
    processes, port, state = Processes(tmp_path), free_port(), tmp_path / "state"
    state.mkdir()
    slots = Slots(state)
    slots.install(write_update(tmp_path / "1.0.0", "1.0.0"))
    config = tmp_path / "device.toml"
    config.write_text(
        f'[device]\nname = "cam-1"\nsite = "hall"\nstate = "{state}"\n'
        '[camera]\nsource = "fake:?live=1&fps=20&frames=1000000&size=64x48"\n'
        f'[telemetry]\nbroker = "127.0.0.1:{port}"\nwindow_s = 1.0\n'
        "[privacy]\nimages = true\ndisagreements = true\nmin_interval_s = 0.1\nmax_images_per_day = 1000\n"
    )
    url = f"sqlite:///{tmp_path}/fleet.db"
    try:
        processes.broker(port)
        processes.collector(port, url)
        processes.connected()
        agent = processes.start(sys.executable, "-m", "eyas_device", "run", "--config", str(config), log="agent.log")
        wait_until(lambda: "is selected" in log(tmp_path) or "was selected" in log(tmp_path), 60, "a model that runs")
        update = write_update(tmp_path / "2.0.0", "2.0.0", "wrong")
        slots.install(update, release=signed(update, BOUNDS))
        agent.send_signal(signal.SIGHUP)
        with Store(url, create=False) as store:
            wait_until(lambda: len(disagreements(store)) >= 20, 90, f"20 disagreements\n{log(tmp_path)}")
            agent.send_signal(signal.SIGTERM)
            assert agent.wait(30) == 0
            found = disagreements(store)
            check(found)
            say(store, [(one.key, by("oracle", one.event.previous_label)) for one in found[:16]])
            again = disagreements(store)
        evidence = weigh(again, labels_of(again), EACH)
        assert (evidence.labelled, evidence.previous_right, evidence.verdict) == (16, 16, "roll back")
        listed = eyas(tmp_path, "samples", "queue", "--store", url, "--count", "3", "--random-share", "0")
        assert listed.code == 0 and "uncertainty" not in listed.out, "no guess leads whoever labels"
    finally:
        processes.close()


def check(found: list[Sample]) -> None:
    """What the samples say of both models."""
    assert {one.event.model for one in found} == {"tiny-shapes 2.0.0"}
    assert {one.event.arm for one in found} == {"candidate"}
    assert all(one.event.previous_label != one.event.label for one in found)
    assert all(0 < one.event.previous_confidence <= 1 for one in found)
    assert all(one.image() is not None for one in found)
    assert all(one.hides_guess and not one.is_random for one in found)
    assert not any("predictions" in task for task in label_studio(found, now=found[0].event.time))
    assert choose(found, 5) == found[:5], "the oldest first: they are of one device"


def disagreements(store: Store) -> list[Sample]:
    return [one for one in samples(store) if is_disagreement(one)]


def by(person: str, label: str) -> Said:
    return Said(label=label, person=person, at=1_800_000_000.0)


def log(folder: Path) -> str:
    path = folder / "agent.log"
    return path.read_text(errors="replace") if path.exists() else ""
