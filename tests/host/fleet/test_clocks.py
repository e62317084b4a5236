"""Times of boards without a clock, against the true times that the test knows."""

from __future__ import annotations

import random
import uuid
from dataclasses import dataclass, field
from typing import Any

import pytest
from sqlalchemy import create_engine, text

from eyas_device.telemetry.messages import encode
from eyas_host.fleet.store import clocks
from eyas_host.fleet.store.database import Batch, Store
from eyas_host.fleet.store.retention import Retention, expire
from eyas_host.fleet.store.validate import ValidMessage, validate
from tests.support.fleet_parts import window

TRUE = 1_800_000_000.0
"""When the board starts first, seconds since 1970."""
DAY = 86_400.0


@dataclass
class Board:
    """A board whose wall clock is off by `error` seconds; each message's `frames` is its number."""

    device: str = "cam-1"
    spool: str = str(uuid.UUID(int=7))
    started: float = TRUE
    error: float = -TRUE
    """Its clock starts in 1970."""
    synchronised: bool | None = False
    boot: str = "11111111"
    sequence: int = 0
    true: dict[int, float] = field(default_factory=dict)
    """Sequence -> true time."""

    def restart(self, at: float, **changes: Any) -> None:
        self.started, self.boot = at, f"{int(self.boot) + 1}"
        for name, value in changes.items():
            setattr(self, name, value)

    def make(self, at: float) -> ValidMessage:
        """A window that is made at the true time `at`."""
        number, self.sequence = self.sequence, self.sequence + 1
        self.true[number] = at
        message = window(
            self.device,
            self.spool,
            number,
            time=max(0.0, at + self.error),
            uptime_s=at - self.started,
            boot=self.boot,
            synchronised=self.synchronised,
        )
        verdict = validate(f"eyas/s/{self.device}/window", encode(message))
        assert isinstance(verdict, ValidMessage), verdict
        return verdict


def errors(store: Store, board: Board) -> dict[int, float]:
    """Sequence -> seconds that the store's time is late."""
    return {w.frames: w.time - board.true[w.frames] for w in store.windows(board.device)}


def test_a_clock_that_starts_in_1970_is_corrected_by_arrival(url: str) -> None:
    board = Board()
    with Store(url) as store:
        for number in range(5):
            made = board.started + 60.0 + 10 * number
            store.add(Batch(made + 0.25, [board.make(made)]))
        assert list(errors(store, board).values()) == pytest.approx([0.25] * 5, abs=0.01)
        assert [w.frames for w in store.windows(since=board.started + 75)] == [2, 3, 4], "`since` is in true time"
    with create_engine(url).begin() as connection:
        (payload,) = connection.execute(text("SELECT payload FROM messages WHERE sequence = 3")).one()
    assert '"time":90.0' in payload, "the device's own time is kept"


def test_a_jump_to_the_right_time_corrects_what_came_before(url: str) -> None:
    """The board was off-line for two hours, its clock stands at the last shutdown; then network and NTP come."""
    board = Board(error=-3 * DAY)
    with Store(url) as store:
        backlog = [board.make(board.started + 600 * n) for n in range(1, 12)]
        arrival = board.started + 7200
        store.add(Batch(arrival, backlog[:6]))
        store.add(Batch(arrival + 1, backlog[6:]))
        assert max(errors(store, board).values()) == pytest.approx(601, abs=1), "the newest was made 600 s before"
        board.synchronised, board.error = True, 0.0
        store.add(Batch(arrival + 9, [board.make(arrival + 5)]))
        assert list(errors(store, board).values()) == pytest.approx([0.0] * 12, abs=0.01)


def test_starts_before_the_present_one_end_before_it(url: str) -> None:
    """Two power cuts without network: what was made before them arrives a week later, behind the present status."""
    board = Board()
    first = [board.make(TRUE + 100 * n) for n in range(1, 4)]
    board.restart(TRUE + 400, error=-5.0e8)
    second = [board.make(TRUE + 400 + 100 * n) for n in range(1, 4)]
    board.restart(TRUE + 800, synchronised=True, error=0.0)
    third = board.make(TRUE + 7 * DAY)
    with Store(url) as store:
        store.add(Batch(TRUE + 7 * DAY + 1, [third]))
        store.add(Batch(TRUE + 7 * DAY + 2, first[:2]))
        store.add(Batch(TRUE + 7 * DAY + 3, [first[2], *second[:1]]))
        store.add(Batch(TRUE + 7 * DAY + 4, second[1:]))
        store.add(Batch(TRUE + 7 * DAY + 5, [board.make(TRUE + 7 * DAY + 5)]))
        expire(store, Retention(), now=TRUE + 8 * DAY)
        late = errors(store, board)
    assert [late[n] for n in (6, 7)] == pytest.approx([0, 0], abs=0.01)
    assert [late[n] for n in (3, 4, 5)] == pytest.approx([100] * 3, abs=0.01), "the power was off for 100 s"
    assert [late[n] for n in (0, 1, 2)] == pytest.approx([200] * 3, abs=0.01), "twice"


@pytest.mark.parametrize(
    ("synchronised", "error", "corrected"),
    [
        (True, -40 * DAY, False),  # it says so itself
        (None, -30.0, False),  # it cannot tell, and the time is possible
        (None, -TRUE, True),  # it cannot tell, in 1970
        (None, 400 * DAY, True),  # or next year
        (False, 30.0, True),
    ],
)
def test_only_wrong_clocks_are_corrected(url: str, synchronised: bool | None, error: float, corrected: bool) -> None:
    board = Board(synchronised=synchronised, error=error)
    with Store(url) as store:
        store.add(Batch(TRUE + 100.5, [board.make(TRUE + 100)]))
        assert errors(store, board)[0] == pytest.approx(0.5 if corrected else error, abs=0.01)


def test_merged_hours_are_those_of_the_true_time(url: str) -> None:
    board = Board(started=TRUE - TRUE % 3600)
    with Store(url) as store:
        store.add(Batch(board.started + 10_000, [board.make(board.started + 9_000)]))
        store.add(Batch(board.started + 10_001, [board.make(board.started + 10_000)]))
        expire(store, now=board.started + 40 * DAY)
        (merged,) = store.windows()
    assert (merged.merged, int(merged.time // 3600)) == (2, int(board.started // 3600) + 2)


def test_a_backlog_is_not_corrected_with_each_message(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """2000 delayed messages, each of which allows an earlier start, cost two corrections and end right."""
    rewritten: list[object] = []
    plain = clocks.rewrite_corrected
    monkeypatch.setattr(clocks, "rewrite_corrected", lambda c, key=None: (rewritten.append(key), plain(c, key)))
    board = Board()
    rng = random.Random(3)
    backlog = [board.make(TRUE + 30 * n) for n in range(1, 2001)]
    with Store(url) as store:
        for n in range(0, 2000, 100):
            store.add(Batch(TRUE + 70_000 + n / 100 + rng.random(), backlog[n : n + 100]))
        assert 1 <= len(rewritten) <= 2
        expire(store, now=TRUE + DAY)
        late = errors(store, board)
    best = 70_000 + 19 - 60_000
    assert len(late) == 2000 and max(late.values()) == min(late.values())
    assert best <= late[0] <= best + 1


def test_boards_with_the_same_boot_id_are_different_ones(url: str) -> None:
    """An image that was copied with its boot id, or zeros, as a broken kernel gives."""
    one, other = Board(), Board(device="cam-2", started=TRUE + 5000)
    with Store(url) as store:
        store.add(Batch(TRUE + 6000, [one.make(TRUE + 6000), other.make(TRUE + 6000)]))
        assert errors(store, one)[0] == pytest.approx(0) == errors(store, other)[0]
