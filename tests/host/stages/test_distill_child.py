"""The process that trains from labels only: its progress is its parent's, which waits for it."""

from __future__ import annotations

from pathlib import Path

import pytest

from eyas_host.pipeline.clock import ChainClock, Step
from eyas_host.stages import distill
from eyas_host.stages.estimate import LABELS_ONLY
from eyas_host.support.errors import StageError
from eyas_host.support.progress import Meter, show_clock
from tests.support.child_work import be_killed, work_until


def test_the_parent_shows_how_far_its_child_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distill, "_LOOK_S", 0.01)
    released = tmp_path / "released"
    seen: list[int] = []
    reach = Meter.reach

    def reached(bar: Meter, done: int, note: str | None = None) -> None:
        reach(bar, done, note)
        seen.append(done)
        if done == 8:  # the child waits for this
            released.touch()

    monkeypatch.setattr(Meter, "reach", reached)
    clock = ChainClock({"distill": (Step(100.0, LABELS_ONLY),)})
    clock.enter("distill")
    with show_clock(clock), distill._in_parallel(work_until, released, 3) as child:
        assert child.result() == "history"
    assert 8 in seen and min(seen) >= 3 and seen == sorted(seen), "it begins where the child is, and goes with it"


def test_a_child_that_is_killed_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distill, "_LOOK_S", 0.01)
    with pytest.raises(StageError, match="from labels only was killed"), distill._in_parallel(be_killed) as child:
        child.result()
