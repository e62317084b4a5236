"""No message waits longer for the disk than was promised, however late the program and however slow the disk is."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from eyas_device.telemetry.spool.sync_timer import TURN_S, SyncTimer


class _Written:
    """A program that writes every `every_s` seconds, looks `late_s` too late and has a disk that takes `disk_s`."""

    def __init__(self, within_s: float, every_s: float) -> None:
        self.now = 0.0
        self.timer = SyncTimer(within_s, lambda: self.now)
        self._every_s, self._next, self._unsynced = every_s, 0.0, list[float]()
        self.oldest: list[float] = []
        """Age of the oldest message at the end of each sync: what a power cut just before that would cost."""
        self.looks = 0

    def turn(self, late_s: float, disk_s: float) -> None:
        self._pass(self.timer.due_in() + late_s)
        self.looks += 1
        if self.timer.waiting and not self.timer.due_in():
            synced, self._unsynced = self._unsynced, []
            self.timer.begin()
            self._pass(disk_s)
            self.timer.ended()
            self.oldest.append(self.now - synced[0])

    def _pass(self, seconds: float) -> None:
        end = self.now + seconds
        while self._next <= end:
            self.now = self._next
            self._unsynced.append(self.now)
            self.timer.wrote()
            self._next += self._every_s
        self.now = end


times = st.floats(0.001, 1.0)


@given(within_s=st.floats(2.0, 20.0), every_s=st.floats(0.05, 5.0), late_s=st.just(0.0) | times, disk_s=times)
def test_a_disk_that_is_always_as_slow_costs_no_more_than_was_promised(
    within_s: float, every_s: float, late_s: float, disk_s: float
) -> None:
    """The first sync measures the disk; a program that is late may be so at two looks, that for the sync included."""
    late_s, disk_s = late_s * within_s / 8, disk_s * within_s / 8
    program = _Written(within_s, every_s)
    while len(program.oldest) < 8:
        program.turn(late_s, disk_s)
    assert program.oldest[0] <= within_s + 2 * late_s + disk_s + 1e-9
    assert max(program.oldest[1:]) <= within_s + 2 * late_s + 1e-9
    assert min(program.oldest) >= min(0.5 * within_s, within_s - 2 * (late_s + disk_s)) - 1e-9, "no sync too early"


@given(st.floats(0.0, 20.0), st.floats(0.05, 5.0), st.lists(st.tuples(times, times), min_size=5, max_size=40))
def test_whatever_the_disk_does_it_is_late_by_no_more_than_it_took(
    within_s: float, every_s: float, turns: list[tuple[float, float]]
) -> None:
    program = _Written(within_s, every_s)
    for late_s, disk_s in turns:
        before = len(program.oldest)
        program.turn(late_s, disk_s)
        if len(program.oldest) > before:
            assert program.oldest[-1] <= max(within_s, TURN_S) + 2 + disk_s + 1e-9


def test_a_quiet_spool_is_looked_at_once_a_second_and_not_synced() -> None:
    program = _Written(10.0, 1e9)
    for _ in range(12):
        program.turn(0.0, 0.0)
    assert program.now == 12.0
    assert program.oldest == [10.0], "the one message, at its time"
