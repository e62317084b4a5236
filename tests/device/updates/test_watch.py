"""The watcher: when it looks again, what wakes it, and that each look is a process of its own."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eyas_device.updates.progress import POKE, STATES, State, UpdateRecord, write_progress
from eyas_device.updates.records import Verdict, write_record
from eyas_device.updates.watch import Watch, pause_s


class Ended(Exception):  # noqa: N818 - reads as the state it reports
    """Ends a watch."""


class Clock:
    """A clock that moves when somebody sleeps; `events` happen at their times, and the watch ends at `end`."""

    def __init__(self, end: float) -> None:
        self.now, self.end = 0.0, end
        self.events: dict[float, Callable[[], object]] = {}

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        for at in [at for at in self.events if at <= self.now]:
            self.events.pop(at)()
        if self.now >= self.end:
            raise Ended


@pytest.fixture
def looks(tmp_path: Path) -> Path:
    (tmp_path / "updates").mkdir()
    return tmp_path / "looks"


def watch(state: Path, clock: Clock, looks: Path, poll_s: float) -> int:
    """Watch until the clock's end, and return how often was looked."""
    command = [sys.executable, "-S", "-c", f"open({str(looks)!r}, 'a').write('look ')"]
    with pytest.raises(Ended):
        Watch(command, state, poll_s, sleep=clock.sleep, clock=lambda: clock.now, chance=lambda: 0.5).run()
    return looks.read_text().count("look") if looks.exists() else 0


def test_it_looks_soon_after_the_start_and_then_every_poll_s(tmp_path: Path, looks: Path) -> None:
    assert watch(tmp_path, Clock(29.0), looks, 3600.0) == 0
    assert watch(tmp_path, Clock(3600 * 2.5), looks, 3600.0) == 3


def test_messages_in_quick_succession_cost_one_look_in_ten_seconds(tmp_path: Path, looks: Path) -> None:
    clock = Clock(1000.0)
    for at in (100.0, 102.0, 103.0, 104.0, 105.0):
        clock.events[at] = lambda at=at: (tmp_path / "updates" / POKE).write_text(str(at))  # type: ignore[misc]
    assert watch(tmp_path, clock, looks, 1e6) == 3, "at 30 s, at 100 s, and once for the others"


def test_a_message_that_arrives_during_a_look_is_not_lost(tmp_path: Path, looks: Path) -> None:
    poke = tmp_path / "updates" / POKE
    command = [sys.executable, "-S", "-c", f"open({str(looks)!r}, 'a').write('look '); open({str(poke)!r}, 'x')"]
    clock = Clock(1000.0)
    with pytest.raises(Ended):
        Watch(command, tmp_path, 1e6, sleep=clock.sleep, clock=lambda: clock.now, chance=lambda: 0.5).run()
    assert looks.read_text().count("look") == 2


def test_the_end_of_a_probation_asks_for_a_look_but_its_progress_does_not(tmp_path: Path, looks: Path) -> None:
    write_progress(tmp_path, UpdateRecord(state="probation", slot="b"))
    (tmp_path / "slots").mkdir()
    clock = Clock(89.0)
    for at, state in ((40.0, "running"), (50.0, "running"), (60.0, "passed")):
        verdict = Verdict(state=state, started=at)  # type: ignore[arg-type]
        clock.events[at] = lambda verdict=verdict: write_record(tmp_path / "slots/b.probation", verdict)  # type: ignore[misc]
    assert watch(tmp_path, clock, looks, 1e6) == 3, "at 30 s, when it began, and when it ended"


def test_a_command_that_cannot_run_ends_nothing(tmp_path: Path) -> None:
    clock = Clock(100.0)
    with pytest.raises(Ended):
        Watch(["/nowhere/python"], tmp_path, 10.0, sleep=clock.sleep, clock=lambda: clock.now).run()


def test_a_look_that_hangs_is_ended_and_one_that_is_slow_is_not(
    tmp_path: Path, looks: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The clock moves by an hour whenever it is read; the slow look writes a part of a blob each time."""
    blobs = tmp_path / "updates" / "blobs"
    blobs.mkdir()
    slow = f"import time; [(open({str(blobs)!r} + '/part', 'a').write('x'), time.sleep(0.4)) for _ in range(10)]"
    hangs = f"open({str(looks)!r}, 'a').write('look '); import time; time.sleep(1000)"
    clock = Clock(100.0)

    def hours() -> float:
        clock.now += 3600.0
        return clock.now

    for code, ended in ((slow, False), (hangs, True)):
        clock.now, clock.end = 0.0, 50 * 3600.0
        with pytest.raises(Ended):
            watching = Watch(
                [sys.executable, "-S", "-c", code],
                tmp_path,
                40 * 3600.0,
                sleep=clock.sleep,
                clock=hours,
                chance=lambda: 1,
            )
            watching.run()
        assert ("the look hangs: nothing has changed for 120 minutes" in caplog.text) == ended
    assert looks.read_text().count("look") == 1


RECORDS = st.builds(
    UpdateRecord, state=st.sampled_from(STATES), attempts=st.integers(0, 10**6), wait_s=st.floats(0, 86400)
)


@given(RECORDS, st.floats(10, 1e6), st.floats(0, 1))
def test_no_pause_is_longer_than_polling_and_none_is_busy(record: UpdateRecord, poll_s: float, chance: float) -> None:
    pause = pause_s(record, poll_s, chance=lambda: chance)
    assert 5 <= pause <= 1.5 * poll_s


def test_failures_wait_longer_each_time() -> None:
    def pause(state: State, attempts: int) -> float:
        return pause_s(UpdateRecord(state=state, attempts=attempts), 3600.0, chance=lambda: 0.5)

    assert [pause("failed", attempts) for attempts in (1, 2, 3, 20)] == [60, 120, 240, 3600]
    assert pause("committed", 1) == 3600 and pause("probation", 1) == 60
    waiting = UpdateRecord(wait_s=600.0)
    assert pause_s(waiting, 3600.0, chance=lambda: 0.5) == 660
