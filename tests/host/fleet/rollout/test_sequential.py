"""The comparison with the control group: false stops over a whole rollout, bad versions found, and honesty with few."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import pytest
from msgspec.structs import replace

from eyas_device.telemetry.messages import Window
from eyas_host.fleet.rollout import by_hand
from eyas_host.fleet.rollout.cohorts import due_cohorts, verdict
from eyas_host.fleet.rollout.engine import decide
from eyas_host.fleet.rollout.plan import ControlSection, Plan, QualitySection, Wave
from eyas_host.fleet.rollout.quality import DeviceFigures, Sums, describe, device_figures, look, too_few
from eyas_host.fleet.rollout.sequential import draws, possible_draws, spent, stop
from eyas_host.fleet.rollout.state import Cohort, channel_of
from tests.support.rollout_parts import NEW, OLD, SimulatedFleet, rollout

FLEETS = [(6, 14), (20, 20), (3, 40)]


def correlated(rng: np.random.Generator, devices: int, looks: int) -> npt.NDArray[np.float64]:
    """Changes of devices as cameras have them: a persistent shift each, slow drift, and noise; (looks, devices)."""
    shift = rng.standard_t(3, devices)
    drift = np.cumsum(rng.normal(0, 0.3, (looks, devices)), axis=0)
    noise = np.cumsum(rng.normal(0, 1, (looks, devices)), axis=0) / np.arange(1, looks + 1)[:, None]
    return shift + drift + noise


def stopped_at(rng: np.random.Generator, treated: int, held: int, effect: float, looks: int, alpha: float) -> int:
    """The look at which a simulated comparison alarms; 0 if never. A look at each window."""
    real = [True] * treated + [False] * held
    matrix = draws(real, [""] * len(real), seed=int(rng.integers(1 << 30)))
    values = correlated(rng, len(real), looks) + effect * np.array(real)
    stopped = np.zeros(len(matrix), bool)
    for number in range(1, looks + 1):
        stopped = stop(values[number - 1], matrix, stopped, number, alpha)
        if stopped[0]:
            return number
    return 0


@pytest.mark.parametrize(("treated", "held"), FLEETS)
def test_a_version_that_is_no_worse_is_rarely_stopped_whatever_the_number_of_looks(treated: int, held: int) -> None:
    rng = np.random.default_rng(treated)
    runs = 120
    false = sum(stopped_at(rng, treated, held, 0.0, 30, 0.05) > 0 for _ in range(runs))
    assert false <= runs * 0.05 + 3 * math.sqrt(runs * 0.05 * 0.95)
    assert false > 0, "a test that never stops would pass, too"


def test_fixed_thresholds_at_each_look_would_stop_many() -> None:
    """Else the simulation would be too easy: a plain test at 5 % at each look alarms far more often."""
    rng = np.random.default_rng(1)
    real = np.array([True] * 20 + [False] * 20)
    matrix = draws(real.tolist(), [""] * 40, seed=2)
    alarms = 0
    for _ in range(100):
        values = correlated(rng, 40, 50)
        alarms += any(stop(row, matrix, np.zeros(len(matrix), bool), 1, 0.1)[0] for row in values)
    assert alarms > 15


def test_a_worse_version_is_stopped_at_the_first_looks() -> None:
    rng = np.random.default_rng(0)
    found = [stopped_at(rng, 20, 20, 4.0, 20, 0.05 / 12) for _ in range(40)]
    assert all(found) and np.median(found) <= 2


def test_draws_are_complete_or_the_same_again() -> None:
    real, strata = [True, False, False, True, False], ["a", "a", "a", "b", "b"]
    matrix = draws(real, strata, 1)
    assert len(matrix) == possible_draws(real, strata) == 6
    assert matrix[0].tolist() == real and len({tuple(row) for row in matrix.tolist()}) == 6
    assert all(row[:3].sum() == 1 and row[3:].sum() == 1 for row in matrix)
    many = draws([True] * 20 + [False] * 20, [""] * 40, 5)
    assert (many == draws([True] * 20 + [False] * 20, [""] * 40, 5)).all() and many.shape == (2000, 40)
    assert sum(spent(number, 0.05) - spent(number - 1, 0.05) for number in range(1, 1000)) < 0.05


def test_equal_figures_and_missing_ones_never_alarm() -> None:
    real = [True] * 10 + [False] * 10
    matrix = draws(real, [""] * 20, 0)
    for values in (np.zeros(20), np.full(20, np.nan), np.array([1.0] * 10 + [np.nan] * 10)):
        stopped = np.zeros(len(matrix), bool)
        for number in range(1, 30):
            stopped = stop(values, matrix, stopped, number, 0.5)
        assert not stopped[0]


def window(device: str, moment: float, digest: str, *, confidence: float = 0.9, **fields: object) -> Window:
    made: dict[str, object] = {"frames": 200, "confidence_sum": {"crack": 200 * confidence}, "latency_bins": {140: 200}}
    return Window(device=device, time=moment, digest=digest, **(made | fields))  # type: ignore[arg-type]


def test_figures_of_a_device_are_those_before_the_wave_and_since_the_comparison_by_the_right_model() -> None:
    cohort = Cohort(wave=0, treated=("a",), control=("b",), started=1000.0, since=1100.0)
    windows = [
        window("a", 100.0, OLD, confidence=0.1),
        window("a", 950.0, OLD, confidence=0.9),
        window("a", 1050.0, NEW, confidence=0.2),
        window("a", 1150.0, OLD, confidence=0.3),
        window("a", 1160.0, NEW, confidence=0.7, nonfinite=2, ood_reason="dark", latency_bins={154: 200}),
    ]
    changes = device_figures(windows, cohort, 500.0, NEW).changes(100)
    assert changes["confidence"] == pytest.approx(0.2)
    assert (changes["ood"], changes["errors"]) == (1.0, 0.01)
    assert math.exp(changes["latency"]) == pytest.approx(1.05**14, rel=0.01)
    assert all(math.isnan(value) for value in device_figures(windows, cohort, 500.0, NEW).changes(201).values())


def figures(before: float, after: float) -> DeviceFigures:
    def sums(confidence: float) -> Sums:
        return Sums(windows=5, frames=1000, confidence=1000 * confidence, latency_bins={140: 1000})

    return DeviceFigures(before=sums(before), after=sums(after))


def test_what_is_tolerated_does_not_stop_and_more_does() -> None:
    names = [f"cam-{number}" for number in range(24)]
    cohort = Cohort(wave=0, treated=tuple(names[:12]), control=tuple(names[12:]), groups=dict.fromkeys(names, "g"))
    quality = QualitySection(confidence=0.05)
    assert not too_few(cohort, 0.05 / 12)
    rng = np.random.default_rng(0)
    for loss, worse in ((0.0, False), (0.03, False), (0.3, True)):
        found = {
            name: figures(0.9 + noise, 0.9 + noise - loss * (name in cohort.treated) + rng.normal(0, 0.005))
            for name, noise in zip(names, rng.normal(0, 0.05, 24), strict=True)
        }
        _, result = look(cohort, found, quality, alpha=0.05 / 3, seed="x")
        assert [figure.name for figure in result if figure.worse] == ["confidence"] * worse


@pytest.mark.parametrize(("gain", "sensor", "worse"), [(2.0, True, False), (9.0, True, True), (9.0, False, False)])
def test_a_version_that_makes_processors_hot_is_worse_where_they_have_a_sensor(
    gain: float, sensor: bool, worse: bool
) -> None:
    """Rooms differ by far more than what the version adds: each device is compared with itself."""
    names = [f"cam-{number}" for number in range(24)]
    cohort = Cohort(
        wave=0,
        treated=tuple(names[:12]),
        control=tuple(names[12:]),
        groups=dict.fromkeys(names, "g"),
        started=1000.0,
        since=1100.0,
    )
    rng, found = np.random.default_rng(0), {}
    for name, room in zip(names, rng.uniform(20, 70, 24), strict=True):
        windows = [
            window(
                name,
                900.0 + 10 * number,
                NEW if number >= 20 else OLD,
                temperature_c=room + rng.normal(0, 1) + gain * (number >= 20 and name in cohort.treated)
                if sensor
                else None,
            )
            for number in range(40)
        ]
        found[name] = device_figures(windows, cohort, 500.0, NEW if name in cohort.treated else "")
    _, result = look(cohort, found, QualitySection(), alpha=0.05 / 3, seed="x")
    assert [figure.name for figure in result if figure.worse] == ["temperature"] * worse
    assert ("temperature" in describe(result)) is sensor
    if sensor:
        (shown,) = (figure for figure in result if figure.name == "temperature")
        assert shown.treated is not None and shown.control is not None
        assert shown.treated - shown.control == pytest.approx(gain, abs=1.0)


def with_control(devices: int, **quality: object) -> tuple[Plan, SimulatedFleet]:
    plan = Plan(
        wave=(Wave(share=0.25, wait_s=100), Wave(wait_s=100)),
        control=ControlSection(share=0.25),
        quality=QualitySection(look_s=10, **quality),  # type: ignore[arg-type]
    )
    return plan, SimulatedFleet([f"cam-{number}" for number in range(devices)])


@pytest.mark.parametrize("then", ["abort", "pause"])
def test_a_version_that_installs_well_and_answers_badly_stops_in_its_wave(then: str) -> None:
    plan, fleet = with_control(80)
    plan = replace(plan, rollout=replace(plan.rollout, on_worse=then))
    one = rollout(plan)
    for now in range(0, 500, 2):
        due = {}
        for index in due_cohorts(one, now):
            cohort = one.state.cohorts[index]
            due[index] = {name: figures(0.9, 0.9) for name in cohort.control}
            due[index] |= {name: figures(0.9, 0.6) for name in cohort.treated}
        decision = decide(one, fleet.seen, now, due)
        one = replace(one, state=decision.state)
        fleet.follow(channel_of(one))
    assert len(fleet.touched) == 20
    assert "worse than the control group in wave 1: confidence -0.300 (worse)" in one.state.reason
    if then == "abort":
        assert (one.state.status, fleet.running(NEW)) == ("aborted", set())
        return
    assert (one.state.status, len(fleet.running(NEW))) == ("paused", 20)
    one = replace(one, state=by_hand.resume(one, fleet.seen, "better so", 500).state)
    assert not due_cohorts(one, 510) and verdict(one.state.cohorts[0]) == "worse, and accepted"
    one = replace(one, state=decide(one, fleet.seen, 510).state)
    assert one.state.status == "running"


def test_few_devices_are_not_enough_and_say_so() -> None:
    plan, fleet = with_control(8, undecided="ask")
    one = rollout(plan)
    for now in range(0, 200, 2):
        one = replace(one, state=decide(one, fleet.seen, now).state)
        fleet.follow(channel_of(one))
    assert (one.state.status, one.state.wants) == ("waiting", "approve")
    assert (
        "not enough to judge quality: 2 devices and 2 of the control group can be drawn in 6 ways" in one.state.reason
    )
