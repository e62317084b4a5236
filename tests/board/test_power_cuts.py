"""The power is cut at random moments: what comes back, and what is lost."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from .machine import Board
from .power_cuts import SLACK_S, SYNC_S, Cut, Rig, Windows


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
    cut = rig.cut(kind, random.Random(request.node.name))  # type: ignore[arg-type]
    report(
        f"power cut, {kind} after {cut.after_s:.1f} s: answered {cut.answered_s:.0f} s later, {cut.lost_s:.1f} s lost"
    )
    assert cut.ok, cut


def test_what_is_counted_as_a_loss() -> None:
    """The judge itself: it would see a hole, a late end, a window that is there twice, and an empty start."""
    whole = Windows((((0.0, 1.0), (1.0, 2.0), (2.0, 3.0)),))
    assert (whole.longest_gap(3.2), whole.doubled()) == (pytest.approx(0.2), 0)
    assert Windows((((0.0, 1.0), (5.0, 6.0)),)).longest_gap(6.0) == 4.0
    assert whole.longest_gap(10.0) == 7.0
    assert Windows((((0.0, 1.0), (0.0, 1.0), (1.0, 2.0)),)).doubled() == 1
    assert Windows((((0.0, 1.0),), ((0.0, 1.0),))).doubled() == 1
    assert Windows(()).longest_gap(12.0) == 12.0
    restarted = Windows((((0.0, 1.0), (1.5, 2.0)), ((9.0, 10.0),)))
    assert (restarted.longest_gap(None), restarted.longest_gap(13.0)) == (0.5, 7.0)
    fine = Cut(kind="running", after_s=1, answered_s=1, model="", problem="", lost_s=SYNC_S + SLACK_S, doubled=0)
    assert fine.ok
