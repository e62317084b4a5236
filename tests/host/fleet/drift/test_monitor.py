"""The monitor on a store: the right device, the right time, and the same after restarts, lies and wrong clocks."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from benchmarks.drift_streams import Scripts
from eyas_host.fleet.drift.fleet_state import Tuning
from eyas_host.fleet.drift.measures import STEP_S
from eyas_host.fleet.drift.monitor import Monitor
from eyas_host.fleet.drift.profile import STEPS_OF_DAY
from eyas_host.fleet.drift.records import DriftRecords
from eyas_host.fleet.drift.report import describe, devices
from eyas_host.fleet.drift.service import line
from eyas_host.fleet.store.database import Batch, Store
from tests.support.drift_parts import BEGIN, DAY, DAYS, NAMES, START, TUNING, batches, copy_of, message, window_of


@pytest.fixture
def followed(fleet: str) -> Iterator[Monitor]:
    with Store(fleet) as store:
        monitor = Monitor(store, TUNING, clock=lambda: BEGIN + DAYS * DAY + 600)
        monitor.load()
        yield monitor


def test_one_dirty_camera_among_twenty_is_named(followed: Monitor) -> None:
    rows = devices(followed)
    assert [one.device for one in rows if one.alarm] == ["cam-7"]
    alarm = rows[0].alarm
    assert alarm is not None
    assert rows[0].state == "confirmed"
    assert (alarm.scope, alarm.site, alarm.model, alarm.digest) == ("device", "north", "parts 1.0.0", "0123456789ab")
    assert abs(alarm.since - (BEGIN + START * DAY)) < 3600
    assert alarm.since <= alarm.opened < alarm.since + 4 * 3600
    assert alarm.cause == "dirty, moved or defocused lens"
    assert "images" in alarm.families
    assert alarm.e_value > 400
    assert "cam-7" in alarm.advice
    text = "\n".join(describe(alarm))
    for word in ("what", "since", "sure", "do", "this device alone"):
        assert word in text
    assert {one.state for one in rows[1:]} == {"stable"}


def test_the_state_is_stored_and_read_again(fleet: str, followed: Monitor) -> None:
    with Store(fleet) as store:
        again = Monitor(store, TUNING, clock=lambda: BEGIN + DAYS * DAY + 600)
        assert again.catch_up() == []
        assert msgspec.json.encode(devices(again)) == msgspec.json.encode(devices(followed))


def test_turns_of_any_size_and_restarts_lead_to_the_same_state(url: str) -> None:
    names, scripts, tuning = NAMES[:2], Scripts.stable(2), Tuning(profile_days=0.7, calibration_days=0.4)
    scripts.kind[1], scripts.strength[1], scripts.start[1] = "new class", 3.0, 1.4 * STEPS_OF_DAY
    at = [BEGIN]
    with Store(url) as store, Store("sqlite://") as other:
        monitor, restarted = Monitor(store, tuning, clock=lambda: at[0]), None
        for arrival, batch in batches(names, scripts, 2):
            at[0] = BEGIN + arrival
            half = len(batch) // 2
            for part in (batch[:half], batch[half:]):
                store.add(Batch(at[0], part))
                other.add(Batch(at[0], part))
                at[0] += 1.0
            if arrival % (6 * 3600) == 0:
                monitor.turn(settle_s=0)
            if arrival % (18 * 3600) == 0:
                monitor = Monitor(store, tuning, clock=lambda: at[0])
        at[0] = BEGIN + 2 * DAY + 600
        monitor.catch_up()
        restarted = Monitor(other, tuning, clock=lambda: at[0])
        restarted.catch_up()
        one, two = devices(monitor), devices(restarted)
    assert [row.alarm is None for row in one] == [row.alarm is None for row in two]
    assert [row.device for row in one] == [row.device for row in two]
    for a, b in zip(one, two, strict=True):
        assert (a.state, a.frames, a.last, a.confidence) == (b.state, b.frames, b.last, b.confidence)
        assert a.ratio == pytest.approx(b.ratio, rel=1e-3)


def test_of_two_monitors_one_writes_and_the_other_goes_on_from_that(tmp_path: Path) -> None:
    at = [BEGIN]
    url = f"sqlite:///{tmp_path / 'fleet.db'}"
    with Store(url) as store, Store(url) as second:
        a, b = (Monitor(s, TUNING, clock=lambda: at[0]) for s in (store, second))
        for number, (arrival, batch) in enumerate(batches(NAMES[:2], Scripts.stable(2), 1)):
            at[0] = BEGIN + arrival + 120
            store.add(Batch(BEGIN + arrival, batch))
            (a if number % 2 else b).turn(settle_s=0)
        a.turn(settle_s=0)
        b.turn(settle_s=0)
        for monitor in (a, b):
            model = monitor.models["0123456789ab"]
            assert model.view("seen").tolist() == [STEPS_OF_DAY, STEPS_OF_DAY]


def test_a_write_between_read_and_write_is_noticed(tmp_path: Path) -> None:
    at = [BEGIN + 3700.0]
    with Store(f"sqlite:///{tmp_path / 'fleet.db'}") as store:
        _, batch = next(batches(NAMES[:2], Scripts.stable(2), 1))
        store.add(Batch(BEGIN + 3600, batch))
        slow, quick = (Monitor(store, TUNING, clock=lambda: at[0]) for _ in range(2))
        slow.load()
        assert quick.turn(settle_s=0).steps > 0
        before, slow._records.position = slow._records.position, lambda: slow._position  # type: ignore[method-assign]
        slow.turn(settle_s=0)
        slow._records.position = before  # type: ignore[method-assign]
        slow.turn(settle_s=0)
        assert slow.models["0123456789ab"].view("seen").tolist() == [12.0, 12.0]


def test_a_device_that_lies_floods_or_has_a_wrong_clock_harms_no_other(tmp_path: Path) -> None:
    at = [BEGIN + DAY]
    with Store(f"sqlite:///{tmp_path / 'fleet.db'}") as store:
        for arrival, batch in batches(NAMES[:2], Scripts.stable(2), 1):
            store.add(Batch(BEGIN + arrival, batch))
        good = msgspec.json.decode(batch[0].payload, type=dict[str, Any])
        del good
        sums = next(iter(_sums()))
        wrong = [
            window_of("liar", 10, sums, counts={"bolt": 1}),
            window_of("liar", 11, sums, confidence_sum={"bolt": 1e300}),
            window_of("ahead", 12, sums, time=BEGIN + 900 * DAY),
            window_of("behind", 13, sums, time=12.0),
            *(window_of("flood", 1000 + number, sums, time=BEGIN + 50 * STEP_S) for number in range(300)),
            *(window_of("hours", number, sums, seconds=20_000.0) for number in range(3)),
            *(window_of("trial", number, sums, arm="candidate") for number in range(3)),
        ]
        store.add(Batch(BEGIN + DAY - 1000, [message(one) for one in wrong]))
        monitor = Monitor(store, TUNING, clock=lambda: at[0])
        monitor.catch_up()
        rows = {one.device: one for one in devices(monitor)}
        assert rows["cam-1"].frames > 0
        assert set(rows) == {"cam-1", "cam-2", "liar", "ahead", "behind", "flood"}
        assert rows["liar"].frames == 0
        assert rows["flood"].frames <= 60 * sums[0]
        at[0] += 3600
        monitor.catch_up()
        last = {one.device: one.last for one in devices(monitor)}
        for name in ("ahead", "behind"):  # by their arrival
            assert abs(last[name] - (BEGIN + DAY - 1000)) <= 600


def _sums() -> Iterator[np.ndarray]:
    from benchmarks.drift_streams import days

    yield next(days(Scripts.stable(1), 1)).sums[0, 0]


def test_another_model_is_learned_anew_and_its_calibration_is_inherited(tmp_path: Path) -> None:
    at = [BEGIN]
    with Store(f"sqlite:///{tmp_path / 'fleet.db'}") as store:
        monitor = Monitor(store, TUNING, clock=lambda: at[0])
        for arrival, batch in batches(NAMES[:2], Scripts.stable(2), 2):
            store.add(Batch(BEGIN + arrival, batch))
        at[0] = BEGIN + 2 * DAY + 120
        monitor.catch_up()
        known = monitor.models["0123456789ab"].calibration.scores.sum()
        assert known > 0
        new = window_of("cam-1", 5000, next(iter(_sums())), digest="fedcba987654", model="parts 1.1.0", time=at[0])
        store.add(Batch(at[0], [message(new)]))
        at[0] += 1200
        monitor.catch_up()
        rows = {one.device: one for one in devices(monitor)}
        assert (rows["cam-1"].digest, rows["cam-1"].state) == ("fedcba987654", "learning")
        assert rows["cam-2"].digest == "0123456789ab"
        assert monitor.models["fedcba987654"].calibration.scores.sum() == known


def test_what_is_accepted_is_learned_anew(tmp_path: Path, fleet: str) -> None:
    with Store(copy_of(fleet, tmp_path)) as store:
        monitor = Monitor(store, TUNING, clock=lambda: BEGIN + DAYS * DAY + 600)
        monitor.forget("cam-7")
        again = Monitor(store, TUNING, clock=lambda: BEGIN + DAYS * DAY + 600)
        again.catch_up()
        rows = {one.device: one for one in devices(again)}
        assert (rows["cam-7"].state, rows["cam-7"].alarm) == ("learning", None)
        (closed,) = DriftRecords(store).alarms(closed_since=0.0)
        assert (closed.device, closed.state) == ("cam-7", "closed")


def test_an_alarm_is_explained_and_stored_in_the_turn_in_which_it_opens(tmp_path: Path) -> None:
    """Whoever is told of an alarm is told what it is: that may be the only message of it."""
    scripts, tuning, at = Scripts.stable(3), Tuning(profile_days=0.7, calibration_days=0.4), [BEGIN]
    scripts.kind[1], scripts.strength[1], scripts.start[1] = "dirt", 5.0, 1.4 * STEPS_OF_DAY
    seen = []
    with Store(f"sqlite:///{tmp_path}/fleet.db") as store:
        monitor = Monitor(store, tuning, clock=lambda: at[0])
        for arrival, batch in batches(NAMES[:3], scripts, 2):
            at[0] = BEGIN + arrival
            store.add(Batch(at[0], batch))
            if arrival % 3600 == 0:
                at[0] += 120
                for alarm in monitor.turn(settle_s=0).changed:
                    stored = next(one for one in DriftRecords(store).load()[3] if one.id == alarm.id)
                    seen.append((alarm.device, alarm.cause, line(alarm)))
                    assert stored == alarm
    assert seen and {device for device, _, _ in seen} == {"cam-2"}
    assert all(cause == "dirty, moved or defocused lens" and cause in text for _, cause, text in seen), seen
