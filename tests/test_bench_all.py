"""`make bench-all` runs what is left, once: after an interruption, a failure or a change of the code."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from benchmarks.figures import RESULTS

SCRIPT = """
import argparse
from pathlib import Path
from common import Figure, finish
from parts import VALUE
chosen = argparse.ArgumentParser()
chosen.add_argument("--quick", action="store_true")
chosen.add_argument("--json", type=Path)
chosen = chosen.parse_args()
assert chosen.quick
Path("{name}.ran").open("a").write("x")
assert VALUE > 0, "broken"
finish({{"a": Figure(value=VALUE, unit="s", bound=1.0)}}, "before", chosen.json)
"""


@pytest.fixture
def bench_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The program on three tiny benchmarks of its own, one of which cannot be run here."""
    monkeypatch.syspath_prepend(str(RESULTS.parent))
    monkeypatch.chdir(tmp_path)
    here = tmp_path / "benchmarks"
    here.mkdir()
    module = importlib.import_module("bench_all")
    for name in ("common", "earlier"):
        (here / f"{name}.py").write_text((RESULTS.parent / f"{name}.py").read_text())
    for name in ("one", "two", "boards"):
        (here / f"{name}.py").write_text(SCRIPT.format(name=name))
    (here / "parts.py").write_text("VALUE = 2.0\n")
    benches = {"one": module.Bench(), "two": module.Bench(), "boards": module.Bench(needs=tmp_path / "board")}
    monkeypatch.setattr(module, "HERE", here)
    monkeypatch.setattr(module, "_IDLE", ())
    monkeypatch.setattr(module, "BENCHES", benches)
    monkeypatch.setenv("PYTHONPATH", ":".join(sys.path))
    return module


@pytest.fixture
def run(bench_all: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> object:
    def ran(*arguments: str) -> tuple[object, str]:
        bench_all.code_of.cache_clear()
        monkeypatch.setattr(sys, "argv", ["bench_all.py", *arguments])
        with pytest.raises(SystemExit) as ended:
            bench_all.main()
        return ended.value.code, capsys.readouterr().out

    return ran


def times(name: str) -> int:
    path = Path(f"{name}.ran")
    return len(path.read_text()) if path.exists() else 0


def test_a_finished_one_waits_until_its_code_changes(run: Callable[..., tuple[int, str]], tmp_path: Path) -> None:
    code, out = run("--list")
    assert (code, times("one")) == (0, 0) and "left: one, two" in out and "needs" in out
    assert run("one")[0] == 0 and (times("one"), times("two")) == (1, 0)
    code, out = run()
    assert (code, times("one"), times("two"), times("boards")) == (0, 1, 1, 0), "the interrupted one goes on"
    assert "2 done, 0 failed; left: none" in out and out.count("1 of 1 bounds met") == 2, "their last lines"
    run("--again", "one")
    assert (times("one"), times("two")) == (2, 1)
    (tmp_path / "benchmarks/two.py").write_text(SCRIPT.format(name="two") + "\nDONE = True\n")
    assert "left: two" in run("--list")[1]
    (tmp_path / "benchmarks/parts.py").write_text(
        "VALUE = 3.25\n"
    )  # another length: compiled files are known by second and size
    assert "left: one, two" in run("--list")[1], "what they import"
    run()
    assert (times("one"), times("two")) == (3, 2)
    [result] = (tmp_path / "runs/benchmarks").glob("*/one.json")
    tree = json.loads(result.read_text())
    assert tree["figures"]["a"]["value"] == 3.25 and [one["figures"] for one in tree["earlier"]] == [{"a": 2.0}]


def test_a_failed_one_is_named_runs_again_and_keeps_the_last_figures(
    run: Callable[..., tuple[int, str]], tmp_path: Path
) -> None:
    assert run()[0] == 0
    (tmp_path / "benchmarks/parts.py").write_text("VALUE = -1.0\n")
    code, out = run()
    assert code == 1 and "0 done, 2 failed; left: one, two" in out and "AssertionError: broken" in out
    [result] = (tmp_path / "runs/benchmarks").glob("*/one.json")
    assert '"value": 2.0' in result.read_text(), "figures of a run that ended well"
    assert run()[0] == 1 and times("one") == 3
    (tmp_path / "benchmarks/parts.py").write_text("VALUE = 1.0\n")
    assert run()[0] == 0


def test_a_skipped_one_is_no_result_and_runs_again(run: Callable[..., tuple[int, str]], tmp_path: Path) -> None:
    lacks = 'print("figures so far")\nprint("skipped: no board")\n'
    (tmp_path / "benchmarks/two.py").write_text('open("two.ran", "a").write("x")\n' + lacks)
    code, out = run()
    assert code == 0 and "1 done, 0 failed; left: none" in out and "skipped: no board" in out
    assert run()[0] == 0 and (times("one"), times("two")) == (1, 2)
    assert not list((tmp_path / "runs/benchmarks").glob("*/two.json"))


def test_what_is_missing_has_a_stand_in(bench_all: ModuleType, tmp_path: Path) -> None:
    needed, other = tmp_path / "needed", tmp_path / "other"
    bench = bench_all.Bench(needs=needed, otherwise=("--run", other))
    assert "make distill" in bench_all.why_not(bench)
    other.mkdir()
    assert not bench_all.why_not(bench) and bench_all.options(bench) == ("--quick", "--run", str(other))
    needed.mkdir()
    assert not bench_all.why_not(bench) and bench_all.options(bench) == ("--quick",)


def test_a_name_that_is_none_is_answered_with_those_there_are(
    run: Callable[..., tuple[int, str]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("three")[0] == 2


def test_every_script_is_in_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that measures something: it takes --json."""
    monkeypatch.syspath_prepend(str(RESULTS.parent))
    known = importlib.import_module("bench_all").BENCHES
    takes = {path.stem for path in RESULTS.parent.glob("*.py") if '"--json", type=Path' in path.read_text()}
    assert set(known) == takes and len(takes) > 15
    assert all('"--quick"' in (RESULTS.parent / f"{name}.py").read_text() for name in takes), "each has a quick form"
