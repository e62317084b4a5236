"""Work in a process beside: its progress is its parent's, its errors too, and it does not outlive a block."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from eyas_host.pipeline.clock import ChainClock, Step
from eyas_host.support import beside as module
from eyas_host.support.beside import beside
from eyas_host.support.errors import CompileError, StageError
from eyas_host.support.progress import Meter, show_clock
from tests.support.child_work import be_killed, refuse, wait_for_ever, work_until
from tests.support.fleet_parts import wait_until

TITLE = "student from labels only"


@pytest.fixture(autouse=True)
def _look_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_LOOK_S", 0.01)


def test_the_parent_shows_how_far_its_child_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    released = tmp_path / "released"
    seen: list[int] = []
    reach = Meter.reach

    def reached(bar: Meter, done: int, note: str | None = None) -> None:
        reach(bar, done, note)
        seen.append(done)
        if done == 8:  # the child waits for this
            released.touch()

    monkeypatch.setattr(Meter, "reach", reached)
    clock = ChainClock({"distill": (Step(100.0, TITLE),)})
    clock.enter("distill")
    with show_clock(clock), beside(TITLE, work_until, released, 3) as child:
        assert child.result() == "history"
    assert 8 in seen and min(seen) >= 3 and seen == sorted(seen), "it begins where the child is, and goes with it"


def test_a_child_that_is_killed_is_one_line() -> None:
    with (
        pytest.raises(StageError, match=r"^student from labels only: its process was killed"),
        beside(TITLE, be_killed) as child,
    ):
        child.result()


@pytest.mark.parametrize("apart", [True, False])
def test_what_the_work_raises_is_raised_where_its_result_is_asked_for(apart: bool) -> None:
    with beside(TITLE, refuse, apart=apart) as child, pytest.raises(CompileError, match=r"^this network is too odd$"):
        child.result()


def test_a_block_that_fails_ends_the_child(tmp_path: Path) -> None:
    started = tmp_path / "started"
    with pytest.raises(ZeroDivisionError), beside(TITLE, wait_for_ever, started):
        wait_until(lambda: started.exists() and bool(started.read_text()), 60, "the child")
        raise ZeroDivisionError
    assert not Path(f"/proc/{int(started.read_text())}").exists()


def test_a_script_that_calls_eyas_at_its_top_runs_once(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import os\n"
        "from eyas_host.support.beside import beside\n"
        "print('begins')\n"
        "with beside('work', os.getpid) as child:\n"
        "    print(child.result() != os.getpid(), __file__ == __import__('sys').argv[0])\n"
    )
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=100, check=False)
    assert (done.returncode, done.stdout) == (0, "begins\nTrue True\n"), done.stderr


def test_without_room_the_work_is_done_here_when_its_result_is_asked_for(tmp_path: Path) -> None:
    done: list[int] = []

    def work(value: int) -> int:
        done.append(value)
        return os.getpid()

    with beside(TITLE, work, 3, apart=False) as here:
        assert not done
        assert here.result() == os.getpid() and done == [3]


def test_there_is_room_beside_where_a_core_and_memory_are_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "usable_cores", lambda: 2)
    monkeypatch.setattr(module, "usable_memory", lambda: 2e9)
    assert module.has_room_beside(2e9) and not module.has_room_beside(2.1e9)
    monkeypatch.setattr(module, "usable_cores", lambda: 1)
    assert not module.has_room_beside(1e9)
