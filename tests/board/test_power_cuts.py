"""The power is cut at random moments: what comes back, and what is lost."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from .machine import Board
from .power_cuts import SLACK_S, SYNC_S, Cut, Rig, Span, Windows


@pytest.fixture(scope="module")
def rig(
    flashed: Board, two_bundles: tuple[Path, Path], wheels: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Rig]:
    folder = tmp_path_factory.mktemp("cuts")
    rig = Rig(flashed.copy(folder / "board"), folder, two_bundles, wheels)
    try:
        rig.resume()
        yield rig
    finally:
        rig.close()


@pytest.mark.parametrize("kind", ["running", "offline", "flashing"])
def test_a_board_comes_back_with_a_verified_model(
    rig: Rig, kind: str, request: pytest.FixtureRequest, report: Callable[[str], None]
) -> None:
    machine = rig.board.run("cat /etc/machine-id").stdout
    rig.board.run(f"echo {kind} >/root/synced-{kind} && sync && echo {kind} >/root/cached-{kind}")
    [cut] = rig.cut(kind, random.Random(request.node.name), moments=1)  # type: ignore[arg-type]
    report(
        f"power cut, {kind} after {cut.after_s:.1f} s: answered {cut.answered_s:.0f} s later, {cut.lost_s:.1f} s lost"
    )
    assert cut.ok, cut
    # the cut was one: what was not synchronized is lost, unless a flash has synchronized it, and nothing else
    kept = rig.board.run(f"cat /root/*-{kind}", check=False).stdout.split()
    assert kept == [kind] or (kind == "flashing" and kept == [kind, kind])
    assert rig.board.run("cat /etc/machine-id").stdout == machine
    assert rig.board.wait_running() == "running", rig.board.run("systemctl --failed").stdout


def test_what_is_counted_as_a_loss() -> None:
    """The judge itself: it would see a hole, a late end, a window that is there twice, and an empty start."""
    whole = _run((0, 1), (1, 2), (2, 3))
    assert (whole.longest_gap(3.2), whole.doubled()) == (pytest.approx(0.2), 0)
    assert _run((0, 1), (5, 6)).longest_gap(6.0) == 4.0
    assert whole.longest_gap(10.0) == 7.0
    assert _run((0, 1), (0, 1), (1, 2)).doubled() == 1
    assert Windows((*_run((0, 1)).runs, *_run((0, 1)).runs)).doubled() == 1
    assert _run((0, 1), (1.5, 2), (1.6, 1.7), measured="5.123 ms").doubled() == 2  # the same, under other names
    assert _run((62.28, 62.66), (62.29, 62.39), (62.66, 63.15)).doubled() == 0  # a clock that was looked at late
    assert Windows(()).longest_gap(12.0) == 12.0
    restarted = Windows((*_run((0, 1), (1.5, 2)).runs, *_run((9, 10)).runs))
    assert (restarted.longest_gap(None), restarted.longest_gap(13.0)) == (0.5, 7.0)
    fine = Cut(kind="running", after_s=1, answered_s=1, model="", problem="", lost_s=SYNC_S + SLACK_S, doubled=0)
    assert fine.ok


def _run(*spans: tuple[float, float], measured: str = "") -> Windows:
    """The windows of one start of an agent."""
    return Windows((tuple(Span(begin, end, measured) for begin, end in spans),))
