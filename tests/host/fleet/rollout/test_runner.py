"""The runner over a store: what it decided is stored first, one acts, and a killed one is followed by the next."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from msgspec.structs import replace

from eyas_device.errors import EyasError
from eyas_device.telemetry.messages import Status, encode
from eyas_host.fleet.rollout import by_hand
from eyas_host.fleet.rollout.plan import ControlSection, RolloutError, Wave
from eyas_host.fleet.rollout.records import Changed, Records
from eyas_host.fleet.rollout.runner import LOCK_S, Runner
from eyas_host.fleet.rollout.state import Rollout, Step
from eyas_host.fleet.store.database import Store
from eyas_host.fleet.store.validate import InvalidMessage, validate
from eyas_host.fleet.updates.variants import PublishError
from tests.support.rollout_parts import NEW, OLD, QUICK, MemoryChannels, SimulatedFleet, StoredFleet, rollout

STARTED = Step(what="started", why="a test", at=1.0, by="me")


class Clock:
    def __init__(self) -> None:
        self.now = 1_800_000_000.0

    def __call__(self) -> float:
        self.now += 1
        return self.now


def stored(store: Store, devices: int = 20) -> StoredFleet:
    fleet = StoredFleet(store, SimulatedFleet([f"cam-{n}" for n in range(devices)]), MemoryChannels())
    fleet.report()
    return fleet


def test_a_rollout_goes_through_and_the_log_says_who_when_and_why(url: str) -> None:
    clock = Clock()
    with Store(url) as store:
        fleet, records = stored(store), Records(store)
        one = records.add(rollout(replace(QUICK, control=ControlSection(share=0.1))), STARTED)
        with pytest.raises(RolloutError, match=r"is running for shapes on channel stable: `eyas rollout abort"):
            records.add(rollout(), STARTED)
        runner = Runner(store, fleet.channels, clock=clock)
        for _ in range(12):
            assert runner.turn().problems == ()
            fleet.follow()
        done, steps = records.get(one.id), records.steps(one.id)
        assert done.state.status == "finished" and fleet.fleet.running(NEW) == set(fleet.fleet.devices)
        assert [step.what.split(",")[0] for step in steps] == [
            "started",
            "wave 1 of 3: 10 % of the devices",
            "wave 1 is good",
            "wave 2 of 3: 50 % of the devices",
            "wave 2 is good",
            "wave 3 of 3: 100 % of the devices",
            "wave 3 is good",
            "finished: all devices may take it",
        ]
        assert all(step.at > 0 and step.by for step in steps) and "2 devices: 2 done" in steps[3].why
        assert records.active() == []
        again = records.add(replace(rollout(), created=2.0), STARTED)
        assert again.id == "shapes-2.0.0-2"
        with pytest.raises(RolloutError, match="there are: "):
            records.get("shapes-9")


@pytest.mark.parametrize("broken_at", range(6))
def test_a_runner_that_dies_between_the_store_and_the_repository_is_followed_by_the_next(
    tmp_path: Path, broken_at: int
) -> None:
    with Store(f"sqlite:///{tmp_path / 'fleet.db'}") as store:
        fleet, records, clock = stored(store), Records(store), Clock()
        fleet.fleet.failing = set(fleet.fleet.devices) if broken_at % 2 else set()
        one = records.add(rollout(), STARTED)
        for number in range(24):
            if number == broken_at:
                fleet.channels.broken = RuntimeError("killed")
            runner = Runner(store, fleet.channels, clock=clock)  # each turn is a new process
            try:
                runner.turn()
                runner.close()
            except RuntimeError:
                clock.now += LOCK_S + 1
            fleet.follow(share=0.7)
        done = records.get(one.id)
        assert records.active() == []
        if fleet.fleet.failing:
            assert done.state.status == "aborted" and fleet.fleet.running(OLD) == set(fleet.fleet.devices)
        else:
            assert done.state.status == "finished" and fleet.fleet.running(NEW) == set(fleet.fleet.devices)


def test_of_two_runners_one_acts_and_the_other_takes_over_when_it_is_gone(url: str) -> None:
    clock = Clock()
    with Store(url) as store, Store(url) as other:
        fleet = stored(store)
        Records(store).add(rollout(), STARTED)
        first, second = Runner(store, fleet.channels, clock=clock), Runner(other, fleet.channels, clock=clock)
        acting = [(first.turn().acting, second.turn().acting) for _ in range(3)]
        assert acting == [(True, False)] * 3
        assert Records(store).engine(clock()) != ""
        clock.now += LOCK_S + 1
        assert second.turn().acting and not first.turn().acting
        second.close()
        assert first.turn().acting
        clock.now -= 365 * 86_400
        assert second.turn().acting, "the lock of a clock that was a year ahead is no lock"


def test_a_change_by_hand_and_one_by_the_runner_at_once_are_never_lost(url: str) -> None:
    with Store(url) as store:
        fleet, records, clock = stored(store), Records(store), Clock()
        one = records.add(rollout(), STARTED)
        Runner(store, fleet.channels, clock=clock).turn()
        with pytest.raises(Changed, match="was changed by somebody else"):
            records.save(replace(one, state=by_hand.pause(one, "", clock()).state), ())
        newest = records.get(one.id)
        records.save(replace(newest, state=by_hand.pause(newest, "", clock()).state), (STARTED,))
        Runner(store, fleet.channels, clock=clock)
        assert records.get(one.id).state.status == "paused"
        assert records.get(one.id).revision == newest.revision + 1


def test_a_pause_by_hand_reaches_the_repository(tmp_path: Path) -> None:
    with Store(f"sqlite:///{tmp_path / 'fleet.db'}") as store:
        fleet, records, clock = stored(store), Records(store), Clock()
        one: Rollout = records.add(rollout(), STARTED)
        runner = Runner(store, fleet.channels, clock=clock)
        runner.turn()
        one = records.get(one.id)
        records.save(replace(one, state=by_hand.pause(one, "", clock()).state), ())
        runner.turn()
        shown = fleet.channels.channel("stable", "shapes")
        assert shown is not None and (shown.shares, shown.target) == ({}, one.target)
        changes = fleet.channels.changes
        runner.turn()
        assert fleet.channels.changes == changes, "what is shown already is not signed again"


def test_a_release_that_is_withdrawn_meanwhile_ends_the_rollout(tmp_path: Path) -> None:
    with Store(f"sqlite:///{tmp_path / 'fleet.db'}") as store:
        fleet, records, clock = stored(store), Records(store), Clock()
        one = records.add(rollout(replace(QUICK, wave=(Wave(wait_s=0),))), STARTED)
        fleet.channels.broken = PublishError("releases/shapes/2.0.0: not published")
        runner = Runner(store, fleet.channels, clock=clock)
        for _ in range(3):
            runner.turn()
        done = records.get(one.id)
        assert (done.state.status, done.state.reason) == ("aborted", "releases/shapes/2.0.0: not published")
        shown = fleet.channels.channel("stable", "shapes")
        assert shown is not None and shown.rolled_back and not shown.target


def test_a_repository_that_refuses_is_reported_and_tried_again(tmp_path: Path) -> None:
    with Store(f"sqlite:///{tmp_path / 'fleet.db'}") as store:
        fleet, records = stored(store), Records(store)
        one = records.add(rollout(), STARTED)
        runner = Runner(store, fleet.channels, clock=Clock())
        fleet.channels.broken = EyasError("channels: its key is not here")
        assert runner.turn().problems == (f"{one.id}: channels: its key is not here",)
        assert runner.turn().problems == () and fleet.channels.changes == 1
        newest = records.get(one.id)
        records.save(replace(newest, state=by_hand.abort(newest, "", 1.0).state), ())
        fleet.channels.broken = PublishError("releases/shapes/1.0.0: not published")
        assert "1.0.0: not published" in runner.turn().problems[0]
        assert records.get(one.id).state.status == "aborted"


def test_devices_of_other_channels_sites_and_models_are_left_alone(tmp_path: Path) -> None:
    with Store(f"sqlite:///{tmp_path / 'fleet.db'}") as store:
        fleet, records = stored(store, 4), Records(store)
        fleet.fleet.change("cam-0", site="own")
        fleet.report()
        records.add(rollout(replace(QUICK, wave=(Wave(wait_s=0),)), without_sites=("own",)), STARTED)
        runner = Runner(store, fleet.channels, clock=Clock())
        steps = runner.turn().steps
        assert "3 begin" in steps[0][1].what


@pytest.mark.parametrize(
    "update",
    [{"attempts": -1}, {"attempts": 2**60}, {"reason": "x" * 5000}, {"group": "g" * 300}, {"checked": -1.0}],
)
def test_statuses_with_impossible_updates_are_refused(update: dict[str, object]) -> None:
    status = Status(device="cam-1", spool="00000000-0000-0000-0000-000000000001", sequence=1, time=1.0, state="online")
    payload = encode(status).replace(b'"update":null', b'"update":' + json.dumps(update).encode())
    assert isinstance(validate("eyas/s/cam-1/status", payload), InvalidMessage)
