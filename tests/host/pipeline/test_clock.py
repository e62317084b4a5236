"""The time left for a chain: estimates, corrected by what was measured."""

from __future__ import annotations

import pytest

from eyas_host.pipeline.clock import ChainClock, Step
from eyas_host.support.progress import Meter


class Time:
    """A clock that only moves when told."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def run(meter: Meter, time: Time, *, steps: int, seconds: float) -> None:
    for _ in range(steps):
        time.now += seconds
        meter.advance()


PLAN = {"teach": (Step(10.0), Step(100.0, "blocks")), "qat": (Step(50.0),)}


def test_before_the_first_stage_all_of_it_is_left() -> None:
    assert ChainClock(PLAN, Time()).left() == pytest.approx(160.0)


def test_a_loop_is_estimated_by_its_own_speed_and_what_follows_by_how_wrong_the_estimate_was() -> None:
    time = Time()
    clock = ChainClock(PLAN, time)
    clock.enter("teach")
    time.now += 10
    meter = Meter("blocks", 100)
    clock.follow(meter)
    run(meter, time, steps=50, seconds=2.0)
    assert clock.left() == pytest.approx(50 * 2.0 + 50.0, rel=0.05)
    run(meter, time, steps=50, seconds=2.0)
    clock.follow(None)
    clock.leave()
    assert 75 < clock.left() < 100, "200 s instead of 100: what is left is half as long again at least"


def test_a_first_second_that_was_quick_does_not_halve_the_rest() -> None:
    time = Time()
    clock = ChainClock({"split": (Step(10.0),), "teach": (Step(600.0, "blocks"),)}, time)
    clock.enter("split")
    time.now += 1
    clock.leave()
    assert clock.left() == pytest.approx(600.0, rel=0.15)


def test_a_loop_that_ends_early_says_nothing_about_the_speed() -> None:
    time = Time()
    clock = ChainClock(PLAN, time)
    clock.enter("teach")
    time.now += 10
    meter = Meter("blocks", 100)
    clock.follow(meter)
    run(meter, time, steps=30, seconds=1.0)
    clock.follow(None)
    assert clock.left() == pytest.approx(50.0)


def test_a_resumed_loop_counts_only_what_it_did_itself() -> None:
    time = Time()
    clock = ChainClock({"teach": (Step(100.0, "blocks"),)}, time)
    clock.enter("teach")
    meter = Meter("blocks", 100, 60)
    clock.follow(meter)
    run(meter, time, steps=20, seconds=1.0)
    assert clock.left() == pytest.approx(20.0)


def test_stages_that_are_skipped_and_loops_that_are_in_no_plan() -> None:
    time = Time()
    clock = ChainClock(PLAN, time)
    clock.enter("qat")
    clock.follow(Meter("something else", 5))
    time.now += 20
    assert clock.left() == pytest.approx(30.0)
    assert clock.line() == "about 30 s left in all; qat: something else 0/5"
    clock.follow(None)
    clock.leave()
    assert clock.left() == 0.0


def test_a_stage_that_takes_longer_than_planned_never_has_nothing_left() -> None:
    time = Time()
    clock = ChainClock(PLAN, time)
    clock.enter("qat")
    time.now += 500
    assert clock.left() > 0
