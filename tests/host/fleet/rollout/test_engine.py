"""The engine, against devices that follow the channel: whoever is touched was meant to be, in every order of events."""

from __future__ import annotations

import math
import random

import msgspec
import pytest
from msgspec.structs import replace

from eyas_device.updates.release import takes_target
from eyas_host.fleet.rollout import by_hand
from eyas_host.fleet.rollout.engine import count_wave, decide, progress, wave_members
from eyas_host.fleet.rollout.plan import (
    ControlSection,
    Plan,
    RetrySection,
    RolloutError,
    RolloutSection,
    Wave,
    plan_of_waves,
)
from eyas_host.fleet.rollout.shares import control_group
from eyas_host.fleet.rollout.state import Rollout, Seen, Step, channel_of
from tests.support.rollout_parts import NEW, OLD, QUICK, SimulatedFleet, advance, rollout

WAVES = QUICK.wave


def names(count: int) -> list[str]:
    return [f"cam-{number}" for number in range(count)]


def taking(one: Rollout, fleet: SimulatedFleet) -> set[str]:
    channel = channel_of(one)
    return {name for name, seen in fleet.devices.items() if takes_target(channel, seen.group, name)}


@pytest.mark.parametrize("seed", range(40))
def test_waves_are_nested_and_never_touch_more_devices_than_planned(seed: int) -> None:
    """Random fleets, groups, plans and answers; a device in no wave so far is never touched."""
    rnd = random.Random(seed)
    groups = ["default", "canary", "night"][: rnd.randint(1, 3)]
    fleet = SimulatedFleet(names(rnd.randint(1, 60)), groups=groups, seed=seed)
    sizes = {group: sum(seen.group == group for seen in fleet.seen) for group in groups}
    shares = sorted({rnd.choice((0.01, 0.05, 0.2, 0.5, 0.8)) for _ in range(rnd.randint(1, 3))})
    first = [Wave(group="canary", share=1.0, wait_s=0)] if "canary" in groups and rnd.random() < 0.5 else []
    shares = [] if first and rnd.random() < 0.3 else shares
    plan = replace(
        QUICK,
        wave=(*first, *(Wave(share=share, wait_s=0) for share in shares), Wave(wait_s=0)),
        control=ControlSection(share=rnd.choice((0.0, 0.1, 0.5))),
    )
    one = rollout(plan, id=f"shapes-{seed}")
    before: set[str] = set()
    for now in range(400):
        one, _ = advance(one, fleet, now, share=0.4)
        wave, members = one.state.wave, taking(one, fleet)
        assert before <= members
        assert fleet.touched <= members
        if one.state.status == "finished":
            break
        before = members
        allowed = {
            group: max(math.ceil(w.share * size - 1e-9) for w in plan.wave[: wave + 1] if w.group in ("*", group))
            for group, size in sizes.items()
            if any(w.group in ("*", group) for w in plan.wave[: wave + 1])
        }
        named = {w.group for w in plan.wave[: wave + 1]} - {"*"}
        rest = [group for group in groups if group not in named]
        rest_size = sum(sizes[group] for group in rest)
        for group in named & set(groups):
            assert sum(fleet.devices[name].group == group for name in members) <= allowed[group]
        largest = max((w.share for w in plan.wave[: wave + 1] if w.group == "*"), default=0.0)
        assert sum(fleet.devices[n].group in rest for n in members) <= math.ceil(largest * rest_size - 1e-9)
        assert not members & set(one.state.control)
        assert not {name for name in one.state.control if fleet.devices[name].digest == NEW}
    assert one.state.status == "finished"
    fleet.follow(channel_of(one))
    assert fleet.running(NEW) == set(fleet.devices)


@pytest.mark.parametrize("stop_at", range(12))
@pytest.mark.parametrize("back", [True, False])
def test_an_abort_at_any_time_ends_with_the_old_version_or_touches_nobody_more(stop_at: int, back: bool) -> None:
    fleet = SimulatedFleet(names(30), seed=stop_at)
    one = rollout(replace(QUICK, wave=tuple(replace(wave, then="ask") for wave in WAVES)))
    for now in range(stop_at):
        one, _ = advance(one, fleet, now, share=0.5)
        if one.state.wants:
            one = replace(one, state=by_hand.approve(one, fleet.seen, "", now).state)
    touched = set(fleet.touched)
    one = replace(one, state=by_hand.abort(one, "stop", stop_at, roll_back=back).state)
    kept = fleet.running(NEW)
    for now in range(stop_at, stop_at + 60):
        one, _ = advance(one, fleet, now, share=0.5)
    assert one.state.status == "aborted"
    assert fleet.touched == touched
    assert fleet.running(NEW) == (set() if back else kept)


def test_a_bad_version_stops_in_its_wave_and_goes_back_everywhere() -> None:
    fleet = SimulatedFleet(names(200))
    fleet.failing = set(fleet.devices)
    one = rollout()
    log: list[Step] = []
    for now in range(20):
        one, decision = advance(one, fleet, now)
        log += decision.steps
    assert one.state.status == "aborted"
    assert len(fleet.touched) == 20
    assert fleet.running(OLD) == set(fleet.devices)
    assert "20 of 20 failed" in one.state.reason or "failed, more than 0.05" in one.state.reason
    assert "agreement 12 % is below 70 % (20)" in one.state.reason
    assert [step.what.split(":")[0] for step in log][:2] == ["wave 1 of 3", "aborted"]


def test_one_failure_among_many_does_not_stop_it_and_one_in_a_small_wave_does() -> None:
    fleet = SimulatedFleet(names(400))
    one, _ = advance(rollout(), fleet, 0)
    fleet = SimulatedFleet(names(400))
    fleet.failing = {sorted(taking(one, fleet))[0]}
    one = rollout()
    for now in range(20):
        one, _ = advance(one, fleet, now)
    assert one.state.status == "finished"
    small = SimulatedFleet(names(20))
    small.failing = set(small.devices)
    one = rollout()
    for now in range(2):
        one, _ = advance(one, small, now)
    small_touched = len(small.touched)
    assert (one.state.status, small_touched) == ("aborting", 2)


def test_failures_that_may_pass_are_reminded_with_growing_intervals_and_count_in_the_end() -> None:
    plan = replace(QUICK, retry=RetrySection(attempts=3, wait_s=10, reasons="timed out"), wave=(Wave(wait_s=0),))
    fleet = SimulatedFleet(["cam-1"])
    fleet.failing, fleet.state = {"cam-1"}, "failed"
    one, _ = advance(rollout(plan), fleet, 0)
    fleet.change("cam-1", reason="the server: Timed Out")
    reminded = []
    for now in range(1, 100):
        one, decision = advance(one, fleet, now)
        reminded += [now] if decision.remind else []
    assert reminded == [11, 31, 71]
    assert one.state.status == "running"
    fleet.change("cam-1", attempts=3)
    one, decision = advance(one, fleet, 100)
    assert one.state.status in ("aborting", "aborted")
    fleet = SimulatedFleet(["cam-1"])
    fleet.failing, fleet.state = {"cam-1"}, "failed"
    one, _ = advance(rollout(plan), fleet, 0)
    one, _ = advance(one, fleet, 1)
    assert "agreement 12 %" in one.state.reason


def test_who_went_silent_after_it_began_has_failed_and_who_is_switched_off_has_not() -> None:
    one = rollout(replace(QUICK, rollout=RolloutSection(silent_s=60), wave=(Wave(wait_s=0),)))
    fleet = SimulatedFleet(names(3))
    one, _ = advance(one, fleet, 0)
    fleet.change("cam-0", connected=False, lost=True, last_seen=100.0)
    fleet.change("cam-1", connected=False, lost=False, last_seen=100.0)
    states = {seen.device: progress(one, seen, 170.0) for seen in fleet.seen}
    assert states == {"cam-0": "silent", "cam-1": "done", "cam-2": "done"}
    assert progress(one, replace(fleet.devices["cam-0"], digest=OLD, update_digest=""), 170.0) == "offline"
    one, _ = advance(one, fleet, 170.0)
    assert "1 of 3 failed" in one.state.reason


def test_devices_that_are_off_do_not_hold_a_wave_up_and_take_part_later() -> None:
    fleet = SimulatedFleet(names(20))
    for name in names(8):
        fleet.change(name, connected=False)
    one = rollout()
    for now in range(10):
        one, _ = advance(one, fleet, now)
    assert one.state.status == "finished"
    assert fleet.running(OLD) == set(names(8))
    for name in names(8):
        fleet.change(name, connected=True)
    fleet.follow(channel_of(one))
    assert not fleet.running(OLD)


def test_a_wave_that_is_not_good_in_time_pauses_and_a_pause_lets_nobody_begin() -> None:
    plan = replace(QUICK, wave=(Wave(share=0.5, timeout_s=100, wait_s=0), Wave(wait_s=0)))
    fleet = SimulatedFleet(names(10))
    one = replace(rollout(plan), state=decide(rollout(plan), fleet.seen, 0.0).state)
    for now in (1, 50, 101):
        one = replace(one, state=decide(one, fleet.seen, now).state)
    assert (one.state.status, one.state.wants) == ("paused", "resume")
    assert one.state.reason == "wave 1 is not good after 100 s (5 devices: 5 waiting)"
    fleet.follow(channel_of(one))
    assert not fleet.touched
    one = replace(one, state=by_hand.resume(one, fleet.seen, "the network is back", 200.0).state)
    fleet.follow(channel_of(one))
    assert len(fleet.touched) == 5


def test_who_resumes_after_failures_is_not_stopped_by_the_same_ones() -> None:
    plan = replace(QUICK, rollout=RolloutSection(on_error="pause"))
    fleet = SimulatedFleet(names(30))
    one, _ = advance(rollout(plan), fleet, 0)
    fleet = SimulatedFleet(names(30))
    fleet.failing = {sorted(taking(one, fleet))[0]}
    one = rollout(plan)
    for now in range(4):
        one, _ = advance(one, fleet, now)
    assert one.state.status == "paused" and "1 of 3 failed" in one.state.reason
    one = replace(one, state=by_hand.resume(one, fleet.seen, "known camera", 5).state)
    for now in range(6, 20):
        one, _ = advance(one, fleet, now)
    assert one.state.status == "finished"


def test_waiting_for_people() -> None:
    plan = replace(QUICK, wave=(replace(WAVES[0], then="ask"), replace(WAVES[1], then="pause"), WAVES[2]))
    fleet = SimulatedFleet(names(20))
    one = rollout(plan)
    for now in range(5):
        one, _ = advance(one, fleet, now)
    assert (one.state.status, one.state.wants, len(fleet.touched)) == ("waiting", "approve", 2)
    with pytest.raises(RolloutError, match="waits for an approval"):
        by_hand.resume(one, fleet.seen, "", 5)
    one = replace(one, state=by_hand.approve(one, fleet.seen, "looks good", 5).state)
    for now in range(6, 10):
        one, _ = advance(one, fleet, now)
    assert (one.state.status, one.state.wants, len(fleet.touched)) == ("waiting", "resume", 10)
    with pytest.raises(RolloutError, match="no approval"):
        by_hand.approve(one, fleet.seen, "", 10)
    one = replace(one, state=by_hand.resume(one, fleet.seen, "", 10).state)
    for now in range(11, 20):
        one, _ = advance(one, fleet, now)
    assert one.state.status == "finished"
    for act in (by_hand.pause, by_hand.abort):
        with pytest.raises(RolloutError, match="is finished"):
            act(one, "", 21)


def test_a_good_wave_is_watched_and_a_device_that_falls_back_meanwhile_counts() -> None:
    plan = replace(QUICK, wave=(Wave(share=0.5, wait_s=100), Wave(wait_s=0)))
    fleet = SimulatedFleet(names(10))
    one = rollout(plan)
    for now in (0, 1, 50):
        one, _ = advance(one, fleet, now)
    assert (one.state.wave, one.state.reached) == (0, 1)
    fleet.change(sorted(fleet.touched)[0], digest=OLD, update="rolled back", reason="not finite")
    one, _ = advance(one, fleet, 99)
    assert "not finite (1)" in one.state.reason


def test_states_survive_being_stored() -> None:
    fleet = SimulatedFleet(names(30), seed=3)
    one = rollout(replace(QUICK, control=ControlSection(share=0.2)))
    for now in range(20):
        one, _ = advance(one, fleet, now, share=0.5)
        one = msgspec.json.decode(msgspec.json.encode(one), type=Rollout)
    assert one.state.status == "finished"


def test_a_device_that_joins_meanwhile_is_part_of_its_wave() -> None:
    fleet = SimulatedFleet(names(40))
    one, _ = advance(rollout(), fleet, 0)
    fleet.devices |= {f"new-{n}": Seen(device=f"new-{n}", digest=OLD) for n in range(40)}
    members = {seen.device for seen in wave_members(one, fleet.seen)}
    joined = {name for name in members if name.startswith("new-")}
    assert 0 < len(joined) < 15
    assert count_wave(one, fleet.seen, 0).members == len(members)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1%,ten", "'ten'; shares are needed"),
        ("10%,5%,100%", "not above 0.1"),
        ("10%,50%", "the last one must be for all"),
        ("0%,100%", "greater than 0|> 0.0"),
        ("canary=50%", "the last one must be for all"),
        ("a/b=5%,100%", "group"),
    ],
)
def test_impossible_waves_are_refused(text: str, message: str) -> None:
    with pytest.raises(RolloutError, match=message):
        plan_of_waves(text)


def test_waves_as_options() -> None:
    plan = plan_of_waves("canary=100%, 10%,100%", Plan(retry=RetrySection(attempts=9)), wait_s=5.0)
    assert [(wave.group, wave.share, wave.wait_s) for wave in plan.wave] == [
        ("canary", 1.0, 5.0),
        ("*", 0.1, 5.0),
        ("*", 1.0, 5.0),
    ]
    assert plan.retry.attempts == 9


def test_the_control_group_of_a_large_fleet_is_as_large_as_is_compared_and_in_every_group() -> None:
    seen = [Seen(device=f"cam-{n}", group="small" if n < 4 else "large") for n in range(3000)]
    control = control_group("r", seen, 0.3)
    assert 200 <= len(control) <= 202
    assert sum(name in {f"cam-{n}" for n in range(4)} for name in control) == 1
    assert control_group("r", seen[:1], 0.5) == ()
